"""Operators on integers without weights, and the crossings between floats and integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import is_constant
from qfx.targets.native.emitter import Emitter, NotNative, Operator
from qfx.targets.native.epilogues import number, quantize_to
from qfx.targets.native.images import base, border_fill, image
from qfx.targets.native.moves import copy, image_of
from qfx.targets.native.program import ELEMENTS, pointer
from qfx.targets.native.views import View, numel
from qfx.targets.reference import PointLeaf, QParamsBuffers
from qfx.targets.x86_point import LoopLeaf, TableLeaf
from qfx.targets.x86_static import StaticLeaf

# --- crossings --------------------------------------------------------------------------------------------------------


def quantize_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    x, scale = node.args[0], node.args[1]
    per_tensor = node.args[3] is None and isinstance(scale, fx.Node) and is_constant(scale)
    if not per_tensor or value(x).dtype != torch.float32:  # type: ignore[arg-type]
        return "natively, one constant scale rounds float32"
    return None


def emit_quantize(emitter: Emitter, node: fx.Node) -> None:
    x = emitter.rounded.get(node) or emitter.view(node.args[0])
    if x.element != "float":  # what made it has rounded it
        emitter.values[node] = x
        return
    scale, zero_point = (emitter.parameter(n) for n in node.args[1:3])
    low, high, dtype = node.args[5:8]
    assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
    inverse = float(torch.reciprocal(scale.float()))
    to = f"f32::QuantizeTo{{{', '.join(number(v) for v in (inverse, float(zero_point), float(low), float(high)))}}}"
    if len(x.sizes) == 4 and x.batched and _is_image(emitter, node):
        if not x.contiguous:
            x = _dense(emitter, x, node)
        emitter.program.headers.add("quantize.h")
        out = emitter.image(node, ELEMENTS[dtype])
        fill = border_fill(out, int(zero_point) & 255)
        call = f"quantize_planes(team, {pointer(x.buffer)}, {base(out)}, n, {image(out)}, {to});"
        emitter.step(f"{fill}\n{call}", [x], [out], node, "quantize")
        return
    if not x.contiguous:
        x = _dense(emitter, x, node)
    out = emitter.tensor(node, ELEMENTS[dtype])
    emitter.program.headers.add("elementwise.h")
    call = f"f32::quantize(team, {pointer(x.buffer)}, {pointer(out.buffer)}, {to}, n * {x.buffer.size});"
    emitter.step(call, [x], [out], node, "quantize")


def _is_image(emitter: Emitter, node: fx.Node) -> bool:
    """True where a reader of four dimensions takes the second for channels."""
    leaves = [emitter.module(user) for user in node.users if user.op == "call_module"]
    return any(not isinstance(leaf, StaticLeaf) or len(leaf.weight_shape) == 4 for leaf in leaves)


def emit_dequantize(emitter: Emitter, node: fx.Node) -> None:
    scale, zero_point = (emitter.parameter(n) for n in node.args[1:3])
    x = emitter.view(node.args[0])
    if not x.contiguous:
        x = _dense(emitter, x, node)
    out = emitter.tensor(node, "float")
    emitter.program.headers.add("elementwise.h")
    affine = f"{number(float(scale))}, {int(zero_point)}"
    call = f"f32::dequantize(team, {pointer(x.buffer)}, {pointer(out.buffer)}, {affine}, n * {x.buffer.size});"
    emitter.step(call, [x], [out], node, "dequantize")


def _dense(emitter: Emitter, view: View, node: fx.Node) -> View:
    made = emitter.program.tensor(view.element, view.sizes)
    copy(emitter.program, view, made, str(node))
    return made


def dequantize_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    scale = node.args[1]
    per_tensor = node.args[3] is None and isinstance(scale, fx.Node) and is_constant(scale)
    if not per_tensor or value(node.args[0]).dtype not in (torch.uint8, torch.int8):  # type: ignore[arg-type]
        return "natively, one constant scale dequantizes bytes"
    return None if node.args[5] == torch.float32 else "natively, float32 alone is dequantized to"


# --- pooling ----------------------------------------------------------------------------------------------------------


def pool_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    if not isinstance(leaf, LoopLeaf) or value(node.args[0]).ndim != 4:  # type: ignore[arg-type]
        return f"no native kernel for {getattr(leaf, 'kernel', leaf)}"
    if leaf.named.get("ceil_mode", False) and leaf.row.__name__ == "_max_pool":
        return None
    if leaf.row.__name__ == "_mean":
        dims = leaf.named.get("dim")
        over_both = dims is not None and {d % 4 for d in _tuple(dims)} == {2, 3}
        return None if over_both else "no native mean over these axes"
    return None


def emit_max_pool(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    named = leaf.named
    height, width = _pair(named["kernel_size"])
    stride = named.get("stride") or (height, width)
    ends = (*_pair(stride), *_pair(named.get("padding", 0)), *_pair(named.get("dilation", 1)))
    x = image_of(emitter, emitter.view(node.args[0]), str(node))
    out = emitter.image(node, x.element)
    pool = _pool(emitter, x, out, height, width, *ends)
    fill = border_fill(out, int(leaf.output.zero_point) & 255)
    call = f"max_pool(team, {pool}, n, {base(x)}, {base(out)});"
    emitter.step(f"{fill}\n{call}", [x], [out], node, "max_pool2d")


def emit_mean_pool(emitter: Emitter, node: fx.Node) -> None:
    """Average pooling over windows of one size."""
    leaf = emitter.module(node)
    named, reader, output = leaf.named, leaf.inputs[0], leaf.output
    height, width = _pair(named["kernel_size"])
    stride = named.get("stride") or (height, width)
    x = image_of(emitter, emitter.view(node.args[0]), str(node))
    out = emitter.image(node, ELEMENTS[output.limits["dtype"]])
    pool = _pool(emitter, x, out, height, width, *_pair(stride), *_pair(named.get("padding", 0)), 1, 1)
    counted = f"{str(named.get('count_include_pad', True)).lower()}, {named.get('divisor_override') or 0}"
    affine = f"{number(float(reader.scale))}, {int(reader.zero_point)}, f32::QuantizeTo{{{quantize_to(output)}}}"
    fill = border_fill(out, int(output.zero_point) & 255)
    call = f"mean_pool(team, {pool}, {counted}, n, {base(x)}, {base(out)}, {affine});"
    emitter.step(f"{fill}\n{call}", [x], [out], node, "avg_pool2d")


def emit_adaptive(emitter: Emitter, node: fx.Node) -> None:
    """Adaptive pooling, and the mean over both axes of an image."""
    leaf = emitter.module(node)
    reader, output = leaf.inputs[0], leaf.output
    assert isinstance(reader, QParamsBuffers)
    x = image_of(emitter, emitter.view(node.args[0]), str(node))
    element = ELEMENTS[output.limits["dtype"]]
    if len(emitter.size(node)) == 4:
        out = result = emitter.image(node, element)
    else:  # a mean that drops the axes
        result = emitter.tensor(node, element)
        out = _as_pixel(result)
    pool = _pool(emitter, x, out, 1, 1, 1, 1, 0, 0, 1, 1)
    affine = f"{number(float(reader.scale))}, {int(reader.zero_point)}, f32::QuantizeTo{{{quantize_to(output)}}}"
    fill = border_fill(out, int(output.zero_point) & 255)
    call = f"adaptive_mean(team, {pool}, n, {base(x)}, {base(out)}, {affine});"
    emitter.step(f"{fill}\n{call}", [x], [out], node, "mean")


def _as_pixel(view: View) -> View:
    made = view.reshape((*view.sizes, 1, 1))
    if made is None:
        raise NotNative("a mean of another layout")
    return View(made.buffer, made.sizes, (made.strides[0], 1, view.sizes[1], view.sizes[1]), made.offset)


def _pool(emitter: Emitter, x: View, out: View, *numbers: int) -> str:
    emitter.program.headers.add("pool.h")
    return emitter.program.declare("Pool", "pool", f"{{{image(x)}, {image(out)}, {', '.join(map(str, numbers))}}}")


def _pair(values: Any) -> tuple[int, int]:
    given = (values,) if isinstance(values, int) else tuple(values)
    return given[0], given[-1]


def _tuple(values: Any) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(values)


# --- element by element -----------------------------------------------------------------------------------------------


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
    if dtype == torch.int8:
        table = table.roll(-128)  # by the bits of the integer
    out, (rows_x, rows_out), rows, length = _rows(emitter, node, [x], ELEMENTS[leaf.output.limits["dtype"]])
    fill = border_fill(out, int(leaf.output.zero_point) & 255)
    to = f"reinterpret_cast<uint8_t*>({_base(out)})"
    constant = emitter.program.constant(table)
    call = f"lookup(team, n, {rows}, {length}, {_base(x)}, {rows_x}, {to}, {rows_out}, {constant});"
    emitter.step(f"{fill}\n{call}", [x], [out], node, leaf.kernel)


def emit_binary(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    a, b = _alike(emitter, node)
    out, (of_a, of_b, of_out), rows, length = _rows(emitter, node, [a, b], ELEMENTS[leaf.output.limits["dtype"]])
    function = "Add" if leaf.row.__name__ == "_add" else "Mul"
    affine = [f"Affine{{{number(float(q.scale))}, {int(q.zero_point)}}}" for q in leaf.inputs]
    fill = border_fill(out, int(leaf.output.zero_point) & 255)
    call = (
        f"binary<{function}>(team, n, {rows}, {length}, {_base(a)}, {of_a}, {affine[0]}, "
        f"{_base(b)}, {of_b}, {affine[1]}, {_base(out)}, {of_out}, f32::QuantizeTo{{{quantize_to(leaf.output)}}});"
    )
    emitter.step(f"{fill}\n{call}", [a, b], [out], node, function.lower())


def _alike(emitter: Emitter, node: fx.Node) -> list[View]:
    """What ``node`` reads, copied where need be: all images, or all in the natural order of one shape."""
    views = [emitter.view(n) for n in node.args if isinstance(n, fx.Node)]
    if all(v.channels_last for v in views):
        return views
    if len({v.sizes for v in views}) > 1 or any(v.channels_last and not v.contiguous for v in views):
        return [image_of(emitter, v, str(node)) for v in views]
    return [v if v.contiguous and v.batched else _dense(emitter, v, node) for v in views]


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


QUANTIZE = Operator(quantize_refusal, emit_quantize)
DEQUANTIZE = Operator(dequantize_refusal, emit_dequantize)
MAX_POOL = Operator(pool_refusal, emit_max_pool)
MEAN_POOL = Operator(pool_refusal, emit_mean_pool)
ADAPTIVE = Operator(pool_refusal, emit_adaptive)
TABLE = Operator(point_refusal, emit_table)
BINARY = Operator(point_refusal, emit_binary)
