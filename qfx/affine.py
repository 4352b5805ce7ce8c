"""Affine quantization as pure tensor maths: no graph, no module, any device.

All functions share one meaning of ``(axis, group_size)``, with ``scale`` and ``zero_point`` of the shape given:

====================  =============================  ==========================================
``axis, group_size``  granularity                    shape of scale
====================  =============================  ==========================================
``None, None``        per tensor                     ``[]``
``a, None``           per axis                       ``[x.shape[a]]``
``a, g``              per group of g along a         ``x.shape`` with axis a replaced by ceil(K / g)
``a, -1``             per token (whole axis)         ``x.shape`` with axis a replaced by 1
====================  =============================  ==========================================

``q = clamp(round_half_even(x * (1 / scale)) + zero_point, quant_min, quant_max)``, computed in float32, as torch's own
fake-quantize does; ``x' = (q - zero_point) * scale``. Method: Jacob et al., 2018 (arXiv:1712.05877), equation 1.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

MIN_SCALE = 2.0**-60
"""Smallest scale: far below any range of real data, and the product of two of them is still a normal float32."""


def expand_qparam(p: Tensor, x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """``p`` of the shape in the table above, viewed or repeated so that it broadcasts against ``x``."""
    if axis is None or p.ndim == 0:
        return p
    axis = axis % x.ndim
    if group_size is None:
        shape = [1] * x.ndim
        shape[axis] = -1
        return p.reshape(shape)
    if group_size == -1:
        return p
    return p.repeat_interleave(group_size, dim=axis).narrow(axis, 0, x.shape[axis])


def scale_shape(x: Tensor, axis: int | None, group_size: int | None) -> list[int]:
    """The shape of scale and zero point for ``x``, as in the table above; sizes may be symbolic."""
    if axis is None:
        return []
    axis = axis % x.ndim
    if group_size is None:
        return [x.shape[axis]]
    shape = list(x.shape)
    shape[axis] = 1 if group_size == -1 else -(-shape[axis] // group_size)
    return shape


def min_max(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of ``x``, each of the scale's shape, in memory of their own; zeros where ``x`` is empty."""
    if x.numel() == 0:
        zeros = x.new_zeros(scale_shape(x, axis, group_size))
        return zeros, zeros.clone()
    if axis is None:
        low, high = torch.aminmax(x)
        return low, high
    axis = axis % x.ndim
    if group_size is None:
        if x.ndim == 1:
            return x.clone(), x.clone()
        flat = x.movedim(axis, 0).flatten(1)
        return flat.amin(1), flat.amax(1)
    if group_size == -1:
        return x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    rows = x.movedim(axis, -1)
    missing = -rows.shape[-1] % group_size
    if missing:  # the ragged last group: repeat its last element, which changes neither extreme
        rows = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], missing)], dim=-1)
    grouped = rows.unflatten(-1, (-1, group_size))
    return grouped.amin(-1).movedim(-1, axis), grouped.amax(-1).movedim(-1, axis)


def choose_qparams(
    low: Tensor,
    high: Tensor,
    *,
    symmetric: bool,
    quant_min: int,
    quant_max: int,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) for the range ``[low, high]``, elementwise; zero is exactly representable.

    Symmetric: ``scale = max(|low|, |high|) / ((quant_max - quant_min) / 2)`` with the zero point in the middle
    (0 for signed, 128 for unsigned 8 bits). Affine: the range is widened to hold zero. Scales are at least
    :data:`MIN_SCALE`, so that constant, all-zero and tiny ranges stay finite, and values of ``scale_dtype``
    (:func:`representable_scale`); zero points belong to the scales that are returned.
    """
    low = low.float().clamp(max=0.0)
    high = high.float().clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / (float(quant_max - quant_min) / 2)
        scale = representable_scale(scale.clamp(min=MIN_SCALE), scale_dtype)
        return scale, torch.full_like(scale, (quant_min + quant_max + 1) // 2, dtype=torch.int32)
    # Halves, which are exact, because high - low may leave float32.
    scale = ((high / 2 - low / 2) / (float(quant_max - quant_min) / 2)).clamp(min=MIN_SCALE)
    scale = representable_scale(scale, scale_dtype)
    zero_point = quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def representable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The least values that ``dtype`` holds and that are no less than ``scale`` (positive), in scale's own dtype.

    Upwards, so that no range is cut: an extreme stays within half a step of its integer. Below ``dtype``'s normal
    numbers come its subnormal ones, the smallest of which (2^-24 for float16) is the least scale; above its largest
    there is nothing, and scales end there.
    """
    if dtype == scale.dtype:
        return scale
    info = torch.finfo(dtype)
    # Arithmetic, all of it exact, and no cast there and back, which a compiler may take for nothing.
    scale = scale.clamp(max=info.max)
    power = scale / torch.frexp(scale).mantissa
    spacing = (power * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps)
    return torch.ceil(scale / spacing) * spacing


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    """Integers of ``dtype`` (uint8, int8 or int32), same shape as ``x``. NaN becomes the zero point."""
    inverse = expand_qparam(1.0 / scale, x, axis, group_size)
    offset = expand_qparam(zero_point, x, axis, group_size).to(torch.float32)
    q = torch.round(x.float() * inverse).nan_to_num(nan=0.0) + offset
    if dtype is torch.int32:
        q = q.double()  # float32 rounds the largest int32 up, out of its range
    return q.clamp(quant_min, quant_max).to(dtype)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(q - zero_point) * scale`` as ``dtype``, same shape as ``q``; the difference is exact."""
    offset = expand_qparam(zero_point, q, axis, group_size)
    difference = q.to(torch.int32) - offset
    return (difference.to(torch.float32) * expand_qparam(scale, q, axis, group_size)).to(dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: int,
    quant_max: int,
    clamp_min: float | None = None,
    clamp_max: float | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dequantize(quantize(clamp(x)))`` in x's dtype, and the mask (bool) of the elements that pass a gradient on.

    ``clamp_min`` and ``clamp_max`` stand for an activation in front: (0, None) is relu, (0, 6) is relu6, None is no
    bound. The mask, which multiplies the gradient, is True where both hold:

    - the clamp passes: ``x > clamp_min`` and ``x < clamp_max``, so that an element on a bound gets nothing, as from
      torch's relu, relu6 and hardtanh (torch.clamp differs there: it lets the bounds themselves pass);
    - the integer is representable before it is clamped: ``quant_min <= round(x / scale) + zero_point <= quant_max``,
      as in torch's fake-quantize operators. The range therefore reaches half a step beyond its outer levels; on that
      very border the tie goes to the even integer, and passes if that one is inside. With ``straight_through`` this
      condition is dropped.

    NaN becomes the zero point, hence 0.0, and passes. Method: Jacob et al., 2018, section 3; the straight-through
    estimator is that of Bengio et al., 2013 (arXiv:1308.3432).
    """
    inverse = expand_qparam(1.0 / scale, x, axis, group_size)
    offset = expand_qparam(zero_point, x, axis, group_size).to(torch.float32)
    clamped, conditions = _clamp(x.float(), clamp_min, clamp_max)
    q = torch.round(clamped * inverse).nan_to_num(nan=0.0) + offset
    if not straight_through:
        conditions += [q >= quant_min, q <= quant_max]
    passes = reduce(torch.logical_and, conditions) if conditions else torch.ones_like(x, dtype=torch.bool)
    value = (q.clamp(quant_min, quant_max) - offset) * expand_qparam(scale, x, axis, group_size)
    return value.to(x.dtype), passes


