"""The C++ loops against their ATen twins, bit for bit, and both against torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx import affine, kernels
from qfx.errors import ConfigError

RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
DTYPES = st.sampled_from([torch.uint8, torch.int8])
SEEDS = st.integers(0, 2**31)


@contextmanager
def no_loops() -> Iterator[None]:
    """As on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda: (None, "aten: for a test"))
        yield


def assert_same(loop: Tensor, twin: Tensor) -> None:
    """Equal bits; a NaN equals a NaN."""
    assert (loop.dtype, loop.shape) == (twin.dtype, twin.shape)
    if not loop.is_floating_point():
        assert torch.equal(loop, twin)
        return
    nan = loop.isnan()
    assert torch.equal(nan, twin.isnan())
    bits = [torch.where(nan, 0.0, each).contiguous().view(torch.int32) for each in (loop, twin)]
    assert torch.equal(*bits)


def both(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The loop's result, proven equal to the twin's."""
    loop = function(*args, **kwargs)
    with no_loops():
        twin = function(*args, **kwargs)
    for one, other in zip(*((each,) if isinstance(each, Tensor) else each for each in (loop, twin)), strict=True):
        assert_same(one, other)
    return loop


# --- inputs -----------------------------------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last)
        if x.ndim == 4
        else x.contiguous(memory_format=torch.channels_last_3d)
        if x.ndim == 5
        else x
    ),
    "reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 1],
}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of many sizes, halves (ties), zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** torch.randint(-3, 3, shape, generator=generator)
    special = torch.tensor([0.5, 1.5, -2.5, 0.0, -0.0, 127.5, 1e30, -3e38, math.inf, -math.inf, math.nan, 1e-42])
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.3, chosen, x)


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    low, high = RANGES[dtype]
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qparams(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    scale = torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-2, 2, shape, generator=generator) + 1e-3
    low, high = RANGES[dtype]
    zero_point = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    return scale, zero_point


def qscalar(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    return qparams((), dtype, seed)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], str, int | None, int | None, tuple[int, ...]]:
    """Shape, memory format, axis, group size, and the scale's shape."""
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)))
    memory = draw(st.sampled_from(sorted(FORMATS)))
    kind = draw(st.sampled_from(["tensor", "axis", "group", "token"]))
    if kind == "tensor":
        return shape, memory, None, None, ()
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if kind == "axis":
        return shape, memory, axis, None, (shape[axis],)
    group_size = -1 if kind == "token" else draw(st.integers(1, 9))
    scales = list(shape)
    scales[axis] = 1 if kind == "token" else -(-shape[axis] // group_size)
    assume(shape[axis] > 0 or kind == "group")
    return shape, memory, axis, group_size, tuple(scales)


Layout = tuple[tuple[int, ...], str, int | None, int | None, tuple[int, ...]]


# --- quantize, dequantize, fake_quantize ------------------------------------------------------------------------------


@given(layouts(), DTYPES, SEEDS)
@example(((3, 70), "contiguous", 1, 32, (3, 3)), torch.int8, 0)
@example(((2, 5, 3, 3), "channels_last", 1, None, (5,)), torch.int8, 0)
@example(((2, 5, 3, 3), "channels_last", 1, 2, (2, 3, 3, 3)), torch.uint8, 0)
def test_quantize(layout: Layout, dtype: torch.dtype, seed: int) -> None:
    shape, memory, axis, group_size, scales = layout
    x = FORMATS[memory](numbers(shape, seed))
    scale, zero_point = qparams(scales, dtype, seed)
    q = both(kernels.quantize, x, scale, zero_point, axis, group_size, *RANGES[dtype], dtype)
    assert q.stride() == x.stride() or memory == "gaps" or x.numel() < 2


@given(layouts(), DTYPES, SEEDS)
def test_dequantize(layout: Layout, dtype: torch.dtype, seed: int) -> None:
    shape, memory, axis, group_size, scales = layout
    q = FORMATS[memory](integers(shape, dtype, seed))
    scale, zero_point = qparams(scales, dtype, seed)
    x = both(kernels.dequantize, q, scale, zero_point, axis, group_size)
    assert x.stride() == q.stride() or memory == "gaps" or q.numel() < 2


BOUNDS = st.sampled_from([(None, None), (0.0, None), (None, 1.5), (0.0, 6.0), (-1.0, 1.0)])
LIMITS = st.sampled_from([(0, 255), (-128, 127), (-7, 7), (0, 3)])


@given(layouts(), SEEDS, LIMITS, BOUNDS, st.booleans())
@example(((3, 70), "contiguous", 1, 32, (3, 3)), 0, (-7, 7), (0.0, 6.0), False)
def test_fake_quantize(
    layout: Layout, seed: int, limits: tuple[int, int], bounds: tuple[float | None, float | None], straight: bool
) -> None:
    shape, memory, axis, group_size, scales = layout
    x = FORMATS[memory](numbers(shape, seed))
    scale, zero_point = qparams(scales, torch.int8, seed)
    zero_point = zero_point.clamp(*limits)
    fused = {"clamp_min": bounds[0], "clamp_max": bounds[1], "straight_through": straight}
    y, mask = both(kernels.fake_quantize, x, scale, zero_point, axis, group_size, *limits, **fused)
    assert mask.dtype is torch.bool
    grad = FORMATS[memory](numbers(shape, seed + 7))
    both(kernels.fake_quantize_backward, grad, mask)
    real = x if bounds == (None, None) else x.clamp(*bounds)
    dtype = torch.int8 if limits[0] < 0 else torch.uint8
    q = kernels.quantize(real, scale, zero_point, axis, group_size, *limits, dtype)
    assert torch.equal(y, kernels.dequantize(q, scale, zero_point, axis, group_size))
    learned = both(
        *(kernels.fake_quantize_learned, x, scale, zero_point, axis, group_size, *limits, 0.5),
        clamp_min=bounds[0],
        clamp_max=bounds[1],
    )
    assert_same(learned, y)


@given(layouts(), SEEDS, LIMITS, BOUNDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@example(((3, 70), "contiguous", 1, 32, (3, 3)), 0, (-7, 7), (0.0, 6.0), torch.float32)
@example(((70, 3), "contiguous", 0, 32, (3, 3)), 0, (-7, 7), (None, None), torch.float32)
@example(((2, 5, 3, 3), "channels_last", 1, None, (5,)), 0, (0, 3), (0.0, None), torch.float32)
def test_fake_quantize_learned_backward(
    layout: Layout,
    seed: int,
    limits: tuple[int, int],
    bounds: tuple[float | None, float | None],
    dtype: torch.dtype,
) -> None:
    shape, memory, axis, group_size, scales = layout
    x = FORMATS[memory](numbers(shape, seed)).to(dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7)).to(dtype)
    scale, zero_point = qparams(scales, torch.int8, seed)
    args = (grad, x, scale, zero_point.clamp(*limits), axis, group_size, *limits, 0.25)
    clamps = {"clamp_min": bounds[0], "clamp_max": bounds[1]}
    grad_x, grad_scale = kernels.fake_quantize_learned_backward(*args, **clamps)
    with no_loops():
        twin_x, twin_scale = kernels.fake_quantize_learned_backward(*args, **clamps)
    assert torch.equal(grad_x, twin_x) and grad_x.dtype is dtype
    assert grad_x.stride() == x.stride() or memory == "gaps" or x.numel() < 2
    assert (grad_scale.shape, grad_scale.dtype) == (scale.shape, torch.float32) and grad_scale.is_contiguous()
    # The sum itself: of the same terms in another order, in double.
    torch.testing.assert_close(grad_scale, twin_scale, rtol=1e-6, atol=1e-8 * max(abs(limit) for limit in limits) * 8)


@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "scales"),
    [
        ((60, 16, 9, 10), None, None, ()),
        ((60, 16, 9, 10), 1, None, (16,)),
        ((40, 2100), 0, None, (40,)),
        ((400, 210), 1, None, (210,)),
        ((40, 2100), 1, 64, (40, 33)),
        ((2100, 40), 0, 64, (33, 40)),
        ((3, 20000), 1, 9000, (3, 3)),
        ((7, 90, 130), 1, -1, (7, 1, 130)),
    ],
)
def test_sums_do_not_depend_on_threads(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, scales: tuple[int, ...]
) -> None:
    x, grad = numbers(shape, 0), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale, zero_point = qparams(scales, torch.int8, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            args = (grad, x, scale, zero_point, axis, group_size, -128, 127, 0.1)
            results.append(kernels.fake_quantize_learned_backward(*args))
            with no_loops():
                twin = kernels.fake_quantize_learned_backward(*args)
    finally:
        torch.set_num_threads(before)
    for grad_x, grad_scale in results:
        assert_same(grad_x, results[0][0])
        assert_same(grad_scale, results[0][1])
    assert torch.equal(results[0][0], twin[0])
    torch.testing.assert_close(results[0][1], twin[1], rtol=1e-6, atol=1e-6)


def test_one_learned_scale_for_many_elements() -> None:
    x, grad = numbers((4, 6), 0), torch.randn(4, 6)
    scale, zero_point = qparams((6,), torch.uint8, 0)
    args = (1, None, 0, 255, 1.0)
    for step, zeros in ((scale[:1], zero_point), (scale, zero_point[0]), (scale[0], zero_point[0])):
        loop = kernels.fake_quantize_learned_backward(grad, x, step, zeros, *args)
        with no_loops():
            twin = kernels.fake_quantize_learned_backward(grad, x, step, zeros, *args)
        assert loop[1].shape == step.shape
        torch.testing.assert_close(loop, twin)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.sampled_from(sorted(FORMATS)), SEEDS, st.booleans())
