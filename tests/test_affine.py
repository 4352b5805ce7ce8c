"""Affine numerics: properties, every granularity against a slow loop, and equality with torch's own operators."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from qfx import affine, ops
from qfx.spec import IntType, QuantSpec, Scheme

SEEDS = st.integers(0, 2**31)
Layout = tuple[tuple[int, ...], int | None, int | None]


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, int, torch.dtype]:
    """``quant_min, quant_max, dtype`` of every integer type, narrow or not."""
    element = IntType(draw(st.integers(2, 8)), draw(st.booleans()))
    spec = QuantSpec(element, narrow_range=draw(st.booleans()))
    return spec.quant_min, spec.quant_max, element.dtype


Limits = tuple[int, int, torch.dtype]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Shape, axis and group size; groups may be ragged or larger than the axis."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    kind = draw(st.sampled_from(["tensor", "axis", "group", "token"]))
    axis = None if kind == "tensor" else draw(st.integers(-len(shape), len(shape) - 1))
    return shape, axis, {"group": draw(st.integers(1, 7)), "token": -1}.get(kind)


def data(shape: tuple[int, ...], seed: int, span: float = 10.0) -> Tensor:
    """Values of several magnitudes, some zero, at times one-sided."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * span ** torch.randn(shape, generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x)
    return (x, x.abs(), -x.abs())[seed % 3]