def fake_quantize_backward(grad: Tensor, mask: Tensor) -> Tensor:
    """The gradient of :func:`fake_quantize` in x: ``grad * mask``, in grad's dtype and the mask's memory format."""
    return mask * grad


def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: int,
    quant_max: int,
    gradient_scale: float,
    clamp_min: float | None = None,
    clamp_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`fake_quantize` in ``x`` and in ``scale`` when the step size is learned.

    The first, of x's shape and dtype, is ``grad`` where the mask of :func:`fake_quantize` is True. The second, of
    scale's shape and dtype, is ``gradient_scale`` times the sum over the elements of each scale of ``grad * d`` with
    ``v = clamp(x) / scale``, ``q = round(v) + zero_point`` and

    - ``d = round(v) - v`` where ``quant_min <= q <= quant_max`` (the same borders as the mask's; 0 for NaN),
    - ``d = quant_min - zero_point`` below and ``d = quant_max - zero_point`` above.

    Products are float32, sums float64. The zero point is a constant. Method: LSQ, Esser et al., 2020
    (arXiv:1902.08153), equation 3, with the offset of LSQ+, Bhalgat et al., 2020 (arXiv:2004.09576); LSQ's own range
    ends at the outer levels and not half a step beyond.
    """
    inverse = expand_qparam(1.0 / scale, x, axis, group_size)
    offset = expand_qparam(zero_point, x, axis, group_size).to(torch.float32)
    clamped, conditions = _clamp(x.float(), clamp_min, clamp_max)
    v = (clamped * inverse).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    rounded = torch.round(v)
    q = rounded + offset
    inside = (q >= quant_min) & (q <= quant_max)
    slope = torch.where(inside, rounded - v, q.clamp(quant_min, quant_max) - offset)
    sums = _sum_like_qparam(grad.float() * slope, scale, axis, group_size)
    passes = reduce(torch.logical_and, conditions, inside)
    return passes * grad, scale.new_empty(scale.shape).copy_(sums * gradient_scale)


def _clamp(x: Tensor, low: float | None, high: float | None) -> tuple[Tensor, list[Tensor]]:
    """``x`` clamped, and the conditions (bool) under which the gradient passes; NaN stays and passes."""
    conditions = []
    if low is not None:
        conditions.append(~(x <= low))
    if high is not None:
        conditions.append(~(x >= high))
    return (x.clamp(low, high) if conditions else x), conditions


def _sum_like_qparam(terms: Tensor, p: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Sums (float64) of ``terms`` over the elements that each value of ``p`` serves, of p's shape."""
    if axis is None or p.numel() == 1:
        return terms.sum(dtype=torch.float64).reshape(p.shape)
    axis = axis % terms.ndim
    if group_size is None:
        return terms.unsqueeze(-1).movedim(axis, 0).flatten(1).sum(1, dtype=torch.float64).reshape(p.shape)
    if group_size == -1:
        return terms.sum(axis, keepdim=True, dtype=torch.float64)
    rows = terms.movedim(axis, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % group_size))
    sums: Tensor = rows.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.float64)
    return sums.movedim(-1, axis)
