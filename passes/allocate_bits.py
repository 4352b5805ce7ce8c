"""Choose every layer's bits: the least damage that the budget allows.

Before: a calibrated graph with ``graph_info(gm).sensitivity``.

After::

    %conv = conv2d(%x_fake_quant, %weight_fake_quant)    {...; sensitivity 0.0021; bits 4}

and ``graph_info(gm).allocation`` holds all choices, for ``annotate-again``. Declines, with an error that names the
smallest that would do: a budget that no choices meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.auto_recipe import AutoRecipe
from qfx.bit_allocation import Allocation, allocate_bits
from qfx.layers import layers_of
from qfx.meta import graph_info, update, update_graph
from qfx.stage import Stage


@dataclass(frozen=True)
class AllocateBits:
    """Writes the score and the bits of each layer; an allocation that is there already stays."""

    auto: AutoRecipe

    name: ClassVar[str] = "allocate-bits"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CALIBRATED)
    writes: ClassVar[frozenset[str]] = frozenset({"sensitivity", "bits"})

    def run(self, gm: fx.GraphModule) -> int:
        known = graph_info(gm)
        assert known.sensitivity is not None
        auto = self.auto
        found = known.allocation or allocate_bits(
            known.sensitivity, auto.budget, pin=auto.pin_first_last, allow_float=auto.allow_float
        )
        update_graph(gm, allocation=found)
        _write(gm, found)
        return len(found.choices)


def _write(gm: fx.GraphModule, allocation: Allocation) -> None:
    facts = zip(allocation.sensitivity.layers, allocation.choices, strict=True)
    chosen = {layer.key: (allocation.score(layer, choice), choice) for layer, choice in facts}
    for layer in layers_of(gm):
        score, choice = chosen[layer.key]
        for call in layer.calls:
            update(call, sensitivity=score, bits=choice.weight)
