"""qfx's operators, ``torch.ops.qfx.*``: what stands in a CONVERTED graph.

Plain tensors in and out: ``torch.uint8``, ``torch.int8``, ``torch.int32``. Meaning and shapes of ``axis``,
``group_size``, ``scale`` and ``zero_point`` are those of :mod:`qfx.affine`. On the CPU the C++ loops of
:mod:`qfx.kernels` run them; other devices run the ATen formulas.
"""

from __future__ import annotations

from collections.abc import Callable
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
    " int quant_max, *, float? clamp_min=None, float? clamp_max=None, bool straight_through=False)"
    " -> (Tensor, Tensor)",
    "fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor",
    "fake_quantize_learned(Tensor x, Tensor scale, Tensor zero_point, int? axis, int? group_size, int quant_min,"
    " int quant_max, float gradient_scale, *, float? clamp_min=None, float? clamp_max=None) -> Tensor",
    "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int? axis, int? group_size,"
    " int quant_min, int quant_max, float gradient_scale, *, float? clamp_min=None, float? clamp_max=None)"
    " -> (Tensor, Tensor)",
    "min_max(Tensor x) -> (Tensor, Tensor)",
    "unpack(Tensor packed, int bits, bool signed, int length) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)


# --- storage of narrow integers: without gaps, lowest bits first, along the last axis --------------------------------


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 or uint8 integers of ``bits`` along the last axis into uint8, ``[..., ceil(K * bits / 8)]``.

    Eight elements make ``bits`` bytes: element i lies in bits ``i * bits`` to ``(i + 1) * bits - 1`` of a row, counted
    from the lowest of its first byte. Integers of 8 bits are returned as they are.
    """
    if bits == 8:
        return q
    size = -(-q.shape[-1] * bits // 8)
    low = q.view(torch.uint8) & ((1 << bits) - 1)
    fields = torch.nn.functional.pad(low, (0, -q.shape[-1] % 8)).unflatten(-1, (-1, 8))
    eights = sum(fields[..., i].long() << bits * i for i in range(8))
    assert isinstance(eights, Tensor)
    stored = torch.stack([(eights >> 8 * i).to(torch.uint8) for i in range(bits)], -1)
    return stored.flatten(-2)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, signed: bool, length: int) -> Tensor:
    """The inverse of :func:`pack`: int8 (signed) or uint8 of ``[..., length]``."""
    if bits == 8:
        return packed
    stored = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    eights = sum(stored[..., i].long() << 8 * i for i in range(bits))
    assert isinstance(eights, Tensor)
    fields = torch.stack([(eights >> bits * i).to(torch.uint8) for i in range(8)], -1) << 8 - bits
    if signed:  # up against the sign bit, then arithmetically down again
        fields = fields.view(torch.int8)
    return (fields >> 8 - bits).flatten(-2)[..., :length].contiguous()


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


def _kernel_dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    return kernels.dequantize(q, scale, zero_point, axis, group_size).to(dtype)


for _name, _cpu, _any in (
    ("quantize", kernels.quantize, _quantize),
    ("dequantize", _kernel_dequantize, _dequantize),
    ("choose_qparams", _choose_qparams, _choose_qparams),
    ("fake_quantize", kernels.fake_quantize, kernels.fake_quantize),
    ("fake_quantize_backward", kernels.fake_quantize_backward, kernels.fake_quantize_backward),
    ("fake_quantize_learned", kernels.fake_quantize_learned, kernels.fake_quantize_learned),
    ("fake_quantize_learned_backward", kernels.fake_quantize_learned_backward, kernels.fake_quantize_learned_backward),
    ("min_max", kernels.min_max, kernels.min_max),
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


def _shape_fake_quantize(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _shape_fake_quantize_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=grad.dtype)


def _shape_fake_quantize_learned(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _shape_fake_quantize_learned_backward(
    grad: Tensor, x: Tensor, scale: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=grad.dtype), scale.new_empty(scale.shape)


def _shape_min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(())


def _shape_unpack(packed: Tensor, bits: int, signed: bool, length: int) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], length], dtype=torch.int8 if signed else torch.uint8)


for _name, _shape in (
    ("quantize", _shape_quantize),
    ("dequantize", _shape_dequantize),
    ("choose_qparams", _shape_choose_qparams),
    ("fake_quantize", _shape_fake_quantize),
    ("fake_quantize_backward", _shape_fake_quantize_backward),
    ("fake_quantize_learned", _shape_fake_quantize_learned),
    ("fake_quantize_learned_backward", _shape_fake_quantize_learned_backward),
    ("min_max", _shape_min_max),
    ("unpack", _shape_unpack),
):
    torch.library.register_fake(f"qfx::{_name}", _shape, lib=_LIBRARY)


# --- gradients --------------------------------------------------------------------------------------------------------
#
# Written as kernels at the Autograd key around torch.autograd.Function: half the cost of a call under
# torch.library.register_autograd, and seen by Dynamo, AOTAutograd and export in the same way.


def _plain(*tensors: Tensor) -> bool:
    """True where the loops may be called without a further dispatch: no mode and no subclass wants to see the call."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.is_cpu:
            return False
    return torch._C._len_torch_dispatch_stack() == 0


