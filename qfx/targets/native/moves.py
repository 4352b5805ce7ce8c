"""Operators that only move elements: views of the same memory where that can be, else copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import name_of
from qfx.targets.native.emitter import Emitter, NotNative, Operator
from qfx.targets.native.images import border_fill
from qfx.targets.native.program import ELEMENTS, Program, Step, pointer
from qfx.targets.native.views import BATCH, Border, View

MOST_DIMS = 6


def copy(program: Program, view: View, to: View, source: str, fill: str = "") -> None:
    """Add a step that copies ``view`` into ``to``, of the same sizes; ``fill``: C++ that runs before."""
    if not view.batched:
        raise NotNative(f"{source} cannot be copied: its first dimension is not the batch")
    inner = _walk(list(zip(view.sizes[1:], view.strides[1:], to.strides[1:], strict=True)))
    walk = [(1, view.strides[0], to.strides[0]), *inner]
    if len(walk) > MOST_DIMS:
        raise NotNative(f"{source} cannot be copied: it has too many dimensions")
    braces = ", ".join(f"{{{', '.join(map(str, numbers))}}}" for numbers in zip(*walk, strict=True))
    plan = program.declare("Copy", "copy", f"{{{len(walk)}, {braces}}}")
    code = f"{fill}\ncopy(team, {plan}, n, {pointer(view.buffer, view.offset)}, {pointer(to.buffer, to.offset)});"
    program.headers.add("copy.h")
    program.add(Step(code, (view.buffer,), (to.buffer,), source, "copy"))


def _walk(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """``(size, step, step)`` of dimensions, those that both sides walk through as one joined; at least one."""
    found: list[tuple[int, int, int]] = []
    for size, source, target in dims:
        if size == 1:
            continue
        if found and found[-1][1:] == (size * source, size * target):
            found[-1] = (found[-1][0] * size, source, target)
        else:
            found.append((size, source, target))
    return found or [(1, 1, 1)]


def image_of(emitter: Emitter, view: View, source: str, border: Border = Border(), zero: int = 0) -> View:  # noqa: B008
    """``view``, ``[BATCH, C, H, W]``, as an image whose channels lie side by side, copied if need be.

    ``border``: what has to be around it at least, filled with ``zero``.
    """
    if view.channels_last and view.border.holds(border):
        return view
    made = emitter.program.image(view.element, view.sizes, border)
    copy(emitter.program, view, made, source, border_fill(made, zero))
    return made


def rows_of(emitter: Emitter, view: View, source: str) -> View:
    """``view``, ``[BATCH, ..., C]``, as an image of one row ``[BATCH, C, 1, rows]``, copied if need be."""
    if not view.batched or len(view.sizes) < 2:
        raise NotNative(f"the first dimension that {source} reads is not the batch")
    sizes = (BATCH, 1, math.prod(view.sizes[1:-1]), view.sizes[-1])
    flat = view.reshape(sizes)
    if flat is None or (flat.strides[-1] != 1 and sizes[-1] != 1):
        dense = emitter.program.tensor(view.element, view.sizes)
        copy(emitter.program, view, dense, source)
        flat = dense.reshape(sizes)
    if flat is None:
        raise NotNative(f"{source} reads nothing")
    return flat.permute((0, 3, 1, 2))


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
    dense = emitter.program.tensor(view.element, view.sizes)
    copy(emitter.program, view, dense, str(node))
    made = dense.reshape(sizes)
    if made is None:
        raise NotNative(f"{node} mixes the batch with other dimensions")
    return made


def _permute(emitter: Emitter, node: fx.Node, view: View) -> View:
    order: Any = node.args[1]
    return view.permute(tuple(d % len(view.sizes) for d in order))


def _transpose(emitter: Emitter, node: fx.Node, view: View) -> View:
    dims = len(view.sizes)
    order = list(range(dims))
    a, b = (int(d) % dims for d in node.args[1:3]) if len(node.args) > 1 else (0, 1)  # type: ignore[arg-type]
    order[a], order[b] = b, a
    return view.permute(tuple(order))


def _dim(node: fx.Node, view: View, position: int = 1) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    found = dim % len(view.sizes)
    if view.sizes[found] == BATCH:
        raise NotNative(f"{node} takes the batch apart")
    return found


def _select(emitter: Emitter, node: fx.Node, view: View) -> View:
    dim = _dim(node, view)
    index = node.args[2]
    assert isinstance(index, int)
    return view.select(dim, index % view.sizes[dim])


def _unbind(emitter: Emitter, node: fx.Node, view: View) -> Any:
    dim = _dim(node, view)
    return tuple(view.select(dim, i) for i in range(view.sizes[dim]))


def _slice(emitter: Emitter, node: fx.Node, view: View) -> View:
    if all(size == have for size, have in zip(emitter.size(node), view.sizes, strict=True)):
        return view
    dim = _dim(node, view)
    start = node.args[2] if len(node.args) > 2 else 0
    step = node.args[4] if len(node.args) > 4 else 1
    if not isinstance(start, int | None) or not isinstance(step, int):
        raise NotNative(f"{node} has computed bounds")
    begin = min(max((start or 0) + (view.sizes[dim] if (start or 0) < 0 else 0), 0), view.sizes[dim])
    return view.narrow(dim, begin, emitter.size(node)[dim], step)


def _pieces(emitter: Emitter, node: fx.Node, view: View) -> Any:
    """Parts along one dimension, whose sizes the shapes tell."""
    sizes = emitter.sizes[node]
    dim = _dim(node, view, 2)
    found, start = [], 0
    for piece in sizes:
        found.append(view.narrow(dim, start, piece[dim]))
        start += piece[dim]
    return tuple(found)


def _expand(emitter: Emitter, node: fx.Node, view: View) -> View:
    sizes = emitter.size(node)
    missing = len(sizes) - len(view.sizes)
    kept = zip(view.strides, view.sizes, sizes[missing:], strict=True)
    strides = [0] * missing + [stride if have == size else 0 for stride, have, size in kept]
    return View(view.buffer, sizes, tuple(strides), view.offset)


def _same(emitter: Emitter, node: fx.Node, view: View) -> View:
    return view


_MOVES: dict[str, Any] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "expand": _expand,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _pieces),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
}

MOVES = frozenset({*_MOVES, "getitem"})
"""Names of the operators that :data:`MOVE` takes."""

def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    val = value(node)
    moved = val if isinstance(val, tuple | list) else (val,)
    other = next((v.dtype for v in moved if isinstance(v, torch.Tensor) and v.dtype not in ELEMENTS), None)
    return None if other is None else f"native programs have no {other}"


MOVE = Operator(_refusal, _move)
