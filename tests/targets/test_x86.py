"""Every leaf of x86 against the reference's on the same integers: within 1 LSB, or 1e-5 of the norm in floats."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx

from qfx import kernels
from qfx.cpu import onednn_has_vnni
from qfx.operators import OPS
from qfx.patterns import NoMatch
from qfx.spec import INT4, INT8, UINT8, PerAxis, PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.targets import AnchorRegion, DynamicQParams, Leaf, PointRegion, QParams, Slot, Step
from qfx.targets.reference import PointLeaf, Reference
from qfx.targets.x86 import X86
from qfx.targets.x86_point import LoopLeaf, TableLeaf
from qfx.targets.x86_static import StaticLeaf

from . import regions as r

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(X86().unavailable() is not None, reason=str(X86().unavailable()))

SEEDS = st.integers(0, 2**20)
U8, S8 = r.qparams(0.02, 100), r.qparams(0.02, -20, torch.int8)
OUT = {
    "uint8": r.qparams(0.06, 90),
    "uint8 from zero": r.qparams(0.03, 0),
    "int8": r.qparams(0.06, -10, torch.int8),
    "uint4": r.qparams(0.5, 7, torch.uint8, 0, 15),
    "float": None,
}


def kernel_name(leaf: Leaf, layer: str, steps: str, *, inside: bool) -> str:
    """What the kernel is called; without VNNI a layer whose sums could saturate is split, and no step runs inside."""
    split = isinstance(leaf, StaticLeaf) and leaf.split
    assert not (split and onednn_has_vnni())
    if inside and not split:
        return f"onednn {layer}+{steps}"
    return f"onednn {layer}{' in two halves' * split}" + (f", then {steps}" if steps else "")


def leaves(region: AnchorRegion | PointRegion) -> tuple[Leaf, Leaf]:
    """The leaf of x86 and that of the reference."""
    lower = "lower_anchor" if isinstance(region, AnchorRegion) else "lower_point"
    found = [getattr(target, lower)(region) for target in (X86(), Reference())]
    assert all(isinstance(leaf, Leaf) for leaf in found), found
    return found[0], found[1]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    if expected.is_floating_point():
        assert r.relative(got, expected) <= tolerance
    else:
        assert r.worst_lsb(got, expected) <= 1


def check(region: AnchorRegion, shape: tuple[int, ...], seed: int = 0, *, slack: bool = False) -> Leaf:
    """Compare the two leaves on random integers of ``shape``, with operands for the add steps."""
    leaf, reference = leaves(region)
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(region.data, QParams)
    x = r.integers(shape, region.data, generator)
    if slack:  # neither contiguous nor channels-last
        x = torch.stack([x, x], -1)[..., 0]
    expected_shape = reference_shape(reference, x)
    others = [
        torch.randn(expected_shape, generator=generator)
        if step.other is None
        else r.integers(expected_shape, step.other, generator)
        for step in region.steps
        if step.name == "add"
    ]
    kept = [other.clone() for other in others]
    got, expected = leaf(x, *others), reference(x, *others)
    assert_close(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))  # others may read them too
    return leaf


def reference_shape(leaf: Any, x: Tensor) -> tuple[int, ...]:
    weight = leaf.integers().double()
    return tuple(leaf.target(x.double(), weight, None, *leaf.args).shape)


# --- shapes of convolutions and linear layers -------------------------------------------------------------------------


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    size=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    batch=st.integers(0, 2),
    zero_point=st.sampled_from([0, 1, 100, 255]),
    out=st.sampled_from(sorted(OUT)),
    bias=st.booleans(),
    per_channel=st.booleans(),
    slack=st.booleans(),
    seed=SEEDS,
)
def test_convolution_of_any_shape(
    dims: int,
    groups: int,
    channels: tuple[int, int],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    size: list[int],
    batch: int,
    zero_point: int,
    out: str,
    bias: bool,
    per_channel: bool,
    slack: bool,
    seed: int,
) -> None:
    kernel, stride, dilation, padding, size = (v[:dims] for v in (kernel, stride, dilation, padding, size))
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    weight = (channels[1] * groups, channels[0], *kernel)
    region = r.anchor(
        f"conv{dims}d", weight, (stride, padding, dilation, groups),
        data=r.qparams(0.02, zero_point), output=OUT[out], bias=bias, per_channel=per_channel, seed=seed,
    )  # fmt: skip
    leaf = check(region, (batch, channels[0] * groups, *size), seed, slack=slack)
    assert leaf.kernel == kernel_name(leaf, f"conv{dims}d", "", inside=False)


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    extra=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    size=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    batch=st.integers(0, 2),
    out=st.sampled_from(sorted(OUT)),
    seed=SEEDS,
)
def test_transposed_convolution_of_any_shape(
    dims: int,
    groups: int,
    channels: tuple[int, int],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    padding: list[int],
    extra: list[int],
    size: list[int],
    batch: int,
    out: str,
    seed: int,
) -> None:
    kernel, stride, dilation, padding, size = (v[:dims] for v in (kernel, stride, dilation, padding, size))
    extra = [min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=False)]
    lengths = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + 1 + e >= 1 for n, s, p, d, k, e in lengths))
    weight = (channels[0] * groups, channels[1], *kernel)
    args = (stride, padding, extra, groups, dilation)
    region = r.anchor(f"conv_transpose{dims}d", weight, args, data=U8, output=OUT[out], seed=seed)
    check(region, (batch, channels[0] * groups, *size), seed)


@given(
    rows=st.lists(st.integers(0, 4), max_size=3),
    features=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    data=st.sampled_from([U8, S8, r.qparams(0.3, 3, torch.uint8, 0, 15)]),
    out=st.sampled_from(sorted(OUT)),
    bias=st.booleans(),
    bits=st.integers(2, 8),
    slack=st.booleans(),
    seed=SEEDS,
)
def test_linear_of_any_shape(
    rows: list[int],
    features: tuple[int, int],
    data: QParams,
    out: str,
    bias: bool,
    bits: int,
    slack: bool,
    seed: int,
) -> None:
    region = r.anchor("linear", (features[1], features[0]), data=data, output=OUT[out], bias=bias, bits=bits, seed=seed)
    check(region, (*rows, features[0]), seed, slack=slack)


@pytest.mark.parametrize("data", [U8, S8], ids=["uint8", "int8"])
@pytest.mark.parametrize("out", sorted(OUT))
def test_depthwise_and_unbatched(data: QParams, out: str) -> None:
    region = r.anchor("conv2d", (7, 1, 3, 3), ([2], [1], [1], 7), data=data, output=OUT[out])
    check(region, (2, 7, 9, 8))
    check(region, (7, 5, 5))


# --- what follows in the kernel, and behind it ------------------------------------------------------------------------


def step(name: str, *args: Any, other: QParams | None = None, **kwargs: Any) -> Step:
    packet = getattr(aten, name)
    return Step(name, packet.Tensor if name == "add" else packet.default, args, other, tuple(kwargs.items()))


ACTIVATIONS = {
    "relu": step("relu"),
    "relu6": step("hardtanh", 0.0, 6.0),
    "hardtanh": step("hardtanh", -0.7, 1.3),
    "clamp": step("clamp", -1.0, 1.5),
    "clamp below": step("clamp", 0.2, None),
    "clamp above": step("clamp", None, 0.9),
    "clamp of crossed bounds": step("clamp", 1.0, -1.0),
    "hardswish": step("hardswish"),
    "silu": step("silu"),
    "leaky_relu": step("leaky_relu", 0.2),
    "gelu": step("gelu", approximate="none"),
    "gelu by tanh": step("gelu", approximate="tanh"),
    "hardsigmoid": step("hardsigmoid"),
    "sigmoid": step("sigmoid"),
}
LAYERS: dict[str, tuple[tuple[int, ...], tuple[Any, ...], tuple[int, ...]]] = {
    "conv1d": ((6, 4, 3), ([1], [1], [1], 1), (2, 4, 9)),
    "conv2d": ((6, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1), (2, 4, 6, 5)),
    "conv3d": ((6, 4, 2, 2, 2), ([1] * 3, [0] * 3, [1] * 3, 1), (2, 4, 4, 3, 5)),
    "conv_transpose1d": ((4, 6, 3), ([2], [0], [0], 1, [1]), (2, 4, 9)),
    "conv_transpose2d": ((4, 6, 4, 4), ([2, 2], [1, 1], [0, 0], 1, [1, 1]), (2, 4, 6, 5)),
    "conv_transpose3d": ((4, 6, 2, 2, 2), ([2] * 3, [0] * 3, [0] * 3, 1, [1] * 3), (2, 4, 4, 3, 5)),
    "linear": ((20, 33), (), (2, 3, 33)),
}
CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp below", "clamp above", "clamp of crossed bounds")
INSIDE = {
    "conv2d": {"relu", "relu6", "hardtanh", "clamp", "hardswish", "silu"},
    "conv3d": set[str](),
    "linear": {"relu", "relu6", "hardtanh", "clamp", "hardswish", "silu", "leaky_relu", "gelu", "gelu by tanh"},
}
INSIDE |= {name: INSIDE["conv2d"] for name in ("conv1d", "conv_transpose1d", "conv_transpose2d")}
INSIDE["conv_transpose3d"] = INSIDE["conv3d"]


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_activation_behind_layer(layer: str, act: str) -> None:
    weight, args, shape = LAYERS[layer]
    for output in OUT.values():
        leaf = check(r.anchor(layer, weight, args, data=U8, output=output, steps=(ACTIVATIONS[act],)), shape)
        inside = act in INSIDE[layer] or (act in CLAMPS and output is not None)
        name = ACTIVATIONS[act].name
        assert leaf.kernel == kernel_name(leaf, layer, name, inside=inside)


ADDS = {
    "add": (),
    "add+relu": (ACTIVATIONS["relu"],),
    "add+relu6": (ACTIVATIONS["relu6"],),
    "add+clamp": (ACTIVATIONS["clamp below"],),
    "add+silu": (ACTIVATIONS["silu"],),
}
OTHERS = (r.qparams(0.05, 70), r.qparams(0.05, -7, torch.int8), None)


@pytest.mark.parametrize("steps", sorted(ADDS))
@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"])
def test_residual_behind_layer(layer: str, steps: str) -> None:
    weight, args, shape = LAYERS[layer]
    for output, other in itertools.product(OUT.values(), OTHERS):
        behind = (step("add", other=other), *ADDS[steps])
        leaf = check(r.anchor(layer, weight, args, data=U8, output=output, steps=behind), shape)
        same = output is not None and other is not None and other.dtype == output.dtype
        inside = layer in ("conv1d", "conv2d", "linear") and same and steps != "add+silu"
        names = "+".join(each.name for each in behind)
        assert leaf.kernel == kernel_name(leaf, layer, names, inside=inside)


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "linear"])
def test_residual_of_an_empty_batch_and_of_other_layouts(layer: str) -> None:
    weight, args, shape = LAYERS[layer]
    region = r.anchor(layer, weight, args, data=U8, output=OUT["uint8"], steps=(step("add", other=r.qparams(0.05, 7)),))
    check(region, (0, *shape[1:]))
    check(region, shape, slack=True)


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "linear"])
def test_a_residual_that_nobody_reads_again_may_be_overwritten(layer: str) -> None:
    weight, args, shape = LAYERS[layer]
    other = r.qparams(0.05, 7)
    leaf, reference = leaves(
        r.anchor(layer, weight, args, data=U8, output=OUT["uint4"], steps=(step("add", other=other),))
    )
    leaf.overwrites = True
    generator = torch.Generator().manual_seed(5)
    x = r.integers(shape, U8, generator)
    residual = r.integers(reference_shape(reference, x), other, generator)
    expected = reference(x, residual)
    assert_close(leaf(x, residual.clone()), expected)
    strided = torch.stack([residual, residual], -1)[..., 0]
    assert_close(leaf(x, strided), expected)
    assert torch.equal(strided, residual)  # what is not dense is copied first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_output_in_the_dtype_of_the_model(layer: str, dtype: torch.dtype) -> None:
    weight, args, shape = LAYERS[layer]
    for steps in ((), (ACTIVATIONS["silu"],), (ACTIVATIONS["sigmoid"],)):
        leaf, reference = leaves(r.anchor(layer, weight, args, data=U8, steps=steps, dtype=dtype))
        x = r.integers(shape, U8, torch.Generator().manual_seed(1))
        assert_close(leaf(x), reference(x), 1e-3)


def test_neighbouring_convolutions_copy_no_layout() -> None:
    region = r.anchor("conv2d", (8, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 1), data=U8, output=OUT["uint8"])
    leaf, _ = leaves(region)
    y = leaf(torch.zeros(2, 8, 5, 5, dtype=torch.uint8))
    assert y.is_contiguous(memory_format=torch.channels_last)
    volume = r.anchor("conv3d", (8, 8, 3, 3, 3), ([1] * 3, [1] * 3, [1] * 3, 1), data=U8, output=OUT["uint8"])
    y = leaves(volume)[0](torch.zeros(2, 8, 5, 5, 5, dtype=torch.uint8))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    wave = r.anchor("conv1d", (8, 8, 3), ([1], [1], [1], 1), data=U8, output=OUT["uint8"])
    y = leaves(wave)[0](torch.zeros(2, 8, 5, dtype=torch.uint8))
    assert y.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)


# --- weights with a zero point ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "zero", "bits"), [(torch.uint8, 128, 8), (torch.uint8, 5, 4), (torch.int8, -3, 5)])
@pytest.mark.parametrize("layer", ["conv2d", "conv_transpose2d", "linear"])
def test_weights_whose_distance_from_zero_fits_into_int8(layer: str, dtype: torch.dtype, zero: int, bits: int) -> None:
    shape, args, input_shape = LAYERS[layer]
    channels = shape[OPS[layer].channel_axis]
    low = 0 if dtype == torch.uint8 else -(1 << (bits - 1))
    weight = torch.randint(low, low + (1 << bits), shape).to(dtype)
    region = r.anchor(layer, shape, args, data=U8, output=OUT["uint8"], weight=weight, bits=bits)
    of_weight = region.weight_qparams
    assert of_weight is not None
    of_weight.zero_point.copy_(torch.full((channels,), zero))
    check(region, input_shape)


# --- dynamic and weight-only ------------------------------------------------------------------------------------------


TOKEN_RANGES = [(-128, 127, torch.int8), (-127, 127, torch.int8), (0, 255, torch.uint8), (-8, 7, torch.int8)]


@given(
    rows=st.lists(st.integers(0, 3), max_size=2),
    few=st.booleans(),
    features=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    limits=st.sampled_from(TOKEN_RANGES),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_linear_per_token(
    rows: list[int],
    few: bool,
    features: tuple[int, int],
    limits: tuple[int, int, torch.dtype],
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    data = DynamicQParams(-1, -1, True, *limits)
    region = r.anchor("linear", (features[1], features[0]), data=data, bias=bias, dtype=dtype, seed=seed)
    leaf, reference = leaves(region)
    shape = (*rows, features[0]) if few else (40, *rows, features[0])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_close(leaf(x), reference(x), 1e-5 if dtype == torch.float32 else 1e-3)


@given(
    rows=st.lists(st.integers(0, 5), max_size=2),
    features=st.tuples(st.sampled_from([1, 7, 32, 44, 64, 172]), st.sampled_from([1, 5, 16, 32])),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 16, 64]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=SEEDS,
)
def test_weight_only_linear(
    rows: list[int],
    features: tuple[int, int],
    bits: int,
    group: int | None,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    region = weight_only(features, bits, group, bias, dtype, seed)
    leaf, reference = leaves(region)
    x = torch.randn((*rows, features[0]), generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_close(leaf(x), reference(x), {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


def weight_only(
    features: tuple[int, int], bits: int, group: int | None, bias: bool, dtype: torch.dtype, seed: int = 0
) -> AnchorRegion:
    region = r.anchor("linear", (features[1], features[0]), data=None, bias=bias, bits=bits, dtype=dtype, seed=seed)
    if group is None:
        return region
    count = -(-features[0] // group)
    zeros = torch.zeros(features[1], count, dtype=torch.int32)
    half = 1 << (bits - 1)
    qparams = QParams(torch.rand(zeros.shape) + 0.1, zeros, -1, group, -half, half - 1, torch.int8)
    return AnchorRegion(**{**vars(region), "weight_qparams": qparams})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_through_weight_only_layers(bits: int, dtype: torch.dtype) -> None:
    leaf, reference = leaves(weight_only((64, 16), bits, 32 if bits == 4 else None, True, dtype))
    x = torch.randn(3, 64, dtype=dtype)
    leaf(x)  # packed by now
    gradients = []
    for each in (leaf, reference):
        each_x = x.clone().requires_grad_()
        each(each_x).float().square().sum().backward()
        gradients.append(each_x.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert_close(gradients[0], gradients[1], 1e-6)


# --- a leaf is a module -----------------------------------------------------------------------------------------------


def some_leaves() -> dict[str, tuple[Leaf, Leaf, Tensor]]:
    """Leaf, another leaf with other numbers, and an input."""
    other_out = r.qparams(0.04, 60)
    found: dict[str, tuple[Leaf, Leaf, Tensor]] = {}
    x: Tensor
    for layer in ("conv2d", "conv_transpose2d", "linear"):
        weight, args, shape = LAYERS[layer]
        pair = [
            leaves(r.anchor(layer, weight, args, data=U8, output=out, seed=seed, bits=4))[0]
            for seed, out in ((0, OUT["uint8"]), (1, other_out))
        ]
        found[layer] = (pair[0], pair[1], r.integers(shape, U8, torch.Generator().manual_seed(2)))
    dynamic = DynamicQParams(-1, -1, True, -128, 127, torch.int8)
    for name, data, x in (("per token", dynamic, torch.randn(3, 64)), ("w8a16", None, torch.randn(3, 64).bfloat16())):
        pair = [leaves(r.anchor("linear", (16, 64), data=data, dtype=x.dtype, seed=seed))[0] for seed in (0, 1)]
        found[name] = (pair[0], pair[1], x)
    x = torch.arange(256).to(torch.uint8)
    table = [leaves(r.point(aten.silu.default, (U8,), out))[0] for out in (r.qparams(0.02, 20), other_out)]
    found["table"] = (table[0], table[1], x)
    pool = [leaves(r.point(aten.mean.dim, (U8,), out, (Slot(0), [1])))[0] for out in (r.qparams(0.02, 20), other_out)]
    found["loop"] = (pool[0], pool[1], x.view(16, 16))
    return found


KINDS = ["conv2d", "conv_transpose2d", "linear", "per token", "w8a16", "table", "loop"]


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_copies_and_pickles_without_its_packed_weight(kind: str) -> None:
    leaf, _, x = some_leaves()[kind]
    before = leaf(x)
    state = {name: value.clone() for name, value in leaf.state_dict().items()}
    for twin in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert "_run" not in vars(twin)
        assert torch.equal(twin(x), before)
        assert twin.kernel == leaf.kernel
    assert all(torch.equal(value, state[name]) for name, value in leaf.state_dict().items())
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_uses_the_weights_it_loads(kind: str) -> None:
    leaf, other, x = some_leaves()[kind]
    before, expected = leaf(x), other(x)
    assert not torch.equal(before, expected)
    leaf.load_state_dict(other.state_dict())
    assert torch.equal(leaf(x), expected)
    holder = torch.nn.Sequential(leaf)
    holder.load_state_dict(torch.nn.Sequential(some_leaves()[kind][0]).state_dict(), assign=True)
    assert torch.equal(leaf(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_that_moved_and_came_back_is_the_same(kind: str) -> None:
    leaf, _, x = some_leaves()[kind]
    before = leaf(x)
    leaf.to("cpu")
    assert getattr(leaf, "_run", None) is None
    assert torch.equal(leaf(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_has_shapes_without_data(kind: str) -> None:
    """Where a tracer or fake tensors run, the leaf is the reference's."""
    leaf, _, x = some_leaves()[kind]
    real = leaf(x)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = leaf(mode.from_tensor(x))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_packed_in_inference_mode_runs_outside(kind: str) -> None:
    leaf, _, x = some_leaves()[kind]
    with torch.inference_mode():
        inside = leaf(x)
    assert torch.equal(leaf(x), inside)


