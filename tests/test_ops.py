"""The torch.library operators: registration, shapes without data, gradients, and packed storage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx import affine, ops
from qfx.spec import IntType

LAYOUTS = [(None, None), (1, None), (0, 4), (1, 4), (2, 2), (-1, -1), (1, -1)]
X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "contiguous": X,
    "transposed": X.transpose(0, 2),
    "gaps": X[:, ::2],
    "expanded": X[:, :1].expand(4, 6, 5),
    "channels last": X.reshape(2, 6, 5, 2).contiguous(memory_format=torch.channels_last),
    "half": X.half(),
    "bfloat16": X.bfloat16(),
    "double": X.double(),
    "wants a gradient": X.clone().requires_grad_(),
    "empty": X[:0],
}
layouts = pytest.mark.parametrize(("axis", "group_size"), LAYOUTS)
tensors = pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS.keys())


def every_call(x: Tensor, axis: int | None, group_size: int | None) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments for ``x``."""
    scale, zero_point = ops.choose_qparams(x, axis, group_size, False, -128, 127)
    q = ops.quantize(x, scale, zero_point, axis, group_size, -128, 127, torch.int8)
    return [
        (ops.choose_qparams, (x, axis, group_size, True, -127, 127)),
        (ops.choose_qparams, (x, axis, group_size, False, 0, 255)),
        (ops.quantize, (x, scale, zero_point, axis, group_size, -128, 127, torch.int8)),
        (ops.dequantize, (q, scale, zero_point, axis, group_size, x.dtype)),
        (ops.fake_quantize, (x, scale, zero_point, axis, group_size, -128, 127)),
    ]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@tensors
@layouts
def test_shapes_dtypes_and_strides_without_data(x: Tensor, axis: int | None, group_size: int | None) -> None:
    for op, args in every_call(x.detach(), axis, group_size):
        want = as_tuple(op(*args))
        with FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            got = as_tuple(op(*fake_args))
        for real, fake in zip(want, got, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype), op
            assert fake.stride() == real.stride(), op


@pytest.mark.parametrize(("axis", "group_size"), [(None, None), (1, None), (1, 4)])
@pytest.mark.parametrize("name", ["contiguous", "wants a gradient", "transposed"])
def test_opcheck(name: str, axis: int | None, group_size: int | None) -> None:
    for op, args in every_call(TENSORS[name], axis, group_size):
        torch.library.opcheck(op, args)


def test_opcheck_of_unpack() -> None:
    packed = ops.pack(torch.randint(-8, 8, (3, 5), dtype=torch.int8), 4)
    torch.library.opcheck(ops.unpack_op, (packed, 4, True, 5))
    torch.library.opcheck(ops.unpack_op, (packed, 4, False, 5))


@layouts
def test_operators_are_the_pure_functions(axis: int | None, group_size: int | None) -> None:
    layout = {"axis": axis, "group_size": group_size}
    low, high = affine.min_max(X, axis, group_size)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=False, quant_min=0, quant_max=15)
    chosen = ops.choose_qparams(X, axis, group_size, False, 0, 15)
    assert torch.equal(chosen[0], scale) and torch.equal(chosen[1], zero_point)
    bounds = {"quant_min": 0, "quant_max": 15}
    q = ops.quantize(X, scale, zero_point, axis, group_size, 0, 15, torch.uint8)
    assert torch.equal(q, affine.quantize(X, scale, zero_point, **layout, **bounds, dtype=torch.uint8))
    back = ops.dequantize(q, scale, zero_point, axis, group_size, torch.bfloat16)
    assert torch.equal(back, affine.dequantize(q, scale, zero_point, **layout, dtype=torch.bfloat16))
    fake, mask = ops.fake_quantize(X, scale, zero_point, axis, group_size, 0, 15)
    want, inside = affine.fake_quantize(X, scale, zero_point, **layout, **bounds)
    assert torch.equal(fake, want) and torch.equal(mask, inside)


def test_gradients() -> None:
    x = torch.tensor([-3.0, 0.2, 9.0], requires_grad=True)
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(2, dtype=torch.int32)
    fake, mask = ops.fake_quantize(x, scale, zero_point, None, None, 0, 15)
    assert not mask.requires_grad
    fake.backward(torch.tensor([2.0, 3.0, 4.0]))
    assert x.grad is not None and x.grad.tolist() == [0.0, 3.0, 0.0]
    assert scale.grad is None


@pytest.mark.filterwarnings("error")
def test_integers_carry_no_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero_point = ops.choose_qparams(x, -1, -1, True, -128, 127)
    q = ops.quantize(x, scale, zero_point, -1, -1, -128, 127, torch.int8)
    back = ops.dequantize(q, scale, zero_point, -1, -1, torch.float32)
    assert not scale.requires_grad and not back.requires_grad
    (x * back).sum().backward()  # no warning about a missing formula
    assert x.grad is not None and torch.equal(x.grad, back)


def test_gradients_of_half_precision_keep_their_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(4, dtype=dtype, requires_grad=True)
        scale, zero_point = ops.choose_qparams(x, None, None, False, 0, 255)
        ops.fake_quantize(x, scale, zero_point, None, None, 0, 255)[0].sum().backward()
        assert x.grad is not None and x.grad.dtype is dtype


def test_a_graph_of_them_compiles_in_one_piece_with_a_dynamic_batch() -> None:
    def run(x: Tensor) -> Tensor:
        scale, zero_point = ops.choose_qparams(x, 1, 2, True, -128, 127)
        q = ops.quantize(x, scale, zero_point, 1, 2, -128, 127, torch.int8)
        back = ops.dequantize(q, scale, zero_point, 1, 2, torch.float32)
        return ops.fake_quantize(back, scale, zero_point, 1, 2, -64, 63)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 5)
        assert torch.equal(compiled(x), run(x))


# --- packing ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(2, 8), st.booleans(), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 13), st.integers(0, 2**31)
)
def test_packing_loses_nothing(bits: int, signed: bool, lead: list[int], length: int, seed: int) -> None:
    element = IntType(bits, signed)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(element.quant_min, element.quant_max + 1, (*lead, length), generator=generator)
    q = q.to(element.dtype)
    before = copy.deepcopy(q)
    packed = ops.pack(q, bits)
    assert packed.shape == (*lead, -(-length * ops.storage_bits(bits) // 8))
    for unpack in (ops.unpack, ops.unpack_op):
        back = unpack(packed, bits, signed, length)
        assert back.dtype is element.dtype and back.is_contiguous()
        assert torch.equal(back, q)
    assert torch.equal(q, before)


def test_the_layout_of_packed_bytes() -> None:
    assert ops.pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert ops.pack(torch.tensor([-1, 1, 0, -2, 1], dtype=torch.int8), 2).tolist() == [0b10_00_01_11, 0b01]
    assert ops.pack(torch.tensor([-4, 3], dtype=torch.int8), 3).tolist() == [0x3C]
    assert [ops.storage_bits(b) for b in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


def test_packing_takes_views() -> None:
    q = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    assert torch.equal(ops.unpack(ops.pack(q.t(), 4), 4, True, 6), q.t())
    assert torch.equal(ops.unpack(ops.pack(q[:, ::2], 4), 4, True, 3), q[:, ::2])
    assert ops.pack(q[:, :0], 4).shape == (6, 0)
    assert ops.unpack(ops.pack(q[:, :0], 4), 4, True, 0).shape == (6, 0)