def _below_autograd(op: Any, kernel: Callable[..., Any], tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
    if _plain(*tensors):
        return kernel(*tensors, *args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*tensors, *args, **kwargs)


class _FakeQuantize(torch.autograd.Function):
    """The straight-through estimator: the mask is all that backward needs, and nothing where all of it is True."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        y, mask = _below_autograd(fake_quantize, kernels.fake_quantize, (x, scale, zero_point), *args, **kwargs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mask)
        clamps = kwargs.get("clamp_min") is not None or kwargs.get("clamp_max") is not None
        ctx.masked = clamps or not kwargs.get("straight_through", False)
        if ctx.masked:
            ctx.save_for_backward(mask)
        return y, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is not None and ctx.masked:
            grad = _autograd_fake_quantize_backward(grad, *ctx.saved_tensors)
        return grad, None, None, None, None


class _FakeQuantizeBackward(torch.autograd.Function):
    """Linear in the gradient: the second derivative is the same mask again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        out: Tensor = _below_autograd(fake_quantize_backward, kernels.fake_quantize_backward, (grad, mask))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _autograd_fake_quantize_backward(grad, *ctx.saved_tensors), None


class _FakeQuantizeLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        tensors = (x, scale, zero_point)
        ctx.save_for_backward(*tensors)
        ctx.args, ctx.kwargs = args, kwargs
        y: Tensor = _below_autograd(fake_quantize_learned, kernels.fake_quantize_learned, tensors, *args, **kwargs)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op, kernel = fake_quantize_learned_backward, kernels.fake_quantize_learned_backward
        grads = _below_autograd(op, kernel, (grad, *ctx.saved_tensors), *ctx.args, **ctx.kwargs)
        return *grads, None, None, None


def _autograd_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any, **kwargs: Any) -> Any:
    if x.requires_grad and torch.is_grad_enabled():
        return _FakeQuantize.apply(x, scale, zero_point, args, kwargs)  # type: ignore[no-untyped-call]
    return _below_autograd(fake_quantize, kernels.fake_quantize, (x, scale, zero_point), *args, **kwargs)


def _autograd_fake_quantize_backward(grad: Tensor, mask: Tensor) -> Any:
    if grad.requires_grad and torch.is_grad_enabled():
        return _FakeQuantizeBackward.apply(grad, mask)  # type: ignore[no-untyped-call]
    return _below_autograd(fake_quantize_backward, kernels.fake_quantize_backward, (grad, mask))


def _autograd_fake_quantize_learned(x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any, **kwargs: Any) -> Any:
    tensors = (x, scale, zero_point)
    if (x.requires_grad or scale.requires_grad) and torch.is_grad_enabled():
        return _FakeQuantizeLearned.apply(*tensors, args, kwargs)  # type: ignore[no-untyped-call]
    return _below_autograd(fake_quantize_learned, kernels.fake_quantize_learned, tensors, *args, **kwargs)


for _name, _autograd in (
    ("fake_quantize", _autograd_fake_quantize),
    ("fake_quantize_backward", _autograd_fake_quantize_backward),
    ("fake_quantize_learned", _autograd_fake_quantize_learned),
):
    _LIBRARY.impl(_name, _autograd, "Autograd")
# Results without gradient, and no warning.
for _name in ("quantize", "dequantize", "choose_qparams", "unpack", "min_max", "fake_quantize_learned_backward"):
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")

quantize = torch.ops.qfx.quantize.default
dequantize = torch.ops.qfx.dequantize.default
choose_qparams = torch.ops.qfx.choose_qparams.default
fake_quantize = torch.ops.qfx.fake_quantize.default
fake_quantize_backward = torch.ops.qfx.fake_quantize_backward.default
fake_quantize_learned = torch.ops.qfx.fake_quantize_learned.default
fake_quantize_learned_backward = torch.ops.qfx.fake_quantize_learned_backward.default
min_max = torch.ops.qfx.min_max.default
unpack_op = torch.ops.qfx.unpack.default
