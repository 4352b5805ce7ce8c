"""Values in another layout: views as they are where that will do, else a step that copies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from qfx.targets.native.images import border_fill
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import Program, Step, pointer
from qfx.targets.native.views import BATCH, Border, View

if TYPE_CHECKING:
    from qfx.targets.native.emitter import Emitter

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


def image_of(emitter: Emitter, view: View, source: str, border: Border | None = None, zero: int = 0) -> View:
    """``view``, ``[BATCH, C, H, W]``, as an image whose channels lie side by side, copied if need be.

    ``border``: what has to be around it at least, filled with ``zero``.
    """
    wanted = border or Border()
    if view.channels_last and view.border.holds(wanted):
        return view
    made = emitter.program.image(view.element, view.sizes, wanted)
    copy(emitter.program, view, made, source, border_fill(made, zero))
    return made


def dense_of(emitter: Emitter, view: View, source: str) -> View:
    """``view`` in the natural order of its dimensions, copied if need be."""
    if view.contiguous and view.batched:
        return view
    made = emitter.program.tensor(view.element, view.sizes)
    copy(emitter.program, view, made, source)
    return made


def samples_of(emitter: Emitter, view: View, inner: int, source: str) -> View:
    """``view`` as ``[BATCH, ...]`` with ``inner`` dimensions behind the first: all that is before them makes samples of
    their own, one behind the other. Copied if need be."""
    count, sizes = math.prod(view.sizes[1:-inner]), view.sizes[-inner:]
    if not view.batched:
        view = dense_of(emitter, view, source)
    if count == 1:
        strides = (view.strides[0], *view.strides[-inner:])
        return replace(view, sizes=(BATCH, *sizes), strides=strides, border=Border())
    flat = view.reshape((BATCH, count, *sizes))
    if flat is None or flat.strides[0] != count * flat.strides[1]:
        flat = dense_of(emitter, view, source).reshape((BATCH, count, *sizes))
    if flat is None:
        raise NotNative(f"{source} reads nothing")
    return replace(flat, sizes=(BATCH, *sizes), strides=flat.strides[1:], border=Border())


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