def cells(
    shape: tuple[int, ...], axis: int | None, group_size: int | None
) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """For every index of the scale: the indices of the elements that it serves. Slow and obvious."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in itertools.product(*(range(n) for n in shape)):
        if axis is None:
            key: tuple[int, ...] = ()
        elif group_size is None:
            key = (index[axis],)
        else:
            where = list(index)
            where[axis] = 0 if group_size == -1 else index[axis] // group_size
            key = tuple(where)
        found.setdefault(key, []).append(index)
    return list(found.items())


# --- every granularity ------------------------------------------------------------------------------------------------


@given(layouts(), limits(), st.booleans(), SEEDS)
@example(((3, 5), -1, 4), (-7, 7, torch.int8), True, 0)
@example(((5, 3), 0, 4), (0, 15, torch.uint8), False, 0)
@example(((2, 3, 4), 1, 2), (-2, 1, torch.int8), False, 1)
def test_every_granularity_is_a_loop_over_its_groups(layout: Layout, limit: Limits, symmetric: bool, seed: int) -> None:
    (shape, axis, group_size), (quant_min, quant_max, dtype) = layout, limit
    x = data(shape, seed)
    bounds = {"quant_min": quant_min, "quant_max": quant_max}
    low, high = affine.min_max(x, axis, group_size)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=symmetric, **bounds)
    q = affine.quantize(x, scale, zero_point, axis=axis, group_size=group_size, **bounds, dtype=dtype)
    back = affine.dequantize(q, scale, zero_point, axis=axis, group_size=group_size)
    fake, mask = affine.fake_quantize(x, scale, zero_point, axis=axis, group_size=group_size, **bounds)

    groups = cells(shape, axis, group_size)
    assert list(scale.shape) == affine.scale_shape(x, axis, group_size)
    assert scale.numel() == len(groups)
    assert (scale.dtype, zero_point.dtype, q.dtype, mask.dtype) == (torch.float32, torch.int32, dtype, torch.bool)
    for key, members in groups:
        part = torch.stack([x[i] for i in members])
        s, z = affine.choose_qparams(part.min(), part.max(), symmetric=symmetric, **bounds)
        assert (scale[key], zero_point[key]) == (s, z)
        for i in members:
            want = max(quant_min, min(quant_max, round(float(x[i] * (1 / s))) + int(z)))
            assert int(q[i]) == want
            assert back[i] == (want - z) * s == fake[i]


@given(layouts(), SEEDS)
def test_min_max_owns_its_memory(layout: Layout, seed: int) -> None:
    shape, axis, group_size = layout
    x = data(shape, seed)
    before = [t.clone() for t in affine.min_max(x, axis, group_size)]
    kept = affine.min_max(x, axis, group_size)
    x.fill_(1e9)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "expected"),
    [
        ((0,), None, None, []),
        ((3, 0), 0, None, [3]),
        ((3, 0), -1, -1, [3, 1]),
        ((0, 5), 1, 2, [0, 3]),
        ((0, 5), 1, -1, [0, 1]),
    ],
)
def test_an_empty_tensor_has_finite_qparams(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, expected: list[int]
) -> None:
    x = torch.zeros(shape)
    scale, zero_point = affine.choose_qparams(
        *affine.min_max(x, axis, group_size), symmetric=False, quant_min=0, quant_max=255
    )
    assert list(scale.shape) == list(zero_point.shape) == expected
    q = affine.quantize(
        x, scale, zero_point, axis=axis, group_size=group_size, quant_min=0, quant_max=255, dtype=torch.uint8
    )
    assert q.shape == x.shape


# --- properties -------------------------------------------------------------------------------------------------------


def qparams_of(x: Tensor, symmetric: bool, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    return affine.choose_qparams(*torch.aminmax(x), symmetric=symmetric, quant_min=quant_min, quant_max=quant_max)


@given(limits(), st.booleans(), SEEDS)
def test_the_error_inside_the_range_is_at_most_half_a_step(limit: Limits, symmetric: bool, seed: int) -> None:
    quant_min, quant_max, dtype = limit
    x = data((200,), seed, span=3.0)
    scale, zero_point = qparams_of(x, symmetric, quant_min, quant_max)
    q = affine.quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype)
    error = (affine.dequantize(q, scale, zero_point).double() - x.double()).abs()
    assert float(error.max()) <= float(scale) * (0.5 + 1e-4)


@given(st.floats(2.0**-60, 2.0**40, width=32))
@example(2.0**-60)
@example(2.0**-24)
@example(2.0**-14)
@example(65504.0)
@example(1e30)
def test_a_representable_scale_is_the_next_value_of_float16(scale: float) -> None:
    found = affine.representable_scale(torch.tensor(scale), torch.float16)
    assert found.dtype is torch.float32
    assert found.half().float() == found and math.isfinite(found)
    assert affine.representable_scale(found, torch.float16) == found
    assert found >= min(scale, 65504.0)
    below = (found.half().view(torch.int16) - 1).view(torch.float16)
    assert float(below) < scale, "the value below it would have done"
    assert affine.representable_scale(torch.tensor(scale), torch.float32) == torch.tensor(scale)


@given(layouts(), limits(), st.booleans(), SEEDS)
def test_float16_scales_bound_the_error_too(layout: Layout, limit: Limits, symmetric: bool, seed: int) -> None:
    (shape, axis, group_size), (quant_min, quant_max, dtype) = layout, limit
    x = data(shape, seed, span=3.0)
    low, high = affine.min_max(x, axis, group_size)
    where = {"axis": axis, "group_size": group_size}
    bounds = {"quant_min": quant_min, "quant_max": quant_max}
    how = {"symmetric": symmetric, "scale_dtype": torch.float16}
    scale, zero_point = affine.choose_qparams(low, high, **how, **bounds)  # type: ignore[arg-type]
    wide, _ = affine.choose_qparams(low, high, symmetric=symmetric, **bounds)
    assert torch.equal(scale, affine.representable_scale(wide, torch.float16))
    q = affine.quantize(x, scale, zero_point, **where, **bounds, dtype=dtype)
    error = (affine.dequantize(q, scale, zero_point, **where).double() - x.double()).abs()
    assert bool((error <= affine.expand_qparam(scale, x, axis, group_size) * (0.5 + 1e-4)).all())


def test_zero_points_belong_to_float16_scales() -> None:
    low, high = -torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [-1.0]])
    how = {"symmetric": False, "quant_min": 0, "quant_max": 255}
    scale, zero_point = affine.choose_qparams(low, high, **how, scale_dtype=torch.float16)  # type: ignore[arg-type]
    assert torch.equal(zero_point, -torch.round(low / scale).int())
    _, of_wide = affine.choose_qparams(low, high, **how)  # type: ignore[arg-type]
    assert not torch.equal(zero_point, of_wide)


@given(limits(), st.booleans(), SEEDS)
def test_quantize_is_monotone(limit: Limits, symmetric: bool, seed: int) -> None:
    quant_min, quant_max, dtype = limit
    x = data((200,), seed).sort().values
    scale, zero_point = qparams_of(x, symmetric, quant_min, quant_max)
    q = affine.quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype).int()
    assert bool((q.diff() >= 0).all())
    assert quant_min <= int(q.min()) <= int(q.max()) <= quant_max


@given(limits(), st.booleans(), st.floats(-(2.0**100), 2.0**100), st.floats(-(2.0**100), 2.0**100))
@example((0, 255, torch.uint8), False, 5.0, 6.0)
@example((0, 255, torch.uint8), False, -6.0, -5.0)
@example((-127, 127, torch.int8), True, 0.0, 1e-30)
def test_zero_is_exact(limit: Limits, symmetric: bool, a: float, b: float) -> None:
    quant_min, quant_max, dtype = limit
    ends = torch.tensor(sorted((a, b)))
    scale, zero_point = qparams_of(ends, symmetric, quant_min, quant_max)
    assert quant_min <= int(zero_point) <= quant_max
    q = affine.quantize(torch.zeros(1), scale, zero_point, quant_min=quant_min, quant_max=quant_max, dtype=dtype)
    assert int(q) == int(zero_point)
    assert float(affine.dequantize(q, scale, zero_point)) == 0.0


@given(layouts(), limits(), st.booleans(), SEEDS)
def test_fake_quantize_is_idempotent(layout: Layout, limit: Limits, symmetric: bool, seed: int) -> None:
    (shape, axis, group_size), (quant_min, quant_max, _) = layout, limit
    x = data(shape, seed)
    bounds = {"quant_min": quant_min, "quant_max": quant_max}
    qparams = affine.choose_qparams(*affine.min_max(x, axis, group_size), symmetric=symmetric, **bounds)
    once, _ = affine.fake_quantize(x, *qparams, axis=axis, group_size=group_size, **bounds)
    twice, mask = affine.fake_quantize(once, *qparams, axis=axis, group_size=group_size, **bounds)
    assert torch.equal(once, twice)
    assert bool(mask.all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "values",
    [
        [5.0] * 4,
        [-5.0] * 4,
        [0.0] * 4,
        [1.0, 2.0],
        [-2.0, -1.0],
        [-1e-30, 1e-30],
        [-1e30, 1e30],
        [3e38, -3e38],
        [1e-45],
    ],
    ids=str,
)
def test_odd_ranges_stay_finite(values: list[float], bits: int, symmetric: bool) -> None:
    x, element = torch.tensor(values), IntType(bits, True)
    bounds = {"quant_min": element.quant_min, "quant_max": element.quant_max}
    scale, zero_point = qparams_of(x, symmetric, **bounds)
    assert math.isfinite(scale) and float(scale) >= affine.MIN_SCALE
    fake, _ = affine.fake_quantize(x, scale, zero_point, **bounds)
    assert bool(fake.isfinite().all())
    assert float((fake - x).abs().max()) <= float(scale) * (0.5 + 1e-4)


def test_a_constant_survives_affine() -> None:
    x = torch.full((3,), 5.0)
    scale, zero_point = qparams_of(x, False, 0, 255)
    assert torch.equal(affine.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=255)[0], x)


def test_saturation_nan_and_the_ends_of_int32() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38])
    scale, zero_point = torch.tensor(1e-6), torch.tensor(3, dtype=torch.int32)
    q = affine.quantize(x, scale, zero_point, quant_min=0, quant_max=255, dtype=torch.uint8)
    assert q.tolist() == [255, 0, 3, 255, 0]
    wide = affine.quantize(
        torch.tensor([1e10, -1e10]),
        torch.tensor(1.0),
        torch.tensor(0, dtype=torch.int32),
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        dtype=torch.int32,
    )
    assert wide.tolist() == [2**31 - 1, -(2**31)]


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    q = affine.quantize(x, one, zero, quant_min=-8, quant_max=7, dtype=torch.int8)
    assert q.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype)
    scale, zero_point = qparams_of(x, False, 0, 255)
    assert scale.dtype is torch.float32
    bounds = {"quant_min": 0, "quant_max": 255}
    fake, _ = affine.fake_quantize(x, scale, zero_point, **bounds)
    wide, _ = affine.fake_quantize(x.float(), scale, zero_point, **bounds)
    assert fake.dtype is dtype
    assert torch.equal(fake, wide.to(dtype))
    q = affine.quantize(x, scale, zero_point, **bounds, dtype=torch.uint8)
    assert torch.equal(affine.dequantize(q, scale, zero_point, dtype=dtype), fake)


# --- torch's own ------------------------------------------------------------------------------------------------------


def edges(scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """Every level, every border between two, both ends of the range and what lies just beyond."""
    halves = torch.arange(2 * (quant_min - zero_point) - 4, 2 * (quant_max - zero_point) + 5) / 2
    x = halves * scale
    return torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))])


@given(limits(), SEEDS)
@example((0, 255, torch.uint8), 0)
def test_fake_quantize_per_tensor_is_torchs(limit: Limits, seed: int) -> None:
    quant_min, quant_max, _ = limit
    generator = torch.Generator().manual_seed(seed)
    power = float(2.0 ** torch.randint(-6, 4, (), generator=generator))
    size = power if seed % 2 else float(torch.rand((), generator=generator) + 0.01)  # exact and inexact borders
    zero = int(torch.randint(quant_min, quant_max + 1, (), generator=generator))
    x = torch.cat([edges(size, zero, quant_min, quant_max), data((100,), seed)])
    scale, zero_point = torch.tensor(size), torch.tensor(zero, dtype=torch.int32)

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, _ = ops.fake_quantize(ours, scale, zero_point, None, None, quant_min, quant_max)
    want = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, quant_min, quant_max)
    assert torch.equal(got, want)
    weight = torch.randn(x.shape, generator=generator)
    got.backward(weight)
    want.backward(weight)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    plain, _ = affine.fake_quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    assert torch.equal(plain, want)


@given(limits(), st.integers(0, 2), SEEDS)
def test_fake_quantize_per_channel_is_torchs(limit: Limits, axis: int, seed: int) -> None:
    quant_min, quant_max, _ = limit
    generator = torch.Generator().manual_seed(seed)
    x = data((3, 4, 5), seed)
    count = x.shape[axis]
    scale = torch.rand(count, generator=generator) + 0.01
    zero_point = torch.randint(quant_min, quant_max + 1, (count,), generator=generator, dtype=torch.int32)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, _ = ops.fake_quantize(ours, scale, zero_point, axis, None, quant_min, quant_max)
    want = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point, axis, quant_min, quant_max)
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


ACTIVATIONS = {
    (0.0, None): torch.nn.functional.relu,
    (0.0, 6.0): torch.nn.functional.relu6,
    (-1.0, 1.5): lambda x: torch.nn.functional.hardtanh(x, -1.0, 1.5),
}


@pytest.mark.parametrize("bounds", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.5, 0), (0.5, 3), (0.07, 0), (0.4, 5)])
@pytest.mark.parametrize("straight", [False, True])
def test_a_fused_clamp_is_torchs_activation_in_front(
    bounds: tuple[float, float | None], scale: float, zero_point: int, straight: bool
) -> None:
    """Elements on both edges too: of the activation and, where they differ, of the representable range."""
    ends = torch.tensor([bound for bound in bounds if bound is not None])
    x = torch.cat([edges(scale, zero_point, 0, 15), ends, ends.nextafter(-torch.ones(())), ends.nextafter(ends + 1)])
    step, zero = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    clamps = {"clamp_min": bounds[0], "clamp_max": bounds[1]}
    got, mask = ops.fake_quantize(ours, step, zero, None, None, 0, 15, **clamps, straight_through=straight)
    real = ACTIVATIONS[bounds](theirs)
    want = torch.fake_quantize_per_tensor_affine(real, step, zero, 0, 15)
    assert torch.equal(got, want)
    weight = torch.rand(x.shape) + 0.5
    got.backward(weight)
    (real if straight else want).backward(weight)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(mask, theirs.grad != 0)


def composite(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, limit: tuple[int, int]
) -> Tensor:
    """Fake quantization out of differentiable operators: in backward rounding is the identity, the rest autograd's."""
    step, offset = (affine.expand_qparam(p, x, axis, group_size) for p in (scale, zero_point))
    v = x * (1.0 / step)
    rounded = v + (torch.round(v) - v).detach()
    return (torch.clamp(rounded + offset, *limit) - offset) * step