# --- operators between layers -----------------------------------------------------------------------------------------

UNARY = {
    "relu": (aten.relu.default, (Slot(0),)),
    "hardtanh": (aten.hardtanh.default, (Slot(0), 0.0, 6.0)),
    "hardswish": (aten.hardswish.default, (Slot(0),)),
    "hardsigmoid": (aten.hardsigmoid.default, (Slot(0),)),
    "silu": (aten.silu.default, (Slot(0),)),
    "gelu": (aten.gelu.default, (Slot(0),)),
    "leaky_relu": (aten.leaky_relu.default, (Slot(0), 0.1)),
    "elu": (aten.elu.default, (Slot(0),)),
    "sigmoid": (aten.sigmoid.default, (Slot(0),)),
    "tanh": (aten.tanh.default, (Slot(0),)),
    "clamp": (aten.clamp.default, (Slot(0), -0.5)),
    "mish": (aten.mish.default, (Slot(0),)),
    "add": (aten.add.Tensor, (Slot(0), 0.5)),
    "mul": (aten.mul.Tensor, (Slot(0), Slot(0))),
}


@pytest.mark.parametrize("output", [r.qparams(0.03, 9), r.qparams(0.03, 9, torch.int8)], ids=["uint8", "int8"])
@pytest.mark.parametrize("data", [U8, S8, r.qparams(0.3, 3, torch.uint8, 0, 15)], ids=["uint8", "int8", "uint4"])
@pytest.mark.parametrize("name", sorted(UNARY))
def test_tables_equal_the_reference(name: str, data: QParams, output: QParams) -> None:
    target, args = UNARY[name]
    leaf, reference = leaves(r.point(target, (data,), output, args))
    assert isinstance(leaf, TableLeaf) and leaf.kernel == f"table {name}"
    x = torch.arange(data.quant_min, data.quant_max + 1).to(data.dtype)
    assert torch.equal(leaf(x), reference(x))


