"""The torch.library operators: registration, shapes without data, gradients, and packed storage."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils.checkpoint
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
    "gaps, transposed": X.transpose(0, 2)[:, ::2],
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
        (ops.fake_quantize_backward, (x, ops.fake_quantize(x, scale, zero_point, axis, group_size, -128, 127)[1])),
        (ops.fake_quantize_learned, (x, scale, zero_point, axis, group_size, -128, 127, 0.5)),
        (ops.fake_quantize_learned_backward, (x, x, scale, zero_point, axis, group_size, -128, 127, 0.5)),
        (ops.min_max, (x,)),
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
@pytest.mark.parametrize("name", ["wants a gradient", "transposed"])
def test_opcheck(name: str, axis: int | None, group_size: int | None) -> None:
    for op, args in every_call(TENSORS[name], axis, group_size):
        torch.library.opcheck(op, args)
    x, scale, zero_point, *rest = every_call(TENSORS[name], axis, group_size)[4][1]
    fused = {"clamp_min": 0.0, "clamp_max": 1.0}
    torch.library.opcheck(ops.fake_quantize, (x, scale, zero_point, *rest), {**fused, "straight_through": True})
    learned = (x, scale.clone().requires_grad_(), zero_point, *rest, 0.5)
    torch.library.opcheck(ops.fake_quantize_learned, learned, fused)


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
    straight, _ = ops.fake_quantize(x, scale, zero_point, None, None, 0, 15, straight_through=True)
    x.grad = None
    straight.backward(torch.tensor([2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [2.0, 3.0, 4.0]


def test_gradients_of_a_learned_step() -> None:
    x = torch.tensor([-3.0, 0.2, 0.3, 9.0, math.nan], requires_grad=True)
    scale, zero_point = torch.tensor(0.5, requires_grad=True), torch.tensor(2, dtype=torch.int32)
    fake = ops.fake_quantize_learned(x, scale, zero_point, None, None, 0, 15, 0.25)
    assert fake.tolist() == [-1.0, 0.0, 0.5, 6.5, 0.0]
    fake.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 1.0]))
    assert x.grad is not None and x.grad.tolist() == [0.0, 10.0, 100.0, 0.0, 1.0]
    assert scale.grad is not None
    slopes = [0 - 2, 0 - 0.4, 1 - 0.6, 15 - 2, 0]
    want = 0.25 * sum(weight * slope for weight, slope in zip([1, 10, 100, 1000, 1], slopes, strict=True))
    assert float(scale.grad) == pytest.approx(want)


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


# --- training ---------------------------------------------------------------------------------------------------------

ZERO = torch.tensor(0, dtype=torch.int32)
Step = tuple[Tensor, Tensor, Tensor]


def training_step(x: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """A loss in which every differentiable operator takes part."""
    scale, zero_point = ops.choose_qparams(weight.detach(), 0, None, True, -7, 7)
    rounded = ops.fake_quantize(weight, scale, zero_point, 0, None, -7, 7, straight_through=True)[0]
    fused = ops.fake_quantize(x, step.detach(), ZERO, None, None, 0, 15, clamp_min=0.0, clamp_max=2.0)[0]
    learned = ops.fake_quantize_learned(x, step, ZERO, None, None, 0, 15, 0.3, clamp_min=0.0)
    return ((fused + learned) @ rounded.t()).square().mean()


def leaves() -> Step:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(7, 6, generator=generator), torch.randn(5, 6, generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), torch.tensor(0.1, requires_grad=True)


def gradients(loss: Tensor, wanted: Step) -> list[Tensor]:
    loss.backward()
    assert all(leaf.grad is not None for leaf in wanted)
    return [leaf.grad for leaf in wanted if leaf.grad is not None]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step_compiles_in_one_piece(backend: str) -> None:
    compiled = torch.compile(training_step, backend=backend, fullgraph=True)
    one, other = leaves(), leaves()
    for a, b in zip(gradients(training_step(*one), one), gradients(compiled(*other), other), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_changes_nothing() -> None:
    one, other = leaves(), leaves()
    again = torch.utils.checkpoint.checkpoint(training_step, *other, use_reentrant=False)
    for a, b in zip(gradients(training_step(*one), one), gradients(again, other), strict=True):
        assert torch.equal(a, b)


class Rounded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.step = torch.nn.Parameter(X.clone()), torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * ops.fake_quantize_learned(self.weight, self.step, ZERO, None, None, -7, 7, 0.1)


def test_parameters_and_deep_copies() -> None:
    model = Rounded()
    model(X).sum().backward()
    twin = copy.deepcopy(model)
    twin(X).sum().backward()
    assert model.step.grad is not None and twin.step.grad is not None
    assert torch.equal(twin.step.grad, model.step.grad)


def test_autocast_leaves_dtypes_alone() -> None:
    x, scale = X.bfloat16().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = ops.fake_quantize(X, scale, ZERO, None, None, -7, 7)[0]
        narrow = ops.fake_quantize_learned(x, scale, ZERO, None, None, -7, 7, 0.5)
    assert (plain.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    narrow.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
    assert scale.grad is not None and scale.grad.dtype is torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_graph(mode: Any) -> None:
    x, scale = X.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    with mode():
        assert ops.fake_quantize(x, scale, ZERO, None, None, -7, 7)[0].grad_fn is None
        assert ops.fake_quantize_learned(x, scale, ZERO, None, None, -7, 7, 0.5).grad_fn is None
    # Only what wants a gradient makes one.
    assert ops.fake_quantize(X, scale, ZERO, None, None, -7, 7)[0].grad_fn is None
    assert ops.fake_quantize_learned(X, scale, ZERO, None, None, -7, 7, 0.5).grad_fn is not None


def test_second_derivatives() -> None:
    x, scale = torch.tensor([-1.0, 0.2, 9.0], requires_grad=True), torch.tensor(0.5)
    y = ops.fake_quantize(x, scale, ZERO, None, None, 0, 15)[0]
    weight = torch.ones(3, requires_grad=True)
    (first,) = torch.autograd.grad(y, x, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)  # linear in what comes from above
    assert first.tolist() == second.tolist() == [0.0, 1.0, 0.0]
    learned = ops.fake_quantize_learned(x, scale.requires_grad_(), ZERO, None, None, 0, 15, 1.0)
    (first,) = torch.autograd.grad(learned.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gradients_of_any_layout() -> None:
    image = torch.randn(2, 3, 4, 5)
    scale = torch.tensor(0.3, requires_grad=True)
    weight = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for grad in (weight, weight.contiguous(), weight.contiguous(memory_format=torch.channels_last)):
            x = image.contiguous(memory_format=memory_format).requires_grad_()
            masked, _ = ops.fake_quantize(x, scale, ZERO, None, None, -2, 3)
            learned = ops.fake_quantize_learned(x, scale, ZERO, None, None, -2, 3, 1.0)
            results.append(torch.autograd.grad(masked, x, grad) + torch.autograd.grad(learned, (x, scale), grad))
            assert results[-1][0].stride() == x.stride()
    for masked_grad, learned_grad, scale_grad in results:
        assert torch.equal(masked_grad, results[0][0]) and torch.equal(learned_grad, results[0][0])
        torch.testing.assert_close(scale_grad, results[0][2])


def test_modes_see_the_calls() -> None:
    """What traces or counts operators must not be passed over by the short way to the loops."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: torch.autograd.grad(ops.fake_quantize(x, torch.tensor(0.5), ZERO, None, None, 0, 15)[0].sum(), x)[0]
    )(X.clone().requires_grad_())
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert {ops.fake_quantize, ops.fake_quantize_backward} <= called


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
    assert packed.shape == (*lead, -(-length * bits // 8))
    for unpack in (ops.unpack, ops.unpack_op):
        back = unpack(packed, bits, signed, length)
        assert back.dtype is element.dtype and back.is_contiguous()
        assert torch.equal(back, q)
    assert torch.equal(q, before)


def test_the_layout_of_packed_bytes() -> None:
    assert ops.pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert ops.pack(torch.tensor([-1, 1, 0, -2, 1], dtype=torch.int8), 2).tolist() == [0b10_00_01_11, 0b01]
    assert ops.pack(torch.tensor([-4, 3], dtype=torch.int8), 3).tolist() == [0b00_011_100]
    six = ops.pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 6)
    assert six.tolist() == [0b10_000001, 0b0011_0000, 0b000100_00]


def test_packing_takes_views() -> None:
    q = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    assert torch.equal(ops.unpack(ops.pack(q.t(), 4), 4, True, 6), q.t())
    assert torch.equal(ops.unpack(ops.pack(q[:, ::2], 4), 4, True, 3), q[:, ::2])
    assert ops.pack(q[:, :0], 4).shape == (6, 0)
    assert ops.unpack(ops.pack(q[:, :0], 4), 4, True, 0).shape == (6, 0)
