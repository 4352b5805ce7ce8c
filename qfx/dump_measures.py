"""What a dump can have measured, node by node: noise, milliseconds, and how values are distributed before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qfx.dump_model import Dump, NodeView, StageView
from qfx.dump_noise import Values, measure_values
from qfx.modes import evaluating
from qfx.recording import ROWS, Recording
from qfx.samples import few_rows
from qfx.shadow import undisturbed
from qfx.stage import Stage

ROUNDS = 5


def measured(recording: Recording) -> Dump:
    """The recording's dump with measurements on its nodes, as far as there is something to measure on.

    Noise, and histograms of float and of rounded values, come from one run of the calibrated graph with and without
    rounding: that which the report's noise is measured by, or for a graph that nobody converted one on the example.
    They are on the nodes of FUSED and all stages behind; of a saved model they are left out. Milliseconds are those of
    the lowered graph on the first rows of the calibration data, node by node: the median of five runs.
    """
    values = {path: values_of(gm, recording.inputs[path]) for path, gm in _those(recording, "calibrated")}
    values |= recording.values
    times = {path: times_of(gm, recording.inputs[path]) for path, gm in _those(recording, "lowered")}
    stages = tuple(_filled(view, values.get(view.graph), times.get(view.graph, {})) for view in recording.dump.stages)
    return replace(recording.dump, stages=stages, measured=True)


def _those(recording: Recording, what: str) -> list[tuple[str, fx.GraphModule]]:
    """The graphs that there are inputs for."""
    graphs: Mapping[str, fx.GraphModule] = getattr(recording, what)
    return [(path, gm) for path, gm in graphs.items() if path in recording.inputs]


def _filled(view: StageView, values: Values | None, times: Mapping[str, float]) -> StageView:
    stage = Stage[view.stage.upper()]
    if stage < Stage.FUSED:
        return view

    def told(node: NodeView) -> NodeView:
        stands_for = node.covers[-1] if node.covers else node.name
        new: dict[str, Any] = {} if values is None else values.of(stands_for)
        if stage is Stage.LOWERED and node.name in times:
            new["milliseconds"] = times[node.name]
        return replace(node, **new) if new else node

    return replace(view, nodes=tuple(map(told, view.nodes)))


def values_of(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Values:
    """Run a CALIBRATED graph with and without rounding and look at every value of both runs."""
    with undisturbed(), evaluating(gm):
        return measure_values(gm, few_rows(gm, inputs, ROWS))[1]


# --- times ------------------------------------------------------------------------------------------------------------


class _Timed(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_cuda:
            torch.cuda.synchronize(result.device)
        if n.op not in ("placeholder", "get_attr", "output"):
            self.seconds.setdefault(n.name, []).append(time.perf_counter() - start)
        return result


def times_of(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Median milliseconds of every call of a graph, over five runs behind one that counts for nothing."""
    runner = _Timed(gm)
    given = few_rows(gm, inputs, ROWS)
    with undisturbed(), evaluating(gm):
        for _ in range(ROUNDS + 1):
            runner.run(*given, enable_io_processing=False)
    return {name: statistics.median(seen[1:]) * 1e3 for name, seen in runner.seconds.items()}