@example([], "contiguous", 0, False)
def test_min_max(shape: list[int], memory: str, seed: int, special: bool) -> None:
    x = numbers(tuple(shape), seed) if special else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = FORMATS[memory](x)
    low, high = kernels.min_max(x)
    want = torch.aminmax(x) if x.numel() else (torch.tensor(0.0), torch.tensor(0.0))
    torch.testing.assert_close((low, high), tuple(want), rtol=0, atol=0, equal_nan=True)


def test_min_max_of_large_tensors() -> None:
    x = torch.randn(300, 401)
    for place, value in ((5, 9.0), (120_299, -9.0), (60_000, math.nan), (60_001, -math.inf)):
        x.view(-1)[place] = value
        torch.testing.assert_close(kernels.min_max(x), tuple(torch.aminmax(x)), rtol=0, atol=0, equal_nan=True)
        for dtype in (torch.bfloat16, torch.float64):
            other = x.to(dtype)
            torch.testing.assert_close(kernels.min_max(other), tuple(torch.aminmax(other)), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("scales", [((), None, None), ((301,), 1, None), ((401,), 0, None), ((401, 5), 1, 64)])
def test_large_tensors_on_several_threads(threads: int, scales: tuple[Any, Any, Any]) -> None:
    shape, axis, group_size = scales
    x = numbers((401, 301), 3)
    scale, zero_point = qparams(shape, torch.uint8, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = both(kernels.quantize, x, scale, zero_point, axis, group_size)
        both(kernels.dequantize, q, scale, zero_point, axis, group_size)
        both(kernels.fake_quantize, x, scale, zero_point, axis, group_size, clamp_min=0.0)
        both(kernels.quantize_per_token, x)
        both(kernels.lookup, q, q.flatten()[:256])
        one, two, three = (qscalar(torch.uint8, seed) for seed in range(3))
        both(kernels.add, q, *one, q, *two, *three)
    finally:
        torch.set_num_threads(before)


def test_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.5, 1.5, -0.5, -1e-45])
    scale, zero_point = torch.tensor(1.0), torch.tensor(3, dtype=torch.int32)
    q = both(kernels.quantize, x, scale, zero_point)
    assert q.tolist() == [3, 255, 0, 255, 0, 3, 5, 3, 3]
    y, mask = both(kernels.fake_quantize, x, scale, zero_point)
    assert y.tolist() == [0.0, 252.0, -3.0, 252.0, -3.0, 0.0, 2.0, 0.0, 0.0]
    assert mask.tolist() == [True, False, False, False, False, True, True, True, True]