POINTS: dict[str, tuple[Any, tuple[Any, ...], tuple[int, ...], str]] = {
    "max_pool1d": (aten.max_pool1d.default, (Slot(0), [3], [2], [1]), (2, 5, 9), "loop"),
    "max_pool2d": (aten.max_pool2d.default, (Slot(0), [3, 2], [2, 2], [1, 1], [1, 1], True), (2, 5, 9, 8), "loop"),
    "max_pool2d alone": (aten.max_pool2d.default, (Slot(0), [2, 2]), (5, 9, 8), "loop"),
    "max_pool3d": (aten.max_pool3d.default, (Slot(0), [2, 2, 2]), (2, 5, 4, 4, 4), "reference"),
    "avg_pool1d": (aten.avg_pool1d.default, (Slot(0), [3], [2], [1]), (2, 5, 9), "loop"),
    "avg_pool2d": (aten.avg_pool2d.default, (Slot(0), [3, 3], [2, 2], [1, 1], True, False), (2, 5, 9, 8), "loop"),
    "avg_pool2d alone": (aten.avg_pool2d.default, (Slot(0), [3, 3]), (5, 9, 8), "loop"),
    "avg_pool3d": (aten.avg_pool3d.default, (Slot(0), [2, 2, 2]), (2, 5, 4, 4, 4), "reference"),
    "adaptive_avg_pool1d": (aten.adaptive_avg_pool1d.default, (Slot(0), [4]), (2, 5, 9), "loop"),
    "adaptive_avg_pool2d": (aten.adaptive_avg_pool2d.default, (Slot(0), [1, 1]), (2, 5, 9, 8), "loop"),
    "adaptive_avg_pool3d": (aten.adaptive_avg_pool3d.default, (Slot(0), [1, 2, 1]), (2, 5, 4, 4, 4), "reference"),
    "mean": (aten.mean.dim, (Slot(0), [2, 3], True), (2, 5, 9, 8), "loop"),
    "mean of all": (aten.mean.default, (Slot(0),), (2, 5, 9), "loop"),
    "constant_pad_nd": (aten.constant_pad_nd.default, (Slot(0), [1, 2, 0, 1]), (2, 5, 4, 3), "aten"),
    "constant_pad_nd of a value": (aten.constant_pad_nd.default, (Slot(0), [1, 2], 0.7), (2, 5, 4, 3), "aten"),
    "pad": (aten.pad.default, (Slot(0), [1, -1]), (2, 5, 4, 3), "aten"),
    "pad by reflection": (aten.pad.default, (Slot(0), [1, 1], "reflect"), (2, 5, 4), "reference"),
    "upsample_nearest1d": (aten.upsample_nearest1d.vec, (Slot(0), None, [2.0]), (2, 5, 4), "aten"),
    "upsample_nearest2d": (aten.upsample_nearest2d.vec, (Slot(0), [7, 5], None), (2, 5, 4, 3), "aten"),
    "upsample_nearest3d": (aten.upsample_nearest3d.vec, (Slot(0), None, [2.0, 2.0, 2.0]), (2, 5, 2, 3, 4), "aten"),
}
KEEP_SCALE = ("max_pool", "pad", "constant_pad", "upsample")