@given(layouts(), limits(), st.sampled_from([None, *ACTIVATIONS]), SEEDS)
def test_learned_step_is_autograd_through_the_composite(
    layout: Layout, limit: Limits, bounds: tuple[float, float | None] | None, seed: int
) -> None:
    (shape, axis, group_size), (quant_min, quant_max, _) = layout, limit
    generator = torch.Generator().manual_seed(seed)
    x, scales = data(shape, seed, span=3.0), affine.scale_shape(torch.empty(shape), axis, group_size)
    scale = torch.rand(scales, generator=generator) + 0.01
    zero_point = torch.randint(quant_min, quant_max + 1, scales, generator=generator, dtype=torch.int32)
    weight = torch.randn(shape, generator=generator)
    ours = (x.clone().requires_grad_(), scale.clone().requires_grad_())
    theirs = (x.clone().requires_grad_(), scale.clone().requires_grad_())
    low, high = bounds or (None, None)
    got = ops.fake_quantize_learned(
        *(*ours, zero_point, axis, group_size, quant_min, quant_max, 0.25), clamp_min=low, clamp_max=high
    )
    real = ACTIVATIONS[bounds](theirs[0]) if bounds else theirs[0]
    want = composite(real, theirs[1], zero_point, axis, group_size, (quant_min, quant_max))
    torch.testing.assert_close(got, want)
    grad_x, grad_scale = torch.autograd.grad(got, ours, weight)
    want_x, want_scale = torch.autograd.grad(want, theirs, weight)
    torch.testing.assert_close(grad_x, want_x)
    # Autograd finds round(v) - v as a difference of two float32 sums that are as large as the levels.
    torch.testing.assert_close(grad_scale, want_scale * 0.25, rtol=1e-4, atol=2e-3)