@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40), SEEDS)
def test_fake_quantize_is_torchs_per_tensor(values: list[float], seed: int) -> None:
    scale, zero_point = qscalar(torch.uint8, seed)
    x = torch.tensor(values)
    y, _ = both(kernels.fake_quantize, x, scale, zero_point)
    assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255))


@given(st.integers(1, 6), st.integers(0, 2), SEEDS)
def test_fake_quantize_is_torchs_per_channel(size: int, axis: int, seed: int) -> None:
    scale, zero_point = qparams((size,), torch.int8, seed)
    shape = [3, 4, 5]
    shape[axis] = size
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).requires_grad_()
    y, mask = both(kernels.fake_quantize, x, scale, zero_point, axis, None, -128, 127)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, -128, 127)
    assert torch.equal(y, expected) and not y.requires_grad
    grad = torch.randn(shape)
    expected.backward(grad)
    assert x.grad is not None and torch.equal(both(kernels.fake_quantize_backward, grad, mask), x.grad)


def test_one_zero_point_for_many_scales_and_one_scale_for_many_zero_points() -> None:
    x = numbers((4, 6), 0)
    scale, zero_point = qparams((6,), torch.uint8, 0)
    both(kernels.quantize, x, scale, zero_point[0], 1)
    both(kernels.quantize, x, scale[0], zero_point, 1)
    scale, zero_point = qparams((4, 2), torch.uint8, 0)
    both(kernels.quantize, x, scale[0, 0], zero_point, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_take_the_twin(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3).to(dtype)
    q = kernels.quantize(x, *qscalar(torch.uint8, 0))
    assert q.dtype is torch.uint8
    y, _ = kernels.fake_quantize(x, *qscalar(torch.uint8, 0))
    assert y.dtype is dtype


def test_int32_takes_the_twin() -> None:
    scale, zero_point = torch.tensor(1e-4), torch.tensor(0, dtype=torch.int32)
    q = kernels.quantize(torch.tensor([12.3456]), scale, zero_point, None, None, -(2**31), 2**31 - 1, torch.int32)
    assert q.tolist() == [123456]
    assert kernels.dequantize(q, scale, zero_point).item() == pytest.approx(12.3456)


def test_scales_that_do_not_fit() -> None:
    x, (scale, zero_point) = torch.randn(4, 6), qparams((5,), torch.uint8, 0)
    for axis, group_size in ((None, None), (0, None), (1, None), (1, 2)):
        with pytest.raises(ConfigError, match=r"shape \[5\] does not fit a tensor of shape \[4, 6\]"):
            kernels.quantize(x, scale, zero_point, axis, group_size)
    with pytest.raises(ConfigError, match=r"\[4, 3\] is needed"):
        kernels.dequantize(integers((4, 6), torch.int8, 0), *qparams((3, 4), torch.int8, 0), 1, 2)


def test_ranges_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"0 to 255 does not fit torch\.int8"):
        kernels.quantize(torch.randn(3), *qscalar(torch.int8, 0), dtype=torch.int8)
    with pytest.raises(ConfigError, match="-128 to 127"):
        kernels.quantize_per_token(torch.randn(3), dtype=torch.uint8)


