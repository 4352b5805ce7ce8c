"""Integer loops over torch tensors: quantize, dequantize, lookup, add, mul, pooling, fake-quantize and its gradients.

Every function has two implementations with bit-identical results (but for the sums of a learned step size, whose terms
are added in another order): a C++ loop (``qfx/csrc``, compiled by :mod:`qfx.jit`; :data:`LOOPS`) and a twin in ATen
(:data:`ATEN`). The loop runs where there is a compiler and the tensors are ordinary CPU tensors of the element types
named in the function's docstring; all else (other devices and dtypes, fake tensors, other subclasses) takes the twin.
:func:`backend` says which of the two this machine has.

Common to all functions:

- ``scale`` is float32, ``zero_point`` int32; integers are uint8 or int8. ``axis`` and ``group_size`` as in
  :mod:`qfx.affine`. Results are detached: gradients are the business of :mod:`qfx.ops`.
- Rounding is half to even, huge values saturate, NaN becomes the zero point (clamped to the range).
- The memory format is kept: contiguous stays contiguous, channels-last stays channels-last, and elementwise functions
  keep any dense permutation of the dimensions. Input with gaps or overlap is copied first.
- ``ConfigError`` is raised for a range that does not fit the dtype, and for scales of a shape that does not fit.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfx import affine, jit
from qfx.errors import ConfigError

_CSRC = Path(__file__).parent / "csrc"
_UNITS, _HEADERS = "affine.cpp elementwise.cpp pool.cpp", "numerics.h parallel.h pointwise.h pooling.h"
SOURCES = tuple(_CSRC / name for name in f"{_UNITS} {_HEADERS}".split())

# The C signature of each loop, one letter an argument.
_C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double, "i": ctypes.c_int}
LOOPS = {
    "quantize": "pppp lllll ff ii",
    "quantize_interleaved": "pppp lll ff ii",
    "dequantize": "pppp lllll ii",
    "fake_quantize": "ppppp lllll ffff i i",
    "fake_quantize_backward": "ppp l i",
    "fake_quantize_learned_backward": "pppppp lllll ffff d i",
    "min_max": "ppp l i",
    "quantize_per_token": "ppp ll ff iff ii",
    "lookup": "ppp l ii",
    "binary": "ppp ppp ppp l ffff iiii i",
    "max_pool": "pp llll pll pll iii",
    "mean_pool": "pppppp llll pl pl i ff iii i",
}
"""The C++ loops: name (``qfx_`` before it in the library) -> signature."""

_KIND = {torch.uint8: 0, torch.int8: 1, torch.float32: 2}
_INTEGERS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
_PLAIN = (Tensor, torch.nn.Parameter)
_MOST_INTERLEAVED = 4  # channels that qfx_quantize_interleaved takes
MOST_SUMMED = 2**23
"""So many 8-bit integers can be added in int32."""

IntOrInts = int | Sequence[int]


@functools.cache
def _backend() -> tuple[ctypes.CDLL | None, str]:
    """The compiled loops, or why there are none; found once, when first needed."""
    reason = jit.unavailable()
    library = jit.load(SOURCES) if reason is None else None
    if library is None:
        return None, f"aten: {reason}"
    for name, letters in LOOPS.items():
        loop = getattr(library, f"qfx_{name}")
        loop.argtypes = [_C_TYPES[letter] for letter in letters.replace(" ", "")]
        loop.restype = None
    return library, "c++"


def backend() -> str:
    """``"c++"``, or ``"aten: <why there are no C++ loops>"``.

    Raises:
        NativeError: there is a compiler, and it failed.
    """
    return _backend()[1]


def _loops(*tensors: Tensor) -> Any:
    """The library if all tensors are ordinary CPU tensors, else None."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return None
    return _backend()[0]


# --- layout in memory -------------------------------------------------------------------------------------------------

Order = tuple[int, ...] | None
"""The dimensions from outermost to innermost in memory; None is the natural order."""

_CHANNELS_LAST = {
    4: (torch.channels_last, (0, 2, 3, 1)),
    5: (torch.channels_last_3d, (0, 2, 3, 4, 1)),
}


def _dense(x: Tensor) -> tuple[Tensor, Order]:
    """``x`` where it is dense in memory, else a dense copy; and the order of its dimensions.

    The copy has the strides of ``torch.empty_like``, as the shape functions of :mod:`qfx.ops` promise.
    """
    if x.is_contiguous():
        return x, None
    if x.ndim in _CHANNELS_LAST:
        memory_format, order = _CHANNELS_LAST[x.ndim]
        if x.is_contiguous(memory_format=memory_format):
            return x, order
    strides = x.stride()
    order = tuple(sorted(range(x.ndim), key=lambda dim: -strides[dim]))
    if x.permute(order).is_contiguous():
        return x, order
    return _dense(torch.empty_like(x).copy_(x))


