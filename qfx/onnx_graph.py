"""A CONVERTED graph in the shape that ONNX engines know: what they fuse into integer kernels, and no packed integers.

Before::

    %q = qfx.unpack(@fc.weight_packed, 4, True, 64)
    %w = qfx.dequantize(%q, @fc_weight_scale, @fc_weight_zero_point, 0, None)
    %y = linear(%x, %w, %bias)
    %y_quantize = qfx.quantize(%y, ..., 0, 15, u8)

After::

    %w = qfx.dequantize(@fc.weight, @fc.weight_scale, @fc.weight_zero_point, 1, None)      # i8[in, out]
    %y = addmm(%bias, %x, %w)
    %y_quantize = qfx.quantize(%y, ..., 0, 255, u8)
    %y_quantize_clamp = clamp(%y_quantize, 0, 15)

Weights of linear layers are stored ``[in, out]``: a Transpose between DequantizeLinear and MatMul keeps engines from
seeing the pair. Zero points have the integers' own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from qfx import affine
from qfx.attributes import free_path
from qfx.integer_constants import IntegerConstant, integer_constants, store, to_float
from qfx.meta import value
from qfx.operators import is_constant, name_of
from qfx.ops import dequantize, quantize
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, replace_all

aten = torch.ops.aten


class Clip(Enum):
    """Where integers of fewer bits than their type has are clipped: behind QuantizeLinear, or in float before it."""

    INTEGERS = "integers"
    REALS = "reals"


class Int4(Enum):
    """Which weights of 2 to 4 bits are 4-bit initializers; the others are int8.

    Engines that multiply integers multiply 8-bit ones, so that 4 bits beside integer data cost them their kernel.
    """

    ALWAYS = "always"
    WEIGHT_ONLY = "weight only"
    GROUPS = "groups"


@dataclass(frozen=True)
class Form:
    """What an engine wants to read: a float bias or int32, 4-bit initializers or int8, where few bits are clipped."""

    float_bias: bool = False
    int4: Int4 = Int4.ALWAYS
    clip: Clip = Clip.INTEGERS


DEFAULT_FORM = Form()


def to_onnx_form(gm: fx.GraphModule, form: Form) -> dict[str, bool]:
    """Rewrite ``gm`` in place; returns the paths of buffers that 4 bits hold, each with True where it is signed."""
    narrow: dict[str, bool] = {}
    for found in integer_constants(gm):
        if found.is_bias:
            if form.float_bias:
                to_float(gm, found)
            continue
        as_int4 = found.bits <= 4 and _as_int4(found, form.int4)
        linears = _linears(found.node) if found.integers.ndim == 2 else ()
        node = store(gm, _laid_out(found, transposed=bool(linears)))
        for linear in linears:
            _to_product(gm, linear, node)
        if as_int4:
            narrow[_path(node.args[0])] = found.integers.dtype == torch.int8
    for node in [n for n in gm.graph.nodes if n.target is quantize]:
        _fill_type(gm, node, form.clip)
    _cast_zero_points(gm)
    return narrow


def _path(node: Any) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)


# --- constants --------------------------------------------------------------------------------------------------------


def _as_int4(found: IntegerConstant, wanted: Int4) -> bool:
    if wanted is Int4.ALWAYS or found.group_size is not None:
        return True
    return wanted is Int4.WEIGHT_ONLY and not any(reads_integers(user) for user in found.node.users)


def reads_integers(reader: fx.Node) -> bool:
    """True where the layer ``reader`` gets its data as integers."""
    data = reader.args[0]
    return isinstance(data, fx.Node) and data.target is dequantize and not is_constant(data)


def _laid_out(found: IntegerConstant, *, transposed: bool) -> IntegerConstant:
    """The constant as ``[in, out]`` where it is ``transposed``."""
    if not transposed:
        return found
    scale, zero_point = (p.t().contiguous() if p.ndim == 2 else p for p in (found.scale, found.zero_point))
    axis = None if found.axis is None else 1 - found.axis
    return replace(found, integers=found.integers.t().contiguous(), scale=scale, zero_point=zero_point, axis=axis)


def _linears(node: fx.Node) -> tuple[fx.Node, ...]:
    """The linear layers that read ``node`` as their weight, where nobody else reads it."""
    users = tuple(node.users)
    return users if all(name_of(u) == "linear" and u.args[1] is node and u.args[0] is not node for u in users) else ()


def _to_product(gm: fx.GraphModule, linear: fx.Node, weight: fx.Node) -> None:
    """``linear(x, w, b)`` as a product with the transposed ``weight``: one operator for matrices, else two."""
    x = linear.args[0]
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    assert isinstance(x, fx.Node)
    with gm.graph.inserting_before(linear):
        if isinstance(bias, fx.Node) and value(x).ndim == 2:
            new = insert_call(gm, aten.addmm.default, bias, x, weight, like=linear, name=f"{linear.name}_addmm")
        else:
            new = insert_call(gm, aten.matmul.default, x, weight, like=linear, name=f"{linear.name}_matmul")
            if isinstance(bias, fx.Node):
                new = insert_call(gm, aten.add.Tensor, new, bias, like=linear, name=f"{linear.name}_bias")
    replace_all(linear, new)
    erase_dead(gm, linear)


# --- activations ------------------------------------------------------------------------------------------------------


def _fill_type(gm: fx.GraphModule, node: fx.Node, clip: Clip) -> None:
    """Let ``node`` quantize to the whole of its dtype, with a clamp where its own range is narrower."""
    x, scale, zero_point, axis, _, low, high, dtype = node.args
    known = torch.iinfo(dtype)  # type: ignore[arg-type]
    if (low, high) == (known.min, known.max):
        return
    node.args = (*node.args[:5], known.min, known.max, dtype)
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    if clip is Clip.REALS and axis is None and is_constant(scale) and is_constant(zero_point):
        bounds = torch.tensor([low, high], dtype=torch.int32)
        reals = affine.dequantize(bounds, evaluate(gm, scale), evaluate(gm, zero_point))
        with gm.graph.inserting_before(node):
            clamp = insert_call(gm, aten.clamp.default, x, *reals.tolist(), like=node, name=f"{node.name}_clamp")
        node.replace_input_with(x, clamp)
        return
    with gm.graph.inserting_after(node):
        clamp = insert_call(gm, aten.clamp.default, node, low, high, like=node, name=f"{node.name}_clamp")
    replace_all(node, clamp)


def _cast_zero_points(gm: fx.GraphModule) -> None:
    """Constant zero points of activations in the dtype of their integers."""
    for node in [n for n in gm.graph.nodes if n.target in (quantize, dequantize)]:
        old = node.args[2]
        dtype = value(node).dtype if node.target is quantize else value(node.args[0]).dtype
        if old.op != "get_attr" or dtype == torch.int32:
            continue
        tensor: Tensor = evaluate(gm, old)
        if tensor.dtype == dtype:
            continue
        with gm.graph.inserting_before(node):
            new = insert_buffer(gm, free_path(gm, str(old.target)), tensor.to(dtype), like=node)
        node.replace_input_with(old, new)
        erase_dead(gm, old)
