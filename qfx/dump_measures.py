"""What a dump can have measured, node by node: noise, milliseconds, and how values are distributed before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qfx.dump_model import Dump, Histogram, NodeView, StageView
from qfx.fake_quant import FakeQuantize
from qfx.modes import evaluating
from qfx.noise import measure
from qfx.recording import ROWS, Recording
from qfx.samples import few_rows
from qfx.shadow import undisturbed
from qfx.stage import Stage

BINS = 40
ROUNDS = 5
_VALUES = 2**14  # of a tensor that a histogram counts, at most


def measured(recording: Recording) -> Dump:
    """The recording's dump with measurements on its nodes, as far as there is something to measure on.

    Noise, and histograms of float and of rounded values, come from one run of the calibrated graph with and without
    rounding, on the first rows of the calibration data; they are on the nodes of FUSED and all stages behind. Where
    there is no calibrated graph, as of a saved model, they are left out. Milliseconds are those of the lowered graph
    on the same rows, node by node: the median of five runs.
    """
    values = {path: values_of(gm, recording.inputs[path]) for path, gm in _those(recording, "calibrated")}
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


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """By a node's name: SQNR in dB, and the histograms of its float and of its rounded value over one range."""

    sqnr: Mapping[str, float]
    histograms: dict[str, tuple[Histogram, Histogram]] = field(default_factory=dict)

    def of(self, name: str) -> dict[str, Any]:
        """What is known of the node, as fields of its view."""
        before, after = self.histograms.get(name, (None, None))
        found = {"sqnr_db": self.sqnr.get(name), "before": before, "after": after}
        return {key: value for key, value in found.items() if value is not None}


def values_of(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Values:
    """Run a CALIBRATED graph with and without rounding and look at every value of both runs."""
    histograms: dict[str, tuple[Histogram, Histogram]] = {}

    def note(node: fx.Node, float_: Tensor, quantized: Tensor) -> None:
        name = node.name
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), FakeQuantize):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            name = source.name  # its value as kernels read it
        found = histograms_of(float_, quantized)
        if found is not None:
            histograms[name] = found

    with undisturbed(), evaluating(gm):
        noise = measure(gm, few_rows(gm, inputs, ROWS), seen=note)
    return Values(noise.by_node, histograms)


def histograms_of(float_: Tensor, quantized: Tensor) -> tuple[Histogram, Histogram] | None:
    """Both distributions over the range of both, in 40 bins; None where values are not finite, or there are none.

    Of tensors with more than 16,384 values so many are looked at, evenly spaced.
    """
    both = [_some(t.detach()) for t in (float_, quantized)]
    if not all(len(values) and np.isfinite(values).all() for values in both):
        return None
    low, high = min(float(v.min()) for v in both), max(float(v.max()) for v in both)
    if low == high:
        low, high = low - 0.5, high + 0.5
    first, second = (Histogram(low, high, _counts(values, low, high)) for values in both)
    return first, second


def _some(t: Tensor) -> NDArray[np.float32]:
    """Values of ``t`` in the order of its memory, where that is one of the usual two: a flat copy would cost more."""
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    flat = (t.permute(0, 2, 3, 1) if last else t).reshape(-1)
    some: NDArray[np.float32] = flat[:: max(1, len(flat) // _VALUES)][:_VALUES].float().cpu().numpy()
    return some


def _counts(values: NDArray[np.float32], low: float, high: float) -> tuple[int, ...]:
    places = ((values - low) * (BINS / (high - low))).astype(np.int64)
    return tuple(np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS).tolist())


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
