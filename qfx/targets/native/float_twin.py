"""The float computation that a lowered graph stands for: what a region must be faster than."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.ops import dequantize, quantize
from qfx.targets.base import fill
from qfx.targets.native.grids import grids
from qfx.targets.reference import AnchorLeaf, MatmulLeaf, PointLeaf

_OUTSIDE = ("placeholder", "get_attr")
"""Nodes whose values nothing in the graph computes."""


class FloatTwin(fx.Interpreter):
    """Computes a graph of leaves without rounding any activation but those that come in or go out as integers.

    Weights are what their integers stand for, in float32. It may be called from several threads at once.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        anchors = (m for m in gm.modules() if isinstance(m, AnchorLeaf))
        self._weights = {leaf: leaf.weight_qparams.dequantize(leaf.integers()) for leaf in anchors}
        self._grids = grids(gm)

    def __call__(self, *inputs: Tensor) -> Any:
        return copy.copy(self).run(*inputs)  # the values of a run are kept in the interpreter

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return fx.map_arg(n.args[0], self._given)
        result = super().run_node(n)
        return self._grids[n].dequantize(result) if n.op in _OUTSIDE and n in self._grids else result

    def _given(self, node: fx.Node) -> Any:
        """What stands for ``node`` outside."""
        grid = self._grids.get(node)
        return self.env[node] if grid is None else grid.quantize(self.env[node])

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (quantize, dequantize):
            return args[0]
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaf = self.fetch_attr(str(target))
        if isinstance(leaf, AnchorLeaf):
            return _finish(leaf, self._layer(leaf, args[0]), args[1:])
        if isinstance(leaf, MatmulLeaf):
            return _finish(leaf, leaf.target(*args[:2]), args[2:])
        if isinstance(leaf, PointLeaf):
            reals = {k: fill(v, args) for k, v in leaf.kwargs.items()}
            return leaf.target(*fill(leaf.args, args), **reals)
        return super().call_module(target, args, kwargs)

    def _layer(self, leaf: AnchorLeaf, x: Tensor) -> Tensor:
        bias = leaf.bias
        if bias is not None and leaf.integer_bias:
            assert leaf.data is not None
            bias = bias.float() * (leaf.data.scale * leaf._by_channel())
        return leaf.target(x, self._weights[leaf], bias, *leaf.args)


def _finish(leaf: AnchorLeaf | MatmulLeaf, y: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The steps behind the sums."""
    rest = iter(others)
    for name, step, args, kwargs in leaf.calls:
        y = y + next(rest) if name == "add" else step(y, *args, **kwargs)
    return y


@dataclass(frozen=True)
class Times:
    """Seconds of one run, the least of several."""

    native: float
    float_: float

    def __str__(self) -> str:
        return f"{self.float_ * 1e3:.3g} ms in float, {self.native * 1e3:.3g} ms as a native program"


def compare_times(
    program: Callable[..., Any], twin: FloatTwin, inputs: Sequence[Tensor], *, rounds: int = 5
) -> Times:
    """Both in turns, so that what else the machine does meets them alike."""
    contiguous = [x.contiguous() for x in inputs]
    seconds: list[tuple[float, float]] = []
    with torch.no_grad():
        for _ in range(rounds + 1):  # the first is to warm up
            seconds.append((_seconds(program, contiguous), _seconds(twin, contiguous)))
    native, float_ = (min(column) for column in zip(*seconds[1:], strict=True))
    return Times(native, float_)


def _seconds(run: Callable[..., Any], inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    run(*inputs)
    return time.perf_counter() - start
