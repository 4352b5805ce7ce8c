"""Results that are worked out without torch are those that torch gives, or torch is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.ops import dequantize, quantize
from qfx.plain_results import plain_result

aten = torch.ops.aten

FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.int8, torch.bool])


def pair(least: int, most: int) -> st.SearchStrategy[list[int]]:
    """Mostly two numbers in these bounds, as an operator wants them."""
    number = st.integers(least, most)
    odd = st.lists(st.integers(-1, 3), min_size=1, max_size=2)
    return st.integers(0, 9).flatmap(lambda i: st.lists(number, min_size=2, max_size=2) if i else odd)


def meta(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def laid_out(data: st.DataObject, dims: int, dtype: torch.dtype, least: int = 0) -> Tensor:
    """A tensor whose elements need not lie in the order of its dimensions."""
    shape = data.draw(st.lists(st.integers(least, 6), min_size=dims, max_size=dims))
    layout = data.draw(st.sampled_from(["plain", "plain", "plain", "last", "turned", "apart"]))
    if layout == "last" and dims == 4:
        return meta(shape, dtype).to(memory_format=torch.channels_last)
    if layout == "turned" and dims > 1:
        return meta(shape[::-1], dtype).permute(*range(dims)[::-1])
    if layout == "apart":
        return meta([2 * n for n in shape], dtype)[(slice(None, None, 2),) * dims]
    return meta(shape, dtype)


def check(target: Any, *args: Any) -> bool:
    """Hold what is found to torch's own result; returns whether anything was found."""
    found = plain_result(target, args, {})
    if found is None:
        return False
    want = target(*args)
    assert (found.shape, found.stride(), found.dtype, found.device) == (
        want.shape, want.stride(), want.dtype, want.device,
    )  # fmt: skip
    return True


@pytest.mark.parametrize("target", [aten.relu.default, aten.gelu.default, aten.tanh.default, aten.hardswish.default])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_of_one_tensor(target: Any, data: st.DataObject) -> None:
    x = laid_out(data, data.draw(st.integers(0, 5)), data.draw(DTYPES))
    plain = x.is_floating_point() and x.numel() > 0 and x.stride() == meta(x.shape).stride()
    assert check(target, x) == plain


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(), (0.0,), (0, 6), (6.0, 0.0), (0.0, float("nan")), (True, 2.0)]))
def test_hardtanh(data: st.DataObject, bounds: tuple[Any, ...]) -> None:
    check(aten.hardtanh.default, laid_out(data, data.draw(st.integers(0, 4)), data.draw(DTYPES)), *bounds)


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.mul.Tensor])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_two_tensors(target: Any, data: st.DataObject) -> None:
    x = laid_out(data, data.draw(st.integers(0, 4)), data.draw(DTYPES), 1)
    row = meta((1, *x.shape[1:]), x.dtype)
    pairs = {"same": (x, x), "dtype": (x, x.to(torch.float64)), "number": (x, 2.0), "row": (x, row), "rows": (row, x)}
    check(target, *pairs[data.draw(st.sampled_from(list(pairs)))])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_linear(data: st.DataObject) -> None:
    dtype = data.draw(FLOATS)
    x = laid_out(data, data.draw(st.integers(1, 4)), dtype, 1)
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([x.shape[-1], x.shape[-1], 3]))
    bias = data.draw(st.sampled_from([None, meta(rows, dtype), meta(rows + 1, dtype), meta((1, rows), dtype)]))
    check(aten.linear.default, x, meta((rows, columns), dtype), bias)


def test_linear_with_a_number_for_a_bias_is_asked_of_torch() -> None:
    assert not check(aten.linear.default, meta((2, 3)), meta((4, 3)), 1.0)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_convolution(data: st.DataObject) -> None:
    x = laid_out(data, data.draw(st.sampled_from([3, 4, 4, 4, 4, 4])), torch.float32, 1)
    groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
    out = data.draw(st.integers(1, 6))
    within = data.draw(st.sampled_from([x.shape[1] // groups] * 4 + [1]))
    weight = meta((out, within, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))))
    bias = data.draw(st.sampled_from([None, None, meta(out), meta(out), meta(out + 1)]))
    stride, padding, dilation = data.draw(pair(1, 3)), data.draw(pair(0, 2)), data.draw(pair(1, 3))
    check(aten.conv2d.default, x, weight, bias, stride, padding, dilation, groups)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_max_pool(data: st.DataObject) -> None:
    least = data.draw(st.sampled_from([0, 3, 3]))
    x = laid_out(data, data.draw(st.sampled_from([3, 4, 4, 4])), data.draw(DTYPES), least)
    args = [data.draw(pair(1, 4)), data.draw(pair(1, 3) | st.just([])), data.draw(pair(0, 2))]
    check(aten.max_pool2d.default, x, *args[: data.draw(st.integers(1, 3))])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([[1, 1], (1, 1), [1], [2, 2], [7, 1]]))
def test_average_pool(data: st.DataObject, size: Any) -> None:
    check(aten.adaptive_avg_pool2d.default, laid_out(data, data.draw(st.sampled_from([3, 4, 4])), torch.float32), size)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([torch.uint8, torch.int8, torch.int32]))
def test_roundings(data: st.DataObject, dtype: torch.dtype) -> None:
    x = laid_out(data, data.draw(st.integers(0, 4)), torch.float32)
    scale, zero_point = meta(()), meta((), torch.int32)
    check(quantize, x, scale, zero_point, None, None, 0, 127, dtype)
    q = laid_out(data, data.draw(st.integers(0, 4)), dtype)
    check(dequantize, q, scale, zero_point, None, None, torch.float32)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.conv2d.default, (meta((2, 4, 9, 9)), meta((6, 2, 3, 3)), meta(6), [2, 2], [1, 1], [1, 1], 2)),
        (aten.conv2d.default, (meta((2, 4, 9, 9)), meta((6, 4, 3, 3)))),
        (aten.max_pool2d.default, (meta((2, 4, 9, 9)), [3, 3], [2, 2], [1, 1])),
        (aten.linear.default, (meta((2, 3)), meta((4, 3)), meta(4))),
        (aten.adaptive_avg_pool2d.default, (meta((2, 4, 9, 9)), [1, 1])),
        (aten.add.Tensor, (meta((2, 4)), meta((2, 4)))),
        (aten.hardtanh.default, (meta((2, 4)), 0.0, 6.0)),
    ],
    ids=str,
)
def test_what_networks_do_is_settled(target: Any, args: tuple[Any, ...]) -> None:
    assert check(target, *args)


def test_what_is_not_settled_is_asked_of_torch() -> None:
    x = meta((2, 3))
    assert plain_result(aten.relu.default, (x,), {"out": x}) is None
    assert plain_result(aten.relu.default, (x, x), {}) is None
    assert plain_result(dequantize, (x.to(torch.int8), x, x, None, None, torch.float32, None), {}) is None
    assert plain_result(aten.gelu.default, (x,), {"approximate": "tanh"}) is None
    assert plain_result(aten.exp.default, (x,), {}) is None
    assert plain_result(aten.relu.default, (1.0,), {}) is None
    assert plain_result(aten.zeros.default, (), {}) is None