# --- per token --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), DTYPES, SEEDS, st.booleans())
def test_quantize_per_token(shape: list[int], dtype: torch.dtype, seed: int, special: bool) -> None:
    x = numbers(tuple(shape), seed) if special else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    q, scale = both(kernels.quantize_per_token, x, *RANGES[dtype], dtype)
    assert q.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
    if not special and x.numel():
        zero_point = torch.full_like(scale, 128 if dtype is torch.uint8 else 0, dtype=torch.int32)
        error = kernels.dequantize(q, scale, zero_point, -1, -1) - x
        assert (error.abs() <= scale * 1.001).all()  # the positive extreme is half a step outside


def test_quantize_per_token_of_zeros_and_nan() -> None:
    q, scale = both(kernels.quantize_per_token, torch.tensor([[0.0, -0.0], [1.0, math.nan], [2.0, -4.0]]), -127, 127)
    assert q.tolist() == [[0, 0], [0, 0], [64, -127]]
    assert scale[0].item() == affine.MIN_SCALE and scale[1].isnan() and scale[2].item() == pytest.approx(4 / 127)


# --- lookup, add, mul -------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), DTYPES, DTYPES, SEEDS)
def test_lookup(n: int, dtype: torch.dtype, to: torch.dtype, seed: int) -> None:
    q, table = integers((n,), dtype, seed), integers((256,), to, seed + 1)
    out = both(kernels.lookup, q, table)
    assert out.tolist() == [table[value - RANGES[dtype][0]].item() for value in q.tolist()]


@pytest.mark.parametrize("memory", FORMATS)
def test_lookup_keeps_the_memory_format(memory: str) -> None:
    q = FORMATS[memory](integers((2, 3, 4, 5), torch.uint8, 0))
    out = both(kernels.lookup, q, torch.arange(255, -1, -1, dtype=torch.uint8))
    assert torch.equal(out, 255 - q)
    assert out.stride() == q.stride() or memory == "gaps"