@given(limits(), SEEDS)
def test_learned_step_is_torchs_learnable(limit: Limits, seed: int) -> None:
    """Away from ties: torch rounds ``x / scale + zero_point`` as a whole, so that with an odd zero point its ties go
    the other way (its own fake_quantize_per_tensor_affine rounds as we do). Without negative zero points per tensor:
    torch's backward truncates ``zero_point + 0.5`` and takes one more than its forward."""
    quant_min, quant_max, _ = limit
    assume(quant_min <= 0)  # torch's range must hold zero
    generator = torch.Generator().manual_seed(seed)
    zero = int(torch.randint(quant_min, quant_max + 1, (), generator=generator))
    levels = torch.randint(quant_min - zero - 3, quant_max - zero + 4, (4, 50), generator=generator)
    scale = torch.rand(4, generator=generator) + 0.01
    x = (levels + (torch.rand(4, 50, generator=generator) - 0.5) * 0.9) * scale[:, None]
    weight = torch.randn(4, 50, generator=generator)
    zeros = torch.full((4,), float(zero))
    for axis, step, theirs in (
        (None, scale[:1], torch._fake_quantize_learnable_per_tensor_affine),
        (0, scale, lambda x, s, z, *rest: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, *rest)),
    ):
        if axis is None and zero < 0:
            continue
        step = step.clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        want = theirs(leaf, step, zeros[: len(step)], quant_min, quant_max, 0.25)
        offsets = zeros[: len(step)].int()
        got = ops.fake_quantize_learned(leaf, step, offsets, axis, None, quant_min, quant_max, 0.25)
        assert torch.equal(got, want)
        for ours, torchs in zip(*(torch.autograd.grad(y, (leaf, step), weight) for y in (got, want)), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-3)


