"""qfx's operators, ``torch.ops.qfx.*``: what stands in a CONVERTED graph.

Plain tensors in and out: ``torch.uint8``, ``torch.int8``, ``torch.int32``. Meaning and shapes of ``axis``,
``group_size``, ``scale`` and ``zero_point`` are those of :mod:`qfx.affine`. On the CPU the C++ loops of
:mod:`qfx.kernels` run them; other devices run the ATen formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx import affine, kernels

_LIBRARY = torch.library.Library("qfx", "DEF")

_SCHEMAS = (
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int? group_size, int quant_min, int quant_max,"
    " ScalarType dtype, *, bool channels_last=False) -> Tensor",
    "dequantize(Tensor q, Tensor scale, Tensor zero_point, int? axis, int? group_size, ScalarType dtype) -> Tensor",
    "choose_qparams(Tensor x, int? axis, int? group_size, bool symmetric, int quant_min, int quant_max)"
    " -> (Tensor, Tensor)",
    "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int? axis, int? group_size, int quant_min,"
    " int quant_max) -> (Tensor, Tensor)",
    "unpack(Tensor packed, int bits, bool signed, int length) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)


# --- storage of narrow integers: several per byte, lowest bits first, along the last axis ---------------------------


def storage_bits(bits: int) -> int:
    """Bits that one element takes in storage: 2 for 2, 4 for 3 and 4, 8 for 5 to 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 or uint8 integers of ``bits`` along the last axis into uint8, ``[..., ceil(K * storage_bits / 8)]``.

    Integers of 5 to 8 bits fill a byte and are returned as they are.
    """
    width = storage_bits(bits)
    if width == 8:
        return q
    per_byte = 8 // width
    low = q.view(torch.uint8) & ((1 << width) - 1)
    low = torch.nn.functional.pad(low, (0, -low.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=q.device)
    packed: Tensor = (low << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, signed: bool, length: int) -> Tensor:
    """The inverse of :func:`pack`: int8 (signed) or uint8 of ``[..., length]``."""
    width = storage_bits(bits)
    if signed:  # up against the sign bit, then arithmetically down again
        bytes_ = packed.view(torch.int8)
        fields = [(bytes_ << (8 - width - low)) >> (8 - width) for low in range(0, 8, width)]
    else:
        fields = [(packed >> low) & ((1 << width) - 1) for low in range(0, 8, width)]
    return torch.stack(fields, -1).flatten(-2)[..., :length].contiguous()


# --- implementations ------------------------------------------------------------------------------------------------


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    return affine.quantize(
        x, scale, zero_point, axis=axis, group_size=group_size, quant_min=quant_min, quant_max=quant_max, dtype=dtype
    )


def _dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    return affine.dequantize(q, scale, zero_point, axis=axis, group_size=group_size, dtype=dtype)


def _choose_qparams(
    x: Tensor, axis: int | None, group_size: int | None, symmetric: bool, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    low, high = affine.min_max(x.detach(), axis, group_size)
    low, high = low.contiguous(), high.contiguous()  # the layout that is promised without data
    return affine.choose_qparams(low, high, symmetric=symmetric, quant_min=quant_min, quant_max=quant_max)


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:
    return affine.fake_quantize(
        x, scale, zero_point, axis=axis, group_size=group_size, quant_min=quant_min, quant_max=quant_max
    )


def _kernel_dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    return kernels.dequantize(q, scale, zero_point, axis, group_size).to(dtype)


for _name, _cpu, _any in (
    ("quantize", kernels.quantize, _quantize),
    ("dequantize", _kernel_dequantize, _dequantize),
    ("choose_qparams", _choose_qparams, _choose_qparams),
    ("fake_quantize", kernels.fake_quantize, _fake_quantize),
    ("unpack", unpack, unpack),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _any, "CUDA")


# --- shapes without data ----------------------------------------------------------------------------------------------


def _shape_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: Any,
    group_size: Any,
    low: int,
    high: int,
    dtype: torch.dtype,
    channels_last: bool = False,
) -> Tensor:
    layout = torch.channels_last if channels_last and x.ndim == 4 else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def _shape_dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: Any, group_size: Any, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(q, dtype=dtype)


def _shape_choose_qparams(
    x: Tensor, axis: Any, group_size: Any, symmetric: bool, low: int, high: int
) -> tuple[Tensor, Tensor]:
    shape = affine.scale_shape(x, axis, group_size)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def _shape_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: Any, group_size: Any, low: int, high: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _shape_unpack(packed: Tensor, bits: int, signed: bool, length: int) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], length], dtype=torch.int8 if signed else torch.uint8)


for _name, _shape in (
    ("quantize", _shape_quantize),
    ("dequantize", _shape_dequantize),
    ("choose_qparams", _shape_choose_qparams),
    ("fake_quantize", _shape_fake_quantize),
    ("unpack", _shape_unpack),
):
    torch.library.register_fake(f"qfx::{_name}", _shape, lib=_LIBRARY)


# --- the straight-through estimator -----------------------------------------------------------------------------------


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _straight_through(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return grad * mask, None, None, None, None, None, None


torch.library.register_autograd("qfx::fake_quantize", _straight_through, setup_context=_save_mask, lib=_LIBRARY)
for _name in ("quantize", "dequantize", "choose_qparams", "unpack"):  # results without gradient, and no warning
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")

quantize = torch.ops.qfx.quantize.default
dequantize = torch.ops.qfx.dequantize.default
choose_qparams = torch.ops.qfx.choose_qparams.default
fake_quantize = torch.ops.qfx.fake_quantize.default
unpack_op = torch.ops.qfx.unpack.default
