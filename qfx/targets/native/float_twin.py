"""The float computation that a lowered graph stands for: what a region must be faster than."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.meta import value
from qfx.ops import dequantize, quantize
from qfx.targets.base import QParams, fill
from qfx.targets.reference import AnchorLeaf, MatmulLeaf, PointLeaf, QParamsBuffers

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
        self._grids = _grids(gm)

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


def _grids(gm: fx.GraphModule) -> dict[fx.Node, QParamsBuffers]:
    """What the integers of a node stand for: as what computes it says, or else what reads it. Moves change nothing."""
    nodes = list(gm.graph.nodes)
    found: dict[fx.Node, QParamsBuffers] = {}
    for node in reversed(nodes):
        for source, grid in zip(_sources(node), _readers(gm, node, found.get(node)), strict=False):
            if isinstance(grid, QParamsBuffers):
                found.setdefault(source, grid)
    for node in nodes:
        if node.op in ("call_function", "call_module"):
            moved = next((found[n] for n in _sources(node) if n in found), None)
            grid = _made(gm, node, moved)
            if grid is not None:
                found[node] = grid
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """The data of a leaf or of a function: of the latter the first argument, since others are sizes and parameters."""
    data = node.args if node.op == "call_module" else node.args[:1]
    flat = [n for given in data for n in (given if isinstance(given, list | tuple) else (given,))]
    return [n for n in flat if isinstance(n, fx.Node)]


def _readers(gm: fx.GraphModule, node: fx.Node, moved: QParamsBuffers | None) -> Sequence[Any]:
    """What ``node`` takes each of its sources for; ``moved``: what its own integers are, where it only moves them."""
    if node.op == "call_module":
        leaf = gm.get_submodule(str(node.target))
        if isinstance(leaf, AnchorLeaf):
            return [leaf.data, *leaf.others]
        if isinstance(leaf, MatmulLeaf):
            return [leaf.left, leaf.right, *leaf.others]
        return list(leaf.inputs) if isinstance(leaf, PointLeaf) else []
    if node.target is dequantize:
        dtype = value(node.args[0]).dtype  # type: ignore[arg-type]
        limits = torch.iinfo(dtype)
        return [_grid(gm, node, limits.min, limits.max, dtype)]
    return [] if node.target is quantize else [moved] * len(_sources(node))


def _made(gm: fx.GraphModule, node: fx.Node, moved: QParamsBuffers | None) -> QParamsBuffers | None:
    """What the integers that ``node`` computes stand for; None where it computes none."""
    if node.op == "call_module":
        leaf = gm.get_submodule(str(node.target))
        return leaf.output if isinstance(leaf, AnchorLeaf | MatmulLeaf | PointLeaf) else None
    if node.target is quantize:
        return _grid(gm, node, *node.args[5:8])
    return None if node.target is dequantize else moved


def _grid(gm: fx.GraphModule, node: fx.Node, quant_min: Any, quant_max: Any, dtype: Any) -> QParamsBuffers:
    """Of a quantize or dequantize operator."""
    scale, zero_point = (get_tensor(gm, str(n.target)) for n in node.args[1:3])  # type: ignore[union-attr]
    axis, group_size = node.args[3:5]
    return QParamsBuffers(QParams(scale, zero_point, axis, group_size, quant_min, quant_max, dtype))  # type: ignore[arg-type]


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