@pytest.mark.parametrize("data", [U8, S8], ids=["uint8", "int8"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", sorted(POINTS))
def test_operators_on_integers(name: str, last: bool, data: QParams) -> None:
    target, args, shape, kind = POINTS[name]
    output = data if name.startswith(KEEP_SCALE) else r.qparams(0.013, 55)
    leaf, reference = leaves(r.point(target, (data,), output, args))
    assert leaf.kernel.startswith(kind), leaf.kernel
    x = r.integers(shape, data, torch.Generator().manual_seed(3))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    assert_close(leaf(x), reference(x))
    if kind != "reference" and name.startswith(KEEP_SCALE):
        assert torch.equal(leaf(x), reference(x))


@pytest.mark.parametrize("name", ["max_pool2d", "constant_pad_nd", "upsample_nearest2d"])
def test_operators_that_keep_the_scale_leave_another_scale_to_the_reference(name: str) -> None:
    target, args, shape, _ = POINTS[name]
    leaf, reference = leaves(r.point(target, (U8,), r.qparams(0.05, 10), args))
    assert type(leaf) is PointLeaf and leaf.kernel == f"reference {name}"
    x = r.integers(shape, U8, torch.Generator().manual_seed(3))
    assert torch.equal(leaf(x), reference(x))


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.mul.Tensor], ids=["add", "mul"])
@pytest.mark.parametrize("second", [r.qparams(0.03, 40), r.qparams(0.03, -4, torch.int8)], ids=["uint8", "int8"])
@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((0, 3), (0, 3))])
def test_sums_and_products(target: Any, second: QParams, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    leaf, reference = leaves(r.point(target, (U8, second), r.qparams(0.06, 100)))
    assert isinstance(leaf, LoopLeaf) and leaf.kernel.startswith("loop ")
    generator = torch.Generator().manual_seed(4)
    a, b = r.integers(shapes[0], U8, generator), r.integers(shapes[1], second, generator)
    assert_close(leaf(a, b), reference(a, b))


def test_a_scaled_sum_is_the_references() -> None:
    region = r.point(aten.add.Tensor, (U8, U8), r.qparams(0.06, 100), kwargs={"alpha": 2})
    leaf, reference = leaves(region)
    assert leaf.kernel == "reference add"
    a = r.integers((3, 4), U8, torch.Generator().manual_seed(4))
    assert torch.equal(leaf(a, a), reference(a, a))


def test_kernel_names_tell_whether_loops_are_compiled() -> None:
    leaf, _ = leaves(r.point(aten.max_pool2d.default, (U8,), U8, (Slot(0), [2, 2])))
    assert leaf.kernel == f"loop max_pool2d ({'c++' if kernels.backend() == 'c++' else 'aten'})"


# --- what x86 refuses -------------------------------------------------------------------------------------------------

STATIC = QuantSpec(UINT8)
TOKEN = QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)
WEIGHT = QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0))
REFUSED = {
    "products of activations": ("matmul", QConfig(STATIC, None), "activation x activation"),
    "8-bit weights with a zero point": ("conv2d", QConfig(STATIC, QuantSpec(INT8, Scheme.AFFINE)), "symmetric"),
    "groups under integer activations": (
        "linear", QConfig(TOKEN, QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(32))), "per group",
    ),
    "dynamic activations per tensor": (
        "linear", QConfig(QuantSpec(UINT8, dynamic=True), WEIGHT), "per token and symmetric",
    ),
    "affine tokens": (
        "linear", QConfig(QuantSpec(UINT8, Scheme.AFFINE, PerToken(), dynamic=True), WEIGHT), "per token and symmetric",
    ),
    "float activations of a convolution": ("conv2d", QConfig(None, WEIGHT), "float activations"),
    "what the reference refuses": ("conv2d", QConfig(TOKEN, WEIGHT), "conv2d takes no activations per token"),
    "scales along inputs": (
        "linear", QConfig(STATIC, QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(1))), "output channel",
    ),
}  # fmt: skip
TAKEN = {
    "static": ("conv2d", QConfig(STATIC, WEIGHT)),
    "per tensor": ("conv2d", QConfig(STATIC, QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor()))),
    "narrow affine weights": ("conv2d", QConfig(STATIC, QuantSpec(INT4, Scheme.AFFINE, PerAxis(0)))),
    "transposed": ("conv_transpose2d", QConfig(STATIC, QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(1)))),
    "per token": ("linear", QConfig(TOKEN, WEIGHT)),
    "weight-only": ("linear", QConfig(None, QuantSpec(INT4, Scheme.AFFINE, PerGroup(32)))),
    "pooling": ("max_pool2d", QConfig(STATIC, None)),
}