def test_learned_step_is_torchs_learnable_on_every_edge_of_a_symmetric_scheme() -> None:
    x = edges(0.25, 0, -8, 7).requires_grad_()
    scale, zero = torch.tensor([0.25], requires_grad=True), torch.zeros(1)
    want = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -8, 7, 1.0)
    got = ops.fake_quantize_learned(x, scale, zero.int(), None, None, -8, 7, 1.0)
    assert torch.equal(got, want)
    weight = torch.rand(x.shape)
    (ours, our_scale), (theirs, their_scale) = (torch.autograd.grad(y, (x, scale), weight) for y in (got, want))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(our_scale, their_scale, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bounds", [(None, None), *ACTIVATIONS], ids=str)
def test_gradients_are_differences_of_the_function(bounds: tuple[float | None, float | None]) -> None:
    """Over a whole step the staircase rises as the identity does; outside the range it depends on the scale alone."""
    quant_min, quant_max, size = -4, 11, 0.125
    clamps = {"clamp_min": bounds[0], "clamp_max": bounds[1]}
    zero = torch.tensor(2, dtype=torch.int32)

    def value(x: Tensor, scale: Tensor) -> Tensor:
        return ops.fake_quantize_learned(x, scale, zero, None, None, quant_min, quant_max, 1.0, **clamps)

    low, high = quant_min - 2, quant_max - 2
    low = low if bounds[0] is None else max(low, int(bounds[0] / size))
    high = high if bounds[1] is None else min(high, int(bounds[1] / size))
    levels = torch.cat([torch.arange(low + 1, high), torch.tensor([low - 3, low - 2, high + 2, high + 3])])
    x = ((levels + 0.2) * size).requires_grad_()
    scale = torch.tensor(size, requires_grad=True)
    (grad_x,) = torch.autograd.grad(value(x, scale).sum(), x)
    with torch.no_grad():
        rise = (value(x + size, scale) - value(x - size, scale)) / (2 * size)
        assert torch.equal(grad_x[:-4], rise[:-4]) and grad_x[:-4].all()
        assert torch.equal(grad_x[-4:], torch.zeros(4))
    outside = x.detach()[-1:] * 10
    if bounds[1] is None:
        (grad_scale,) = torch.autograd.grad(value(outside, scale).sum(), scale)
        with torch.no_grad():
            difference = (value(outside, scale + 2**-6) - value(outside, scale - 2**-6)) / 2**-5
        assert float(grad_scale) == float(difference) == quant_max - 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 300.0])