def _like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` with the strides that a loop gives its result for input ``x``."""
    return torch.empty_like(_dense(x)[0], dtype=value.dtype).copy_(value)


def _walk(
    x: Tensor, order: Order, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor, tuple[int, int, int, int, int]]:
    """Scale and zero point in x's order of dimensions, and ``n, row, group, rows, count`` of struct Walk."""
    if zero_point.numel() != scale.numel():
        scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    n, count = x.numel(), scale.numel()
    if count == 1 or axis is None:
        return scale, zero_point, (n, n, n, 0, 1)
    axis %= x.ndim
    if order is not None:
        if group_size is not None:
            scale, zero_point = scale.permute(order), zero_point.permute(order)
        sizes: Sequence[int] = [x.shape[dim] for dim in order]
        axis = order.index(axis)
    else:
        sizes = x.shape
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    size, inner = sizes[axis], math.prod(sizes[axis + 1 :])
    if group_size is None:
        walk = (n, size, 1, 1, count) if inner == 1 else (n, inner, inner, 0, count)
    else:
        group = size if group_size == -1 else group_size
        walk = (n, size, group, 0, count) if inner == 1 else (n, inner, group, size, count)
    return scale, zero_point, walk


def _check_qparams(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None) -> None:
    if axis is None:
        if scale.numel() == zero_point.numel() == 1:
            return
        expected: tuple[int, ...] = ()
    elif group_size is None:
        expected = (x.shape[axis],)
    else:
        sizes = list(x.shape)
        sizes[axis] = 1 if group_size == -1 else -(-sizes[axis] // group_size)
        expected = tuple(sizes)
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        # One value serves every granularity, and a vector may be shaped to broadcast; groups must have their shape.
        fits = value.shape == expected if group_size is not None else value.numel() == math.prod(expected)
        if not fits and value.numel() != 1:
            raise ConfigError(
                f"{name} of shape {list(value.shape)} does not fit a tensor of shape {list(x.shape)} quantized with "
                f"axis={axis}, group_size={group_size}: {list(expected)} is needed"
            )


def _check_range(quant_min: int, quant_max: int, dtype: torch.dtype) -> None:
    low, high = _INTEGERS.get(dtype) or (-(2**31), 2**31 - 1)
    if not low <= quant_min <= quant_max <= high:
        raise ConfigError(f"the range {quant_min} to {quant_max} does not fit {dtype}")


# --- quantize, dequantize, fake_quantize ------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
    channels_last: bool = False,
) -> Tensor:
    """Integers of ``dtype``, same shape as ``x``: ``clamp(round(x / scale) + zero_point, quant_min, quant_max)``.

    ``channels_last`` asks for that memory format, of 4 dimensions, whatever x's is. The loop takes float32 to uint8 or
    int8; other dtypes (int32 too) take the twin.
    """
    _check_range(quant_min, quant_max, dtype)
    _check_qparams(x, scale, zero_point, axis, group_size)
    loops = _loops(x, scale, zero_point)
    if channels_last and x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        plain = x.dtype is torch.float32 and dtype in _INTEGERS and x.is_contiguous() and _usual(scale, zero_point)
        if loops is None or not plain or axis is not None or x.shape[1] > _MOST_INTERLEAVED:
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            q = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
            pointers = (x.data_ptr(), q.data_ptr(), scale.data_ptr(), zero_point.data_ptr())
            tail = (quant_min, quant_max, _KIND[dtype], torch.get_num_threads())
            loops.qfx_quantize_interleaved(*pointers, x.shape[0], x.shape[1], x.shape[2] * x.shape[3], *tail)
            return q
    if loops is None or x.dtype is not torch.float32 or dtype not in _INTEGERS or not _usual(scale, zero_point):
        limits = {"quant_min": quant_min, "quant_max": quant_max}
        with torch.no_grad():
            return affine.quantize(x, scale, zero_point, axis=axis, group_size=group_size, **limits, dtype=dtype)
    x, order = _dense(x)
    q = torch.empty_like(x, dtype=dtype)
    if q.numel():
        scale, zero_point, walk = _walk(x, order, scale, zero_point, axis, group_size)
        pointers = (x.data_ptr(), q.data_ptr(), scale.data_ptr(), zero_point.data_ptr())
        loops.qfx_quantize(*pointers, *walk, quant_min, quant_max, _KIND[dtype], torch.get_num_threads())
    return q


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """``(q - zero_point) * scale`` in float32, same shape as ``q``.

    The loop takes uint8 and int8; other dtypes (int32) take the twin.
    """
    _check_qparams(q, scale, zero_point, axis, group_size)
    loops = _loops(q, scale, zero_point)
    if loops is None or q.dtype not in _INTEGERS or not _usual(scale, zero_point):
        with torch.no_grad():
            return affine.dequantize(q, scale, zero_point, axis=axis, group_size=group_size)
    q, order = _dense(q)
    x = torch.empty_like(q, dtype=torch.float32)
    if q.numel():
        scale, zero_point, walk = _walk(q, order, scale, zero_point, axis, group_size)
        pointers = (q.data_ptr(), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr())
        loops.qfx_dequantize(*pointers, *walk, _KIND[q.dtype], torch.get_num_threads())
    return x


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    quant_min: int = 0,
    quant_max: int = 255,
    *,
    clamp_min: float | None = None,
    clamp_max: float | None = None,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dequantize(quantize(clamp(x)))`` in x's dtype, and the mask (bool) of the elements that pass a gradient on.

    Bounds, mask and edges as :func:`qfx.affine.fake_quantize`. The loop takes float32, and half precision through it.
    """
    _check_qparams(x, scale, zero_point, axis, group_size)
    loops = _loops(x, scale, zero_point)
    if loops is None or x.dtype not in _THROUGH_FLOAT32 or not _usual(scale, zero_point):
        with torch.no_grad():
            return affine.fake_quantize(
                x,
                scale,
                zero_point,
                axis=axis,
                group_size=group_size,
                quant_min=quant_min,
                quant_max=quant_max,
                clamp_min=clamp_min,
                clamp_max=clamp_max,
                straight_through=straight_through,
            )
    real, order = _dense(_as(x, torch.float32))
    mask = torch.empty_like(real, dtype=torch.bool)
    bounds = (clamp_min, clamp_max, straight_through)
    y = _fake_quantize(loops, real, order, mask, scale, zero_point, axis, group_size, quant_min, quant_max, *bounds)
    return _as(y, x.dtype), mask


def fake_quantize_backward(grad: Tensor, mask: Tensor) -> Tensor:
    """``grad * mask`` for a bool mask of grad's shape, in the mask's memory format; the loop takes float32."""
    loops = _loops(grad, mask)
    usual = grad.dtype is torch.float32 and mask.dtype is torch.bool and grad.shape == mask.shape
    if loops is None or not usual:
        with torch.no_grad():
            return affine.fake_quantize_backward(grad, mask)
    mask = _dense(mask)[0]
    grad = _in_layout(grad, mask)
    out = torch.empty_like(grad)
    pointers = (grad.data_ptr(), mask.data_ptr(), out.data_ptr())
    loops.qfx_fake_quantize_backward(*pointers, grad.numel(), torch.get_num_threads())
    return out


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    quant_min: int,
    quant_max: int,
    gradient_scale: float,
    *,
    clamp_min: float | None = None,
    clamp_max: float | None = None,
) -> Tensor:
    """The value of :func:`fake_quantize`, without a mask; ``gradient_scale`` belongs to the gradient alone."""
    _check_qparams(x, scale, zero_point, axis, group_size)
    loops = _loops(x, scale, zero_point)
    if loops is None or x.dtype not in _THROUGH_FLOAT32 or not _usual(scale, zero_point):
        return fake_quantize(
            x, scale, zero_point, axis, group_size, quant_min, quant_max, clamp_min=clamp_min, clamp_max=clamp_max
        )[0]
    real, order = _dense(_as(x, torch.float32))
    limits = (quant_min, quant_max, clamp_min, clamp_max, False)
    y = _fake_quantize(loops, real, order, None, scale, zero_point, axis, group_size, *limits)
    return _as(y, x.dtype)


def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    quant_min: int,
    quant_max: int,
    gradient_scale: float,
    *,
    clamp_min: float | None = None,
    clamp_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`fake_quantize_learned` in ``x`` and in ``scale``: its namesake's of :mod:`qfx.affine`.

    The loop takes float32, and half precision through it; its sums have the same bits for any number of threads. The
    twin adds the same terms in another order: the two may differ in the last bits of the sum.
    """
    _check_qparams(x, scale, zero_point, axis, group_size)
    loops = _loops(grad, x, scale, zero_point)
    usual = x.dtype in _THROUGH_FLOAT32 and grad.dtype is x.dtype and grad.shape == x.shape
    # One scale for many zero points has one sum, where the loop would make many.
    if loops is None or not usual or not _usual(scale, zero_point) or scale.numel() < zero_point.numel():
        with torch.no_grad():
            return affine.fake_quantize_learned_backward(
                grad,
                x,
                scale,
                zero_point,
                axis=axis,
                group_size=group_size,
                quant_min=quant_min,
                quant_max=quant_max,
                gradient_scale=gradient_scale,
                clamp_min=clamp_min,
                clamp_max=clamp_max,
            )
    real, order = _dense(_as(x, torch.float32))
    real_grad = _in_layout(_as(grad, torch.float32), real)
    grad_x = torch.empty_like(real)
    if not real.numel():
        return _as(grad_x, x.dtype), torch.zeros_like(scale)
    ordered_scale, zero_point, walk = _walk(real, order, scale, zero_point, axis, group_size)
    grad_scale = torch.empty_like(ordered_scale)
    pointers = (real_grad.data_ptr(), real.data_ptr(), grad_x.data_ptr(), grad_scale.data_ptr())
    loops.qfx_fake_quantize_learned_backward(
        *(*pointers, ordered_scale.data_ptr(), zero_point.data_ptr(), *walk),
        *(quant_min, quant_max, _bound(clamp_min), _bound(clamp_max), gradient_scale, torch.get_num_threads()),
    )
    if order is not None and grad_scale.ndim == len(order):
        grad_scale = grad_scale.permute(_inverse(order)).flatten()
    return _as(grad_x, x.dtype), grad_scale.view(scale.shape)


def _fake_quantize(
    loops: Any,
    x: Tensor,
    order: Order,
    mask: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    quant_min: int,
    quant_max: int,
    clamp_min: float | None,
    clamp_max: float | None,
    straight_through: bool,
) -> Tensor:
    """The loop on dense float32 ``x``, filling ``mask`` if there is one."""
    y = torch.empty_like(x)
    if x.numel():
        scale, zero_point, walk = _walk(x, order, scale, zero_point, axis, group_size)
        outputs = (y.data_ptr(), None if mask is None else mask.data_ptr())
        limits = (quant_min, quant_max, _bound(clamp_min), _bound(clamp_max), straight_through)
        pointers = (x.data_ptr(), *outputs, scale.data_ptr(), zero_point.data_ptr())
        loops.qfx_fake_quantize(*pointers, *walk, *limits, torch.get_num_threads())
    return y


_THROUGH_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)  # exact in float32, and rounded once from there


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # even a conversion of nothing costs a third of a microsecond


def _bound(value: float | None) -> float:
    return math.nan if value is None else value  # nothing is below or above NaN


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of all of ``x``, of shape ``[]`` and x's dtype; NaN if it holds one, zeros if it is empty.

    The loop takes float32: one pass in the order of memory, where torch.aminmax copies what is not contiguous.
    """
    loops = _loops(x)
    if loops is None or x.dtype is not torch.float32 or not x.numel():
        return affine.min_max(x.detach(), None, None)
    x, _ = _dense(x)
    low, high = x.new_empty(()), x.new_empty(())
    loops.qfx_min_max(x.data_ptr(), low.data_ptr(), high.data_ptr(), x.numel(), torch.get_num_threads())
    return low, high


def quantize_per_token(
    x: Tensor, quant_min: int = -128, quant_max: int = 127, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Quantize each row (last axis) by its own symmetric scale, found from the data.

    Returns ``q`` of x's shape, contiguous, and ``scale`` (float32, x's shape with a last axis of 1); the zero point is
    the middle of the range, ``(quant_min + quant_max + 1) // 2``: 0 for int8, 128 for uint8. The scale is that of
    :func:`qfx.affine.choose_qparams`. A row with a NaN has scale NaN and is all zero point; a row without elements
    has the smallest scale. The loop takes float32.
    """
    _check_range(quant_min, quant_max, dtype)
    x = x.contiguous()
    if x.numel() == 0:
        scale = x.new_full((*x.shape[:-1], 1), affine.MIN_SCALE, dtype=torch.float32)
        return torch.empty_like(x, dtype=dtype), scale
    loops = _loops(x)
    if loops is None or x.dtype is not torch.float32 or dtype not in _INTEGERS:
        return _aten_quantize_per_token(x, quant_min, quant_max, dtype)
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1))
    pointers = (x.data_ptr(), q.data_ptr(), scale.data_ptr())
    half_range, zero_point = (quant_max - quant_min) / 2, (quant_min + quant_max + 1) // 2
    sizes = (scale.numel(), x.shape[-1])
    limits = (affine.MIN_SCALE, zero_point, quant_min, quant_max)
    loops.qfx_quantize_per_token(*pointers, *sizes, half_range, *limits, _KIND[dtype], torch.get_num_threads())
    return q, scale


def _usual(scale: Tensor, zero_point: Tensor) -> bool:
    return scale.dtype is torch.float32 and zero_point.dtype is torch.int32


@torch.no_grad()
def _aten_quantize_per_token(x: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = affine.min_max(x, -1, -1)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=True, quant_min=quant_min, quant_max=quant_max)
    q = affine.quantize(
        x, scale, zero_point, axis=-1, group_size=-1, quant_min=quant_min, quant_max=quant_max, dtype=dtype
    )
    return q, scale


# --- lookup, add, mul -------------------------------------------------------------------------------------------------


def lookup(q: Tensor, table: Tensor) -> Tensor:
    """Any function of one quantized tensor: ``table[i]`` (256 entries) is the result for the i-th value of q's dtype.

    For uint8 that is the value i, for int8 the value ``i - 128``. Returns the table's dtype (uint8 or int8).
    """
    integers = q.dtype in _INTEGERS and table.dtype in _INTEGERS
    if not integers or table.numel() != 256:
        raise ConfigError(
            f"lookup needs integers and a table of 256 of them, not {q.dtype} and {table.numel()} of {table.dtype}"
        )
    loops = _loops(q, table)
    if loops is None:
        return _aten_lookup(q, table)
    q, _ = _dense(q)
    table = table.contiguous()
    out = torch.empty_like(q, dtype=table.dtype)
    pointers = (q.data_ptr(), table.data_ptr(), out.data_ptr())
    loops.qfx_lookup(*pointers, q.numel(), _KIND[q.dtype], torch.get_num_threads())
    return out


def _aten_lookup(q: Tensor, table: Tensor) -> Tensor:
    return _like(table[q.to(torch.int64) - _INTEGERS[q.dtype][0]], q)


def add(
    a: Tensor,
    a_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """The sum of two tensors quantized per tensor, clamped to ``[low, high]`` (``low=0.0`` is relu), quantized again.

    ``b`` is uint8 or int8; ``a`` too, or float32 (``a_scale`` and ``a_zero_point`` None). The shapes broadcast; the
    memory format is a's, or b's where a is broadcast or not dense. Arithmetic is float32.
    """
    a_q, b_q, out_q = (a, a_scale, a_zero_point), (b, b_scale, b_zero_point), (out_scale, out_zero_point)
    return _binary(False, a_q, b_q, out_q, low, high, quant_min, quant_max, dtype)


def mul(
    a: Tensor,
    a_scale: Tensor | None,
    a_zero_point: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """The product of two tensors quantized per tensor; all else as in :func:`add`."""
    a_q, b_q, out_q = (a, a_scale, a_zero_point), (b, b_scale, b_zero_point), (out_scale, out_zero_point)
    return _binary(True, a_q, b_q, out_q, low, high, quant_min, quant_max, dtype)


_Left = tuple[Tensor, Tensor | None, Tensor | None]
_Right = tuple[Tensor, Tensor, Tensor]


def _binary(
    multiply: bool,
    a_q: _Left,
    b_q: _Right,
    out_q: tuple[Tensor, Tensor],
    low: float,
    high: float,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_range(quant_min, quant_max, dtype)
    a, a_scale, a_zero_point = a_q
    b, b_scale, b_zero_point = b_q
    out_scale, out_zero_point = out_q
    left = () if a_scale is None or a_zero_point is None else (a_scale, a_zero_point)
    if bool(left) == (a.dtype is torch.float32) or a.dtype not in _KIND or b.dtype not in _INTEGERS:
        raise ConfigError(f"cannot combine {a.dtype}{'' if left else ' without a scale'} and {b.dtype}")
    qparams = (*left, b_scale, b_zero_point, out_scale, out_zero_point)
    if any(value.numel() != 1 for value in qparams):
        raise ConfigError("add and mul take tensors quantized per tensor: a scale or zero point has several values")
    loops = _loops(a, b, *qparams)
    if loops is None or dtype not in _INTEGERS:
        return _aten_binary(multiply, a_q, b_q, out_q, low, high, quant_min, quant_max, dtype)
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    a, b = _same_layout(a, b)
    out = torch.empty_like(a, dtype=dtype)
    left_pointers = (left[0].data_ptr(), left[1].data_ptr()) if left else (None, None)
    loops.qfx_binary(
        *(a.data_ptr(), *left_pointers),
        *(b.data_ptr(), b_scale.data_ptr(), b_zero_point.data_ptr()),
        *(out.data_ptr(), out_scale.data_ptr(), out_zero_point.data_ptr()),
        *(out.numel(), low, high, quant_min, quant_max),
        *(_KIND[a.dtype], _KIND[b.dtype], _KIND[dtype], multiply, torch.get_num_threads()),
    )
    return out


def _same_layout(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both of them (of one shape) dense with the same strides: a's where it is dense, else b's, else contiguous."""
    if a.stride() == b.stride() and a.is_contiguous():
        return a, b
    a_dense, b_dense = _dense(a)[0], _dense(b)[0]
    lead = b if a_dense is not a and b_dense is b else a_dense
    return _in_layout(a, lead), _in_layout(b, lead)


def _in_layout(x: Tensor, lead: Tensor) -> Tensor:
    return x if x.stride() == lead.stride() else torch.empty_like(lead, dtype=x.dtype).copy_(x)


@torch.no_grad()
def _aten_binary(
    multiply: bool,
    a_q: _Left,
    b_q: _Right,
    out_q: tuple[Tensor, Tensor],
    low: float,
    high: float,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    a, a_scale, a_zero_point = a_q
    x = a if a_scale is None or a_zero_point is None else affine.dequantize(a, a_scale, a_zero_point)
    y = affine.dequantize(*b_q)
    real = (x * y if multiply else x + y).clamp(low, high)
    return affine.quantize(real, *out_q, quant_min=quant_min, quant_max=quant_max, dtype=dtype)


# --- pooling ----------------------------------------------------------------------------------------------------------


def max_pool(
    x: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts | None = None,
    padding: IntOrInts = 0,
    dilation: IntOrInts = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum over windows of uint8 or int8; arguments and shapes as ``torch.nn.functional.max_pool2d``.

    ``x`` is ``[N, C, H, W]``, or ``[N, C, L]`` for 1d; scale and zero point stay. Input that is neither contiguous nor
    channels-last is made channels-last. A window wholly in the padding gives the dtype's smallest value.
    """
    image, last = _image(x)
    kernel, strides = _hashable(kernel_size), _hashable(stride)
    rows, cols = pool_windows(x.shape[2:], kernel, strides, _hashable(padding), _hashable(dilation), ceil_mode, True)
    loops = _loops(image)
    if loops is None:
        out = _aten_max_pool(x, kernel_size, stride, padding, dilation, ceil_mode)
        return out.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else out
    out = _empty_image(image, len(rows), len(cols), image.dtype, last)
    if out.numel():
        loops.qfx_max_pool(
            *(image.data_ptr(), out.data_ptr(), *image.shape),
            *(rows.table, len(rows), rows.step, cols.table, len(cols), cols.step),
            *(last, _KIND[image.dtype], torch.get_num_threads()),
        )
    return out if x.ndim == 4 else out.squeeze(2)


def avg_pool(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts | None = None,
    padding: IntOrInts = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Mean over windows, quantized again; arguments and shapes as ``torch.nn.functional.avg_pool2d``.

    ``x`` is uint8 or int8, ``[N, C, H, W]`` or ``[N, C, L]``; padding is a real zero. Sums are exact, then
    ``sum * scale / divisor`` is float32. Memory format as :func:`max_pool`.
    """
    if divisor_override == 0:
        raise ConfigError("divisor_override must not be zero")
    image, last = _image(x)
    kernel, strides = _hashable(kernel_size), _hashable(stride)
    rows, cols = pool_windows(x.shape[2:], kernel, strides, _hashable(padding), 1, ceil_mode, count_include_pad)
    qparams = (scale, zero_point, out_scale, out_zero_point)
    out = _mean_pool(image, last, qparams, rows, cols, divisor_override or 0, quant_min, quant_max, dtype)
    return out if x.ndim == 4 else out.squeeze(2)


def adaptive_avg_pool(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    output_size: int | Sequence[int | None],
    *,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Mean over windows that divide H and W into ``output_size`` parts (None keeps a size), quantized again.

    ``output_size=1`` is global average pooling. All else as :func:`avg_pool`.
    """
    image, last = _image(x)
    dims = x.ndim - 2
    sizes = (output_size,) * dims if isinstance(output_size, int) else tuple(output_size)
    rows, cols = (
        adaptive_windows(size, size if out is None else out)
        for size, out in zip(image.shape[2:], (1, *sizes)[-2:], strict=True)
    )
    qparams = (scale, zero_point, out_scale, out_zero_point)
    out = _mean_pool(image, last, qparams, rows, cols, 0, quant_min, quant_max, dtype)
    return out if x.ndim == 4 else out.squeeze(2)


def mean(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    dim: IntOrInts,
    keepdim: bool = False,
    *,
    quant_min: int = 0,
    quant_max: int = 255,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Mean of uint8 or int8 over ``dim`` (empty: all), quantized again; sums are exact.

    The result keeps the order of the remaining dimensions in memory where the reduced ones are neighbours there
    (H and W are, in both formats); else it is contiguous.
    """
    if x.ndim == 4 and dim in ((2, 3), [2, 3], (-2, -1), [-2, -1]):  # the usual case, without the reshaping below
        pooled = adaptive_avg_pool(
            x, scale, zero_point, out_scale, out_zero_point, 1, quant_min=quant_min, quant_max=quant_max, dtype=dtype
        )
        return pooled if keepdim else pooled.flatten(1)
    named = (dim,) if isinstance(dim, int) else tuple(dim)
    dims = sorted({each % x.ndim for each in named or range(x.ndim)})
    dense, order = _dense(x)
    natural = tuple(range(x.ndim))
    order = order or natural
    places = sorted(order.index(each) for each in dims)
    if places != list(range(places[0], places[0] + len(places))):
        order = (*(each for each in natural if each not in dims), *dims)
        dense = dense.permute(order).contiguous().permute(_inverse(order))
        places = list(range(x.ndim - len(dims), x.ndim))
    sizes = [x.shape[each] for each in order]
    outer, inner = math.prod(sizes[: places[0]]), math.prod(sizes[places[-1] + 1 :])
    count = math.prod(sizes[place] for place in places)
    # As an image of one row, with the inner dimensions as channels.
    image = dense.permute(order).reshape(outer, 1, count, inner).permute(0, 3, 1, 2)
    qparams = (scale, zero_point, out_scale, out_zero_point)
    windows = adaptive_windows(1, 1), adaptive_windows(count, 1)
    pooled = _mean_pool(image, inner > 1, qparams, *windows, 0, quant_min, quant_max, dtype)
    kept = [1 if place in places else size for place, size in enumerate(sizes)]
    out = pooled.reshape(kept).permute(_inverse(order))
    return out if keepdim else out.squeeze(dims)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _image(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` as ``[N, C, H, W]``, and whether it is channels-last in memory (else contiguous)."""
    if x.ndim not in (3, 4) or x.dtype not in _INTEGERS:
        raise ConfigError(f"pooling takes uint8 or int8 of [N, C, L] or [N, C, H, W], not {x.dtype} {list(x.shape)}")
    image = x if x.ndim == 4 else x.unsqueeze(2)
    if image.is_contiguous():
        return image, False
    return image.contiguous(memory_format=torch.channels_last), True


def _empty_image(image: Tensor, height: int, width: int, dtype: torch.dtype, last: bool) -> Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    shape = (image.shape[0], image.shape[1], height, width)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory_format)


class Windows:
    """What each output of a pooling sees along one dimension: inputs ``[begin, end)`` in steps of ``step`` (the
    dilation), and its share of the divisor.

    Kept as numbers and not as a tensor: they are cached, and a tensor made while fake tensors are traced is fake.
    """

    def __init__(self, windows: Sequence[tuple[int, int, int]], step: int = 1) -> None:
        self.step = step
        self.begin, self.end, self.divisor = ([each[i] for each in windows] for i in range(3))
        self.table = (ctypes.c_int32 * (3 * len(windows)))(*itertools.chain.from_iterable(windows))

    def __len__(self) -> int:
        return len(self.begin)


def _hashable(value: IntOrInts | None) -> int | tuple[int, ...] | None:
    return value if value is None or isinstance(value, int) else tuple(value)


@functools.lru_cache(maxsize=1024)
def pool_windows(
    sizes: Sequence[int],
    kernel: int | tuple[int, ...] | None,
    stride: int | tuple[int, ...] | None,
    padding: int | tuple[int, ...] | None,
    dilation: int | tuple[int, ...] | None,
    ceil_mode: bool,
    include_pad: bool,
) -> tuple[Windows, Windows]:
    """The windows for ``sizes`` H and W, or for L with a height of one."""
    given = (kernel, kernel if stride in (None, ()) else stride, padding, dilation)
    per_dim = [(value,) * 2 if isinstance(value, int) else tuple(value or ()) * 2 for value in given]
    windows = [
        _windows(size, k, s, p, d, ceil_mode, include_pad)
        for size, k, s, p, d in zip(sizes, *per_dim, strict=False)  # one number serves both dimensions
    ]
    return (windows[0], windows[1]) if len(windows) == 2 else (Windows([(0, 1, 1)]), windows[0])


def _windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, include_pad: bool
) -> Windows:
    """The windows of an ordinary pooling; the divisor counts the padding if ``include_pad``."""
    reach = dilation * (kernel - 1) + 1
    if min(kernel, stride, dilation) < 1 or not 0 <= padding <= reach // 2:
        raise ConfigError(
            f"pooling with kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation} is not defined",
            hint="all must be positive, and the padding at most half of the kernel",
        )
    count = (size + 2 * padding - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window must start inside the input or its left padding
    if count < 1 or size < 1:
        raise ConfigError(f"a pooling window of {reach} does not fit an input of {size} with padding {padding}")
    windows = []
    for start in range(-padding, count * stride - padding, stride):
        end = min(start + reach, size)
        begin = min(start - min(start, 0) // dilation * dilation, end)  # the first tap inside the input
        divisor = min(start + reach, size + padding) - start if include_pad else max(end - begin, 0)
        windows.append((begin, end, divisor))
    return Windows(windows, dilation)


@functools.lru_cache(maxsize=1024)
def adaptive_windows(size: int, count: int) -> Windows:
    """The windows of ``count`` outputs that share the whole input; neighbours overlap where it does not divide."""
    edges = ((i * size // count, -(-(i + 1) * size // count)) for i in range(count))
    return Windows([(begin, end, end - begin) for begin, end in edges])


_QParams = tuple[Tensor, Tensor, Tensor, Tensor]


def _mean_pool(
    image: Tensor,
    last: bool,
    qparams: _QParams,
    rows: Windows,
    cols: Windows,
    divisor_override: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_range(quant_min, quant_max, dtype)
    if image.dtype not in _INTEGERS or any(value.numel() != 1 for value in qparams):
        raise ConfigError(f"a mean takes uint8 or int8 quantized per tensor, not {image.dtype}")
    loops = _loops(image, *qparams)
    if loops is None or dtype not in _INTEGERS or image.shape[2] * image.shape[3] > MOST_SUMMED:
        return _aten_mean_pool(image, last, qparams, rows, cols, divisor_override, quant_min, quant_max, dtype)
    out = _empty_image(image, len(rows), len(cols), dtype, last)
    scale, zero_point, out_scale, out_zero_point = qparams
    if out.numel():
        loops.qfx_mean_pool(
            *(image.data_ptr(), scale.data_ptr(), zero_point.data_ptr()),
            *(out.data_ptr(), out_scale.data_ptr(), out_zero_point.data_ptr()),
            *(*image.shape, rows.table, len(rows), cols.table, len(cols)),
            *(divisor_override, quant_min, quant_max),
            *(last, _KIND[image.dtype], _KIND[dtype], torch.get_num_threads()),
        )
    return out


def _aten_max_pool(
    x: Tensor,
    kernel_size: IntOrInts,
    stride: IntOrInts | None,
    padding: IntOrInts,
    dilation: IntOrInts,
    ceil_mode: bool,
) -> Tensor:
    # Exact: float32 holds every 8-bit integer. ATen's own uint8 kernel fails on channels-last when H * W > 255.
    functional = torch.nn.functional
    pool: Callable[..., Tensor] = functional.max_pool2d if x.ndim == 4 else functional.max_pool1d
    out = pool(x.float(), kernel_size, stride, padding, dilation, ceil_mode)
    return out.clamp(min=_INTEGERS[x.dtype][0]).to(x.dtype)


@torch.no_grad()
def _aten_mean_pool(
    image: Tensor,
    last: bool,
    qparams: _QParams,
    rows: Windows,
    cols: Windows,
    divisor_override: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Tensor:
    scale, zero_point, out_scale, out_zero_point = qparams
    # The sum over any window is a difference of running sums in int64: exact, and one formula for all poolings.
    sums = (image.to(torch.int64) - zero_point).cumsum(2).cumsum(3)
    sums = torch.nn.functional.pad(sums, (1, 0, 1, 0))
    sums = sums[:, :, rows.end] - sums[:, :, rows.begin]
    sums = sums[..., cols.end] - sums[..., cols.begin]
    divisor = image.new_tensor(rows.divisor, dtype=torch.float32)[:, None] * image.new_tensor(
        cols.divisor, dtype=torch.float32
    )
    real = sums.to(torch.float32) * scale / (divisor_override or divisor)
    q = affine.quantize(real, out_scale, out_zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype)
    return q.contiguous(memory_format=torch.channels_last) if last else q.contiguous()


ATEN: dict[str, Callable[..., Any]] = {
    "quantize": affine.quantize,
    "quantize_interleaved": affine.quantize,
    "dequantize": affine.dequantize,
    "fake_quantize": affine.fake_quantize,
    "fake_quantize_backward": affine.fake_quantize_backward,
    "fake_quantize_learned_backward": affine.fake_quantize_learned_backward,
    "min_max": affine.min_max,
    "quantize_per_token": _aten_quantize_per_token,
    "lookup": _aten_lookup,
    "binary": _aten_binary,
    "max_pool": _aten_max_pool,
    "mean_pool": _aten_mean_pool,
}
"""The twin of each loop in :data:`LOOPS`, by the same name: the formula that the loop equals bit for bit."""