def test_lookup_refuses() -> None:
    table = torch.zeros(256, dtype=torch.uint8)
    for q, entries in ((torch.zeros(2), table), (table, table[:255]), (table, table.float())):
        with pytest.raises(ConfigError, match="lookup needs"):
            kernels.lookup(q, entries)


@given(
    st.sampled_from([kernels.add, kernels.mul]),
    st.sampled_from([torch.uint8, torch.int8, torch.float32]),
    DTYPES,
    DTYPES,
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)]),
    SEEDS,
)
def test_add_and_mul(
    function: Callable[..., Tensor],
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    to: torch.dtype,
    memory: str,
    bounds: tuple[float, float],
    seed: int,
) -> None:
    shape = (2, 3, 5, 7)
    real = a_dtype is torch.float32
    a = FORMATS[memory](numbers(shape, seed) if real else integers(shape, a_dtype, seed))
    a_q = (None, None) if real else qscalar(a_dtype, seed)
    b, b_q = FORMATS[memory](integers(shape, b_dtype, seed + 1)), qscalar(b_dtype, seed + 1)
    out_q = qscalar(to, seed + 2)
    low, high = bounds
    quant_min, quant_max = RANGES[to]
    arguments = {"low": low, "high": high, "quant_min": quant_min, "quant_max": quant_max, "dtype": to}
    out = both(function, a, *a_q, b, *b_q, *out_q, **arguments)
    assert out.stride() == a.stride() or memory == "gaps"
    if not real:  # what it means
        x, y = affine.dequantize(a, *qscalar(a_dtype, seed)), affine.dequantize(b, *b_q)
        result = (x + y if function is kernels.add else x * y).clamp(low, high)
        assert torch.equal(out, kernels.quantize(result, *out_q, None, None, quant_min, quant_max, to))


@pytest.mark.parametrize("function", [kernels.add, kernels.mul])
def test_ties_that_the_last_bit_decides(function: Callable[..., Tensor]) -> None:
    """Half of these sums lie on a tie: a multiply-add with a single rounding would give other integers."""
    a = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256).contiguous()
    zero = torch.tensor(0, dtype=torch.int32)
    out_q = (torch.tensor(0.1), zero)
    both(function, a, torch.tensor(0.1), zero, a.t(), torch.tensor(0.05), zero, *out_q)
    both(function, a.float() * 0.1, None, None, a.t(), torch.tensor(0.05), zero, *out_q)


@pytest.mark.parametrize("a_shape", [(1,), (4, 1, 1), (2, 4, 3, 5), (2, 4, 1, 1)])
@pytest.mark.parametrize("b_shape", [(2, 4, 3, 5), (2, 1, 3, 5), (5,), ()])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_add_broadcasts(a_shape: tuple[int, ...], b_shape: tuple[int, ...], memory: str) -> None:
    a, b = (FORMATS[memory](integers(shape, torch.uint8, 5)) for shape in (a_shape, b_shape))
    out = both(kernels.add, a, *qscalar(torch.uint8, 1), b, *qscalar(torch.uint8, 2), *qscalar(torch.uint8, 3))
    assert out.shape == torch.broadcast_shapes(a_shape, b_shape)
    if (2, 4, 3, 5) in (a_shape, b_shape) and memory == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_add_of_different_formats_and_of_nothing() -> None:
    last = integers((2, 4, 3, 5), torch.uint8, 0).contiguous(memory_format=torch.channels_last)
    first = integers((2, 4, 3, 5), torch.uint8, 1)
    scales = [qscalar(torch.uint8, seed) for seed in range(3)]
    assert both(kernels.add, last, *scales[0], first, *scales[1], *scales[2]).stride() == last.stride()
    assert both(kernels.add, first, *scales[0], last, *scales[1], *scales[2]).stride() == first.stride()
    assert both(kernels.mul, first[:0], *scales[0], last[:0], *scales[1], *scales[2]).shape == (0, 4, 3, 5)


def test_add_refuses() -> None:
    q, one, many = integers((3,), torch.uint8, 0), qscalar(torch.uint8, 0), qparams((3,), torch.uint8, 0)
    with pytest.raises(ConfigError, match="several values"):
        kernels.add(q, *many, q, *one, *one)
    with pytest.raises(ConfigError, match=r"torch\.uint8 without a scale"):
        kernels.add(q, None, None, q, *one, *one)
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        kernels.mul(q, *one, q.float(), *one, *one)


