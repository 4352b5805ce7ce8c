"""Noise with a look at the values that it is measured on: how each is distributed before and after rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qfx.dump_model import Histogram
from qfx.fake_quant import FakeQuantize
from qfx.noise import Noise, measure

BINS = 40
_VALUES = 2**14  # of a tensor that a histogram counts, at most


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


def measure_values(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Noise, Values]:
    """What :func:`qfx.noise.measure` measures on a CALIBRATED graph, and what is seen of every value meanwhile."""
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

    noise = measure(gm, inputs, seen=note)
    return noise, Values(noise.by_node, histograms)


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
