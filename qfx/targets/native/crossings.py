"""Between floats and integers."""

from __future__ import annotations

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import is_constant
from qfx.targets.native.copies import dense_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import number
from qfx.targets.native.images import base, border_fill, image
from qfx.targets.native.program import ELEMENTS, pointer
from qfx.targets.reference import MatmulLeaf
from qfx.targets.x86_static import StaticLeaf


def quantize_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if not _per_tensor(node) or value(node.args[0]).dtype != torch.float32:  # type: ignore[arg-type]
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
    if len(x.sizes) == value(node).ndim == 4 and x.batched and _is_image(emitter, node):
        if not x.contiguous:
            x = dense_of(emitter, x, str(node))
        emitter.program.headers.add("quantize.h")
        out = emitter.image(node, ELEMENTS[dtype])
        fill = border_fill(out, int(zero_point) & 255)
        call = f"quantize_planes(team, {pointer(x.buffer)}, {base(out)}, n, {image(out)}, {to});"
        emitter.step(f"{fill}\n{call}", [x], [out], node, "quantize")
        return
    if not x.contiguous:
        x = dense_of(emitter, x, str(node))
    out = emitter.tensor(node, ELEMENTS[dtype])
    emitter.program.headers.add("elementwise.h")
    call = f"f32::quantize(team, {pointer(x.buffer)}, {pointer(out.buffer)}, {to}, n * {x.buffer.size});"
    emitter.step(call, [x], [out], node, "quantize")


def _is_image(emitter: Emitter, node: fx.Node) -> bool:
    """True where a reader of four dimensions takes the second for channels."""
    leaves = [emitter.module(user) for user in node.users if user.op == "call_module"]
    layers = [leaf for leaf in leaves if not isinstance(leaf, MatmulLeaf)]
    return any(not isinstance(leaf, StaticLeaf) or len(leaf.weight_shape) == 4 for leaf in layers)


def emit_dequantize(emitter: Emitter, node: fx.Node) -> None:
    scale, zero_point = (emitter.parameter(n) for n in node.args[1:3])
    x = emitter.view(node.args[0])
    if not x.contiguous:
        x = dense_of(emitter, x, str(node))
    out = emitter.tensor(node, "float")
    emitter.program.headers.add("elementwise.h")
    affine = f"{number(float(scale))}, {int(zero_point)}"
    call = f"f32::dequantize(team, {pointer(x.buffer)}, {pointer(out.buffer)}, {affine}, n * {x.buffer.size});"
    emitter.step(call, [x], [out], node, "dequantize")


def dequantize_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if not _per_tensor(node) or value(node.args[0]).dtype not in (torch.uint8, torch.int8):  # type: ignore[arg-type]
        return "natively, one constant scale dequantizes bytes"
    return None if node.args[5] == torch.float32 else "natively, float32 alone is dequantized to"


def _per_tensor(node: fx.Node) -> bool:
    """True for one scale that is constant."""
    scale = node.args[1]
    return node.args[3] is None and isinstance(scale, fx.Node) and is_constant(scale)


QUANTIZE = Operator(quantize_refusal, emit_quantize, by_row=True)
DEQUANTIZE = Operator(dequantize_refusal, emit_dequantize, by_row=True)
