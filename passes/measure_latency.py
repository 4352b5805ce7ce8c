"""Time every layer in each of its choices, with the target's own kernels.

Before: a calibrated graph with ``graph_info(gm).sensitivity``. After: the same, and every layer has ``times``.

For each choice of bits a copy of the graph is lowered with all layers in it, and run operator by operator: a layer's
time is that of the kernel it became, or in float that of its own operator. Conversions between integers and float at a
layer's borders are not its own and do not count.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import fx

from qfx.bit_allocation import Allocation
from qfx.choices import Choice
from qfx.layers import Layer, layers_of
from qfx.meta import graph_info, info, kept_calls, update_graph
from qfx.passes.annotate_again import AnnotateAgain
from qfx.passes.cancel_pairs import CancelPairs
from qfx.passes.convert import Convert
from qfx.passes.eliminate_dead_code import EliminateDeadCode
from qfx.passes.fold_weights import FoldWeights
from qfx.passes.lower import Lower
from qfx.passes.reuse_memory import ReuseMemory
from qfx.pipeline import Pipeline
from qfx.sensitivity_table import Sensitivity
from qfx.stage import Stage
from qfx.targets import Target

ROUNDS = 7


@dataclass(frozen=True)
class MeasureLatency:
    """Adds the milliseconds of every layer's choices to the sensitivity, unless they are there."""

    target: Target

    name: ClassVar[str] = "measure-latency"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CALIBRATED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        found = graph_info(gm).sensitivity
        assert found is not None
        if all(layer.times for layer in found.layers):
            return 0
        layers, inputs = layers_of(gm), kept_calls(gm)[0][0]
        times: dict[str, list[tuple[Choice, float]]] = {layer.key: [] for layer in found.layers}
        for choice in dict.fromkeys(choice for layer in found.layers for choice in layer.choices):
            lowered = self._lowered(gm, found, choice)
            by_node = _times(lowered, inputs)
            for layer, facts in zip(layers, found.layers, strict=True):
                if choice in facts.choices:
                    times[layer.key].append((choice, _of(layer, lowered, by_node)))
        update_graph(gm, sensitivity=found.with_times({key: tuple(entry) for key, entry in times.items()}))
        return len(times)

    def _lowered(self, gm: fx.GraphModule, found: Sensitivity, choice: Choice) -> fx.GraphModule:
        """A copy of the graph with every layer in that choice that can have it."""
        shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
        twin = copy.deepcopy(gm, shared)
        choices = tuple(choice if choice in layer.choices else layer.given for layer in found.layers)
        update_graph(twin, allocation=Allocation(found, choices, None))
        again = AnnotateAgain(self.target)
        behind = (Convert(), FoldWeights(), CancelPairs(), Lower(self.target), ReuseMemory(), EliminateDeadCode())
        return Pipeline((again, *behind)).run(twin)


def _times(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Mapping[str, float]:
    """Milliseconds of every operator by its name: the median of some runs."""
    runs = []
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            timer = _Timer(gm)
            timer.run(*inputs, enable_io_processing=False)
            runs.append(timer.seconds)
    return {name: 1e3 * median(run[name] for run in runs[1:]) for name in runs[0]}  # the first one packs


class _Timer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        self.seconds[n.name] = time.perf_counter() - start
        return result


def _of(layer: Layer, lowered: fx.GraphModule, by_node: Mapping[str, float]) -> float:
    """The time of what became of the layer's operators."""
    names = {call.name for call in layer.calls}
    return sum(by_node[n.name] for n in lowered.graph.nodes if n.name in names or names & set(info(n).fused))

