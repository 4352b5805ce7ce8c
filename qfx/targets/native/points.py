"""Element-wise operators on integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.targets.native.copies import dense_of, image_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import number, quantize_to
from qfx.targets.native.images import base, border_fill
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS, pointer
from qfx.targets.native.views import View, numel
from qfx.targets.reference import PointLeaf
from qfx.targets.x86_point import LoopLeaf, TableLeaf


def point_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    if not isinstance(leaf, TableLeaf | LoopLeaf):
        return f"no native kernel for {getattr(leaf, 'kernel', leaf)}"
    shape = value(node).shape
    for n in (n for n in node.args if isinstance(n, fx.Node)):
        scales_channels = len(shape) == 4 and value(n).shape == (*shape[:2], 1, 1)  # squeeze and excitation
        if value(n).shape != shape and not scales_channels:
            return "no native kernel that broadcasts integers so"
    return None


def emit_table(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    (x,) = _alike(emitter, node)
    dtype = torch.uint8 if x.element == "uint8_t" else torch.int8
    limits = torch.iinfo(dtype)
    table = PointLeaf.forward(leaf, torch.arange(limits.min, limits.max + 1).to(dtype)).view(torch.uint8)
    flip = 128 if dtype == torch.int8 else 0
    out, (rows_x, rows_out), rows, length = _rows(emitter, node, [x], ELEMENTS[leaf.output.limits["dtype"]])
    from_ = f"reinterpret_cast<const uint8_t*>({_base(x)} + {rows_x}.at(i, row))"
    to = f"reinterpret_cast<uint8_t*>({_base(out)} + {rows_out}.at(i, row))"
    call = f"lookup({from_}, {emitter.program.constant(table)}, {to}, {length}, {flip});"
    _each_row(emitter, node, leaf, rows, call, [x], out, leaf.kernel)


def emit_binary(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    a, b = _alike(emitter, node)
    out, (of_a, of_b, of_out), rows, length = _rows(emitter, node, [a, b], ELEMENTS[leaf.output.limits["dtype"]])
    inverse, zero_point, *ends = quantize_to(leaf.output).split(", ")
    to = f"Bounded{{{inverse}, {zero_point}, -INFINITY, INFINITY, {', '.join(ends)}}}"
    operands = ", ".join(
        f"{_base(view)} + {walk}.at(i, row), Affine{{{number(float(q.scale))}, {int(q.zero_point)}}}"
        for view, walk, q in zip((a, b), (of_a, of_b), leaf.inputs, strict=True)
    )
    multiply = str(leaf.operator == "mul").lower()
    call = f"binary<{multiply}>({operands}, {_base(out)} + {of_out}.at(i, row), {to}, {length});"
    _each_row(emitter, node, leaf, rows, call, [a, b], out, leaf.operator)


def _each_row(
    emitter: Emitter, node: fx.Node, leaf: PointLeaf, rows: int, call: str, reads: list[View], out: View, kernel: str
) -> None:
    """Add the step that makes the C++ ``call`` for row ``row`` of sample ``i``."""
    fill = border_fill(out, int(leaf.output.zero_point) & 255)
    loop = f"each_row(team, n, {rows}, [&](int64_t i, int64_t row) {{\n  {call}\n}});"
    emitter.step(f"{fill}\n{loop}", reads, [out], node, kernel)


def _alike(emitter: Emitter, node: fx.Node) -> list[View]:
    """What ``node`` reads, copied where need be: all images, or all in the natural order of one shape."""
    views = [emitter.view(n) for n in node.args if isinstance(n, fx.Node)]
    if all(v.channels_last for v in views):
        return views
    if len({v.sizes for v in views}) > 1 and node in emitter.sizes.joined:
        raise NotNative(f"{node} repeats integers along the rows of all samples")
    if len({v.sizes for v in views}) > 1 or any(v.channels_last and not v.contiguous for v in views):
        return [image_of(emitter, v, str(node)) for v in views]
    return [v if v.contiguous and v.batched else dense_of(emitter, v, str(node)) for v in views]


def _rows(
    emitter: Emitter, node: fx.Node, inputs: list[View], element: Any
) -> tuple[View, tuple[str, ...], int, int]:
    """The result, how each view is walked in rows, how many rows a sample has, and how long they are."""
    emitter.program.headers.add("pointwise.h")
    if all(v.channels_last for v in inputs):
        out = emitter.image(node, element)
        _, channels, height, width = out.sizes
        views = (*inputs, out)
        if all(v.strides[3] == channels and v.sizes == out.sizes for v in views):
            return out, tuple(_walk(v, 1, v.strides[2], 0) for v in views), height, width * channels
        walks = tuple(_walk(v, width, *(v.strides[2:] if v.sizes == out.sizes else (0, 0))) for v in views)
        return out, walks, height * width, channels
    out = emitter.tensor(node, element)
    size = numel(out.sizes)
    length = next((part for part in range(min(size, 4096), 0, -1) if size % part == 0), 1)
    walks = tuple(f"Rows{{{size}, 0, {length}, 1, 0}}" for _ in (*inputs, out))
    return out, walks, size // length, length


def _walk(view: View, inner: int, outer: int, step: int) -> str:
    """How the rows of an image follow one another, from where its border begins."""
    first = view.border.top * view.strides[2] + view.border.left * view.strides[3]
    return f"Rows{{{view.strides[0]}, {first}, {outer}, {inner}, {step}}}"


def _base(view: View) -> str:
    return base(view) if len(view.sizes) == 4 else pointer(view.buffer, view.offset)


TABLE = Operator(point_refusal, emit_table, by_row=True)
BINARY = Operator(point_refusal, emit_binary, by_row=True)
