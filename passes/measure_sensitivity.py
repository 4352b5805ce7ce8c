"""Score every layer's weight and data at every width that may be chosen.

Before::

    %conv = conv2d(%x_fake_quant, %weight_fake_quant)    {in uint8 ..., int8 ...}      (calibrated)

After: the same graph, and ``graph_info(gm).sensitivity`` holds the scores.

The calls that calibration kept are the data. Declines, with an error: a graph without a layer that is quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.auto_recipe import AutoRecipe
from qfx.measure import measure_sensitivity
from qfx.meta import graph_info, kept_calls, update_graph
from qfx.samples import samples_of
from qfx.stage import Stage
from qfx.targets import Target


@dataclass(frozen=True)
class MeasureSensitivity:
    """Runs the measurement that ``auto`` asks for, unless it was made before."""

    auto: AutoRecipe
    target: Target

    name: ClassVar[str] = "measure-sensitivity"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CALIBRATED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        if graph_info(gm).sensitivity is not None:
            return 0
        wanted = self.auto.measurement
        samples = samples_of(gm, kept_calls(gm), rows=wanted.rows, split=wanted.splits)
        found = measure_sensitivity(
            gm, samples, wanted, recipe=self.auto.base, target=self.target, model=type(gm).__name__
        )
        update_graph(gm, sensitivity=found)
        return len(found.scores)