# --- pooling ----------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape and arguments of a pooling that torch allows."""
    dims = draw(st.integers(1, 2))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * dims))
    sizes = [draw(st.integers(k, 12)) for k in kernel]
    arguments = {
        "kernel_size": kernel,
        "stride": draw(st.one_of(st.none(), st.integers(1, 4))),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
    }
    channels = draw(st.sampled_from([1, 3, 64, 70]))
    return (draw(st.integers(0, 2)), channels, *sizes), arguments


def formatted(shape: tuple[int, ...], dtype: torch.dtype, memory: str, seed: int) -> Tensor:
    x = integers(shape, dtype, seed)
    if memory == "channels_last" and x.ndim == 3:  # 1d: channels innermost
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return FORMATS[memory](x)


@given(pools(), DTYPES, st.sampled_from(sorted(FORMATS)), st.integers(1, 3), SEEDS)
def test_max_pool(
    pool: tuple[tuple[int, ...], dict[str, Any]], dtype: torch.dtype, memory: str, dilation: int, seed: int
) -> None:
    shape, arguments = pool
    reach = [dilation * (k - 1) + 1 for k in arguments["kernel_size"]]
    assume(all(size + 2 * p >= r for size, p, r in zip(shape[2:], arguments["padding"], reach, strict=True)))
    x = formatted(shape, dtype, memory, seed)
    out = both(kernels.max_pool, x, dilation=dilation, **arguments)
    if x.ndim == 4 and memory in ("contiguous", "channels_last") and x.numel():
        assert out.is_contiguous(memory_format=getattr(torch, memory.replace("contiguous", "contiguous_format")))
    if x.numel():
        function = F.max_pool2d if x.ndim == 4 else F.max_pool1d
        low = RANGES[dtype][0]
        assert torch.equal(out.float(), function(x.float(), dilation=dilation, **arguments).clamp(min=low))


@given(pools(), DTYPES, DTYPES, st.sampled_from(sorted(FORMATS)), st.booleans(), st.sampled_from([None, 1, 5]), SEEDS)
def test_avg_pool(
    pool: tuple[tuple[int, ...], dict[str, Any]],
    dtype: torch.dtype,
    to: torch.dtype,
    memory: str,
    include: bool,
    divisor: int | None,
    seed: int,
) -> None:
    shape, arguments = pool
    x = formatted(shape, dtype, memory, seed)
    qx, (out_scale, out_zero_point) = qscalar(dtype, seed), qscalar(to, seed + 1)
    out_scale = out_scale + qx[0]  # as a mean has it: not much smaller than the input's
    quant_min, quant_max = RANGES[to]
    limits = {"quant_min": quant_min, "quant_max": quant_max, "dtype": to}
    more = {"count_include_pad": include, "divisor_override": divisor}
    out = both(kernels.avg_pool, x, *qx, out_scale, out_zero_point, **arguments, **more, **limits)
    if x.numel() and (x.ndim == 4 or divisor is None):
        real = affine.dequantize(x, *qx).double()
        if x.ndim == 4:
            expected = F.avg_pool2d(real, **arguments, **more)
        else:
            expected = F.avg_pool1d(real, **arguments, count_include_pad=include)
        q = kernels.quantize(expected.float(), out_scale, out_zero_point, None, None, quant_min, quant_max, to)
        assert (q.int() - out.int()).abs().max() <= 1


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), DTYPES, st.sampled_from(sorted(FORMATS)), SEEDS)
def test_adaptive_avg_pool(h: int, w: int, size: int, dtype: torch.dtype, memory: str, seed: int) -> None:
    x = formatted((2, 5, h, w), dtype, memory, seed)
    qx, out_q = qscalar(dtype, seed), (torch.tensor(0.75), torch.tensor(7, dtype=torch.int32))
    for output_size in (size, (None, size)):
        out = both(kernels.adaptive_avg_pool, x, *qx, *out_q, output_size)
        expected = F.adaptive_avg_pool2d(affine.dequantize(x, *qx).double(), output_size)
        assert (kernels.quantize(expected.float(), *out_q).int() - out.int()).abs().max() <= 1


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sets(st.integers(-4, 3)),
    st.booleans(),
    DTYPES,
    st.sampled_from(sorted(FORMATS)),
    SEEDS,
)
@example([2, 70, 7, 7], {2, 3}, False, torch.uint8, "channels_last", 0)
@example([2, 9, 65], {1}, True, torch.int8, "contiguous", 0)
def test_mean(shape: list[int], dims: set[int], keepdim: bool, dtype: torch.dtype, memory: str, seed: int) -> None:
    dim = sorted(each for each in dims if -len(shape) <= each < len(shape))
    assume(len({each % len(shape) for each in dim}) == len(dim))
    x = FORMATS[memory](integers(tuple(shape), dtype, seed))
    qx, out_q = qscalar(dtype, seed), (torch.tensor(0.75), torch.tensor(7, dtype=torch.int32))
    out = both(kernels.mean, x, *qx, *out_q, dim, keepdim)
    expected = affine.dequantize(x, *qx).double().mean(dim, keepdim)
    assert out.shape == expected.shape
    assert (kernels.quantize(expected.float(), *out_q).int() - out.int()).abs().max() <= 1