def test_choose_qparams_is_that_of_torchs_observers(dtype: torch.dtype, symmetric: bool, scale: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

        scheme = "symmetric" if symmetric else "affine"
        whole = MinMaxObserver(dtype=dtype, qscheme=getattr(torch, f"per_tensor_{scheme}"))
        rows = PerChannelMinMaxObserver(ch_axis=1, dtype=dtype, qscheme=getattr(torch, f"per_channel_{scheme}"))
    element = IntType(8, dtype is torch.int8)
    for shift in (0.0, 2.0, -2.0):
        x = (torch.randn(40, 6) + shift) * scale
        for observer, axis in ((whole, None), (rows, 1)):
            observer.reset_min_max_vals()
            observer(x)
            want_scale, want_zero = observer.calculate_qparams()
            got_scale, got_zero = affine.choose_qparams(
                *affine.min_max(x, axis, None),
                symmetric=symmetric,
                quant_min=element.quant_min,
                quant_max=element.quant_max,
            )
            assert torch.equal(got_scale.flatten(), want_scale.flatten())
            assert got_zero.flatten().tolist() == want_zero.flatten().tolist()


def test_the_schemes_formulas() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=True, quant_min=-127, quant_max=127)
    assert (float(scale), int(zero_point)) == (pytest.approx(3 / 127), 0)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=True, quant_min=0, quant_max=255)
    assert (float(scale), int(zero_point)) == (pytest.approx(3 / 127.5), 128)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=False, quant_min=0, quant_max=255)
    assert (float(scale), int(zero_point)) == (pytest.approx(4 / 255), 64)
    assert Scheme("symmetric") is Scheme.SYMMETRIC