def a_node() -> fx.Node:
    return fx.Graph().placeholder("x")


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refuses_with_a_reason(case: str) -> None:
    name, qconfig, reason = REFUSED[case]
    assert reason in str(X86().refuses(a_node(), OPS[name], qconfig))


@pytest.mark.parametrize("case", sorted(TAKEN))
def test_takes(case: str) -> None:
    name, qconfig = TAKEN[case]
    assert X86().refuses(a_node(), OPS[name], qconfig) is None


def misfits() -> dict[str, AnchorRegion]:
    conv, args, _ = LAYERS["conv2d"]
    wide = r.anchor("conv2d", conv, args, data=U8)
    assert wide.weight_qparams is not None
    wide.weight_qparams.zero_point.fill_(100)
    grouped = weight_only((64, 16), 4, 32, True, torch.float32)
    per_axis = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), 1, None, 0, 255, torch.uint8)
    return {
        "fits into int8": wide,
        "per tensor or per output channel": AnchorRegion(**{**vars(grouped), "data": U8}),
        "per token and symmetric": r.anchor("linear", (5, 7), data=DynamicQParams(-1, -1, False, 0, 255, torch.uint8)),
        "activations per tensor": r.anchor("conv2d", conv, args, data=U8, output=per_axis),
        "float activations": r.anchor("conv2d", conv, args, data=None),
        "activation x activation": AnchorRegion(
            OPS["matmul"], aten.matmul.default, U8, None, None, 0, None, None, (), (), None, torch.float32, U8
        ),
    }


@pytest.mark.parametrize("reason", sorted(misfits()))
def test_declines_regions_that_fit_no_kernel(reason: str) -> None:
    found = X86().lower_anchor(misfits()[reason])
    assert isinstance(found, NoMatch) and reason in found.reason