def test_large_windows_sum_exactly() -> None:
    x = torch.full((1, 2, 300, 301), 255, dtype=torch.uint8)
    scale, zero_point = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    assert both(kernels.mean, x, scale, zero_point, scale, zero_point, (2, 3)).tolist() == [[255, 255]]


def test_pooling_refuses() -> None:
    x = integers((1, 2, 4, 4), torch.uint8, 0)
    with pytest.raises(ConfigError, match="padding at most half"):
        kernels.max_pool(x, 2, padding=2)
    with pytest.raises(ConfigError, match="window of 5 does not fit an input of 4"):
        kernels.max_pool(x, 5)
    with pytest.raises(ConfigError, match="stride 0"):
        kernels.max_pool(x, 2, 0)
    with pytest.raises(ConfigError, match="pooling takes uint8 or int8"):
        kernels.max_pool(x.float(), 2)


# --- which implementation runs ----------------------------------------------------------------------------------------


@given(batch=st.integers(0, 3), channels=st.integers(1, 6), height=st.integers(1, 40), width=st.integers(1, 40))
def test_quantize_in_channels_last_is_quantize(batch: int, channels: int, height: int, width: int) -> None:
    x = torch.randn(batch, channels, height, width)
    scale, zero_point = torch.tensor(0.05), torch.tensor(7, dtype=torch.int32)
    plain = kernels.quantize(x, scale, zero_point)
    last = kernels.quantize(x, scale, zero_point, channels_last=True)
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_every_loop_has_a_twin() -> None:
    assert kernels.LOOPS.keys() == kernels.ATEN.keys()


def test_fake_tensors_take_the_twin_and_leave_nothing_behind() -> None:
    with FakeTensorMode() as mode:
        image = mode.from_tensor(integers((1, 3, 11, 11), torch.uint8, 0))
        out = kernels.max_pool(image, 3, 2, 1)
        assert type(out) is type(image) and out.shape == (1, 3, 6, 6)
    both(kernels.max_pool, integers((1, 3, 11, 11), torch.uint8, 0), 3, 2, 1)


def run(program: str, **environment: str) -> str:
    root = str(Path(kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler() -> None:
    program = """
import torch
from qfx import kernels
print(kernels.backend())
print(kernels.quantize(torch.tensor([1.0]), torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)).tolist())
"""
    assert run(program, QFX_NO_JIT="1").splitlines() == ["aten: turned off by QFX_NO_JIT", "[5]"]


@pytest.mark.skipif(kernels.backend() != "c++", reason=kernels.backend())
def test_one_openmp_runtime_and_no_hang_after_fork() -> None:
    program = """
import os, signal, torch
from pathlib import Path
from qfx import kernels
torch.set_num_threads(2)
x, scale, zero_point = torch.randn(1_000_000), torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
# Starts the threads that a child does not have; compared as bytes, for torch.equal itself hangs in a child.
expected = kernels.quantize(x, scale, zero_point).numpy().tobytes()
maps = Path("/proc/self/maps").read_text().split()
print(len({word for word in maps if Path(word).name.startswith(("libgomp", "libiomp", "libomp"))}))
child = os.fork()
if child == 0:
    signal.alarm(20)  # kills a child that hangs
    same = all(kernels.quantize(x, scale, zero_point).numpy().tobytes() == expected for _ in range(3))
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
print(kernels.quantize(x, scale, zero_point).numpy().tobytes() == expected)
"""
    assert run(program).split() == ["1", "0", "True"]
