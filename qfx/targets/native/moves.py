"""Operators that only move elements: views of the same memory where that can be, else copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import name_of
from qfx.targets.native.copies import dense_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS
from qfx.targets.native.views import BATCH, View


def _move(emitter: Emitter, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if name_of(node) == "getitem":
        emitter.values[node] = emitter.values[source][node.args[1]]
        return
    emitter.values[node] = _MOVES[name_of(node)](emitter, node, emitter.view(source))


def _reshape(emitter: Emitter, node: fx.Node, view: View) -> View:
    sizes = emitter.size(node)
    made = view.reshape(sizes)
    if made is not None:
        return made
    made = dense_of(emitter, view, str(node)).reshape(sizes)
    if made is None:
        raise NotNative(f"{node} mixes the batch with other dimensions")
    return made


def _permute(emitter: Emitter, node: fx.Node, view: View) -> View:
    order: Any = node.args[1]
    axes = _axes(emitter, node)
    return view.permute(tuple(axis for d in order for axis in axes[d % len(axes)]))


def _transpose(emitter: Emitter, node: fx.Node, view: View) -> View:
    axes = list(_axes(emitter, node))
    a, b = (int(d) % len(axes) for d in node.args[1:3]) if len(node.args) > 1 else (0, 1)  # type: ignore[arg-type]
    axes[a], axes[b] = axes[b], axes[a]
    return view.permute(tuple(axis for both in axes for axis in both))


def _axes(emitter: Emitter, node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """Of what ``node`` moves."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return emitter.sizes.axes(source)


def _dim(emitter: Emitter, node: fx.Node, view: View, position: int = 1) -> int:
    source, dim = node.args[0], node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    found = emitter.axis(source, dim)
    if view.sizes[found] == BATCH:
        raise NotNative(f"{node} takes the batch apart")
    return found


def _whole(emitter: Emitter, node: fx.Node, position: int, otherwise: int) -> int:
    """An argument of ``node`` that is a number, maybe one made of sizes."""
    given = node.args[position] if len(node.args) > position else None
    number = emitter.values[given] if isinstance(given, fx.Node) else given
    if number is None:
        return otherwise
    if not isinstance(number, int) or (number == BATCH and isinstance(given, fx.Node)):
        raise NotNative(f"{node} has bounds made of the batch")
    return number


def _select(emitter: Emitter, node: fx.Node, view: View) -> View:
    dim = _dim(emitter, node, view)
    return view.select(dim, _whole(emitter, node, 2, 0) % view.sizes[dim])


def _unbind(emitter: Emitter, node: fx.Node, view: View) -> Any:
    dim = _dim(emitter, node, view)
    return tuple(view.select(dim, i) for i in range(view.sizes[dim]))


def _slice(emitter: Emitter, node: fx.Node, view: View) -> View:
    if emitter.size(node) == view.sizes:
        return view
    dim = _dim(emitter, node, view)
    start, step = _whole(emitter, node, 2, 0), _whole(emitter, node, 4, 1)
    begin = min(max(start + (view.sizes[dim] if start < 0 else 0), 0), view.sizes[dim])
    return view.narrow(dim, begin, emitter.size(node)[dim], step)


def _pieces(emitter: Emitter, node: fx.Node, view: View) -> Any:
    """Parts along one dimension, whose sizes the shapes tell."""
    sizes = emitter.sizes.of[node]
    dim = _dim(emitter, node, view, 2)
    found, start = [], 0
    for piece in sizes:
        found.append(view.narrow(dim, start, piece[dim]))
        start += piece[dim]
    return tuple(found)


def _expand(emitter: Emitter, node: fx.Node, view: View) -> View:
    return view.expand(emitter.size(node))


def _same(emitter: Emitter, node: fx.Node, view: View) -> View:
    return view


_MOVES: dict[str, Any] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias", "to", "type_as", "_to_copy"), _same),
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "expand": _expand,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
}


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    val = value(node)
    moved = val if isinstance(val, tuple | list) else (val,)
    source = value(node.all_input_nodes[0])
    if name_of(node) != "getitem" and isinstance(val, torch.Tensor) and source.dtype != val.dtype:
        return "natively, nothing changes types but what rounds"
    other = next((v.dtype for v in moved if isinstance(v, torch.Tensor) and v.dtype not in ELEMENTS), None)
    return None if other is None else f"native programs have no {other}"


MOVES: dict[str, Operator] = dict.fromkeys((*_MOVES, "getitem"), Operator(_refusal, _move, by_row=True))
"""By their ATen names."""
