"""What the integers in a lowered graph stand for: the scale and zero point of every node that holds some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qfx.attributes import get_tensor
from qfx.meta import value
from qfx.ops import dequantize, quantize
from qfx.targets.base import QParams
from qfx.targets.reference import AnchorLeaf, MatmulLeaf, PointLeaf, QParamsBuffers


def grids(gm: fx.GraphModule) -> dict[fx.Node, QParamsBuffers]:
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
