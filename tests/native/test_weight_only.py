"""The native weight-only linear layer against the reference's leaf, and against its formula in float64."""

from __future__ import annotations

import copy
import ctypes
import functools
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx import affine, jit
from qfx.cpu import cpu_features
from qfx.operators import OPS
from qfx.patterns import NoMatch
from qfx.recipe import Recipe
from qfx.spec import IntType, PerAxis, PerGroup, PerTensor, QConfig, QuantSpec, Scheme
from qfx.targets import AnchorRegion, Leaf, QParams
from qfx.targets.native import weight_only
from qfx.targets.native.weight_only import MOST_ROWS, NativeWeightOnlyLeaf, bind, library
from qfx.targets.native.weight_only_packing import pack_weight, stored_bits
from qfx.targets.reference import AnchorLeaf, Reference

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no C++ loops here: {jit.unavailable()}")

MOST = MOST_ROWS[torch.float32]
TOLERANCE = 1e-5  # of the sum of absolute products
VARIANTS = {
    "native": (),
    "portable": ("-march=x86-64",),
    **({"avx2 without fma": ("-march=x86-64", "-mavx2")} if "avx2" in cpu_features() else {}),
    **({"avx2": ("-march=haswell",)} if {"avx2", "fma"} <= cpu_features() else {}),
    **({"avx512": ("-march=skylake-avx512",)} if "avx512bw" in cpu_features() else {}),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kernel(variant: str = "native") -> ctypes.CDLL:
    found = library(VARIANTS[variant])
    assert found is not None
    return found


def random_layer(out: int, length: int, bits: int, group: int, signed: bool, zeros: str, seed: int) -> dict[str, Any]:
    """Integers over the whole range, scales over two orders of magnitude, zero points in the middle or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    dtype = torch.int8 if signed else torch.uint8
    shape = (out, -(-length // group))
    middle = (low + high + 1) // 2
    zero_point = torch.full(shape, middle, dtype=torch.int32)
    if zeros == "affine":
        zero_point = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    return {
        "q": torch.randint(low, high + 1, (out, length), generator=generator).to(dtype),
        "scale": 10 ** (2 * torch.rand(shape, generator=generator) - 3),
        "zero_point": zero_point,
    }


def worst(
    y: Tensor, x: Tensor, layer: dict[str, Any], group: int, bias: Tensor | None, least: float = 1.0
) -> float:
    """The largest error in parts of the sum of absolute products (and the bias); a weight counts as ``least`` steps.

    Zero points are taken off the sums, and not off each weight: the roundings of what cancels remain.
    """
    shape = {"axis": 1, "group_size": group}
    q = layer["q"].double() - affine.expand_qparam(layer["zero_point"], layer["q"], **shape).double()
    scale = affine.expand_qparam(layer["scale"], layer["q"], **shape).double()
    expected, sums = x.double() @ (q * scale).t(), x.double().abs() @ (q.abs().clamp(min=least) * scale).t()
    if bias is not None:
        expected, sums = expected + bias.double(), sums + bias.double().abs()
    return float(((y.double() - expected).abs() / sums).max())


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    rows=st.integers(1, 17),
    length=st.integers(1, 700),
    out=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.sampled_from([1, 5, 8, 20, 32, 64, 100, 128, 256, 300, 1000]),
    signed=st.booleans(),
    zeros=st.sampled_from(["middle", "affine"]),
    bias=st.booleans(),
    team=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 2**20),
)
@example(rows=1, length=2049, out=48, bits=4, group=2049, signed=True, zeros="middle", bias=True, team=3, seed=0)
@example(rows=15, length=520, out=33, bits=8, group=513, signed=False, zeros="affine", bias=False, team=2, seed=1)
@settings(max_examples=40, deadline=None)
def test_equals_the_formula(
    variant: str,
    rows: int,
    length: int,
    out: int,
    bits: int,
    group: int,
    signed: bool,
    zeros: str,
    bias: bool,
    team: int,
    seed: int,
) -> None:
    torch.set_num_threads(team)
    group = min(group, length)
    layer = random_layer(out, length, bits, group, signed, zeros, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(rows, length, generator=generator)
    offsets = torch.randn(out, generator=generator) if bias else None
    y = bind(kernel(variant), pack_weight(**layer, group=group, bits=bits), offsets)(x)
    assert worst(y, x, layer, group, offsets) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_long_sums_of_one_sign(variant: str, bits: int) -> None:
    """Where nothing cancels, roundings add up: chunks keep the partial sums short."""
    length = 20_000
    layer = random_layer(16, length, bits, length, False, "middle", 0)
    layer["zero_point"].zero_()
    x = torch.full((1, length), 1 / 3)
    y = bind(kernel(variant), pack_weight(**layer, group=length, bits=bits), None)(x)
    assert worst(y, x, layer, length, None) <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_outlier_leaves_the_others_their_digits(bits: int, rows: int) -> None:
    """One row of 4 bits is rounded in parts of the largest input, even if that is multiplied by zero."""
    layer = random_layer(64, 96, bits, 96, True, "middle", 0)
    layer["q"][:, 7] = 0
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 300.0
    y = bind(kernel(), pack_weight(**layer, group=96, bits=bits), None)(x)
    assert worst(y, x, layer, 96, None, least=0.0) <= TOLERANCE


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_largest_sums_of_digits(sign: float) -> None:
    layer = random_layer(16, 256, 4, 256, True, "middle", 0)
    layer["q"].fill_(7)
    x = torch.full((1, 256), sign * 8346000)  # the highest digit is 127
    y = bind(kernel(), pack_weight(**layer, group=256, bits=4), None)(x)
    assert worst(y, x, layer, 256, None) <= TOLERANCE


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-35, 1e-30, 1e-20, 1e20])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_of_any_magnitude(magnitude: float, bits: int) -> None:
    layer = random_layer(16, 256, bits, 64, True, "middle", 0)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * magnitude
    x[0, 64:128] = 0.0
    y = bind(kernel(), pack_weight(**layer, group=64, bits=bits), None)(x)
    weight = affine.dequantize(layer["q"], layer["scale"], layer["zero_point"], axis=1, group_size=64)
    assert float((y.double() - x.double() @ weight.double().t()).abs().max()) <= 1e-5 * magnitude + 1e-36


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_threads_change_no_bit(bits: int, rows: int) -> None:
    layer = random_layer(200, 640, bits, 64, True, "affine", 0)
    x = torch.randn(rows, 640)
    run = bind(kernel(), pack_weight(**layer, group=64, bits=bits), None)
    results = []
    for team in (1, 2, 3, 5):
        torch.set_num_threads(team)
        results.append(run(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_is_rounded_once(variant: str, bits: int) -> None:
    layer = random_layer(37, 129, bits, 32, True, "affine", 0)
    run = bind(kernel(variant), pack_weight(**layer, group=32, bits=bits), torch.randn(37))
    x = torch.randn(2, 3, 129).bfloat16()
    got, expected = run(x), run(x.float())
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected.bfloat16())


def test_not_a_number_and_infinity() -> None:
    layer = random_layer(20, 40, 4, 32, True, "middle", 0)
    run = bind(kernel(), pack_weight(**layer, group=32, bits=4), None)
    x = torch.randn(3, 40)
    x[1, 5], x[2, 39] = float("nan"), float("inf")
    for y in (run(x), run(x.bfloat16()), torch.cat([run(row) for row in x[:, None]])):
        assert y[0].isfinite().all() and y[1].isnan().all() and not y[2].isfinite().any()


# --- layout -----------------------------------------------------------------------------------------------------------


def test_layout_of_four_bits() -> None:
    q = torch.arange(18 * 16, dtype=torch.int64).reshape(18, 16).remainder(16).to(torch.uint8)
    packed = pack_weight(q, torch.arange(18.0).reshape(18, 1), torch.zeros(18, 1, dtype=torch.int32), 16, 4)
    assert packed.weight.shape == (2, 2, 64) and packed.zero is None and packed.middle == 0
    words = packed.weight.reshape(2, 2, 16, 4)
    row = q[17].tolist()
    assert words[1, 1, 1].tolist() == [row[8 + i] | row[12 + i] << 4 for i in range(4)]
    assert packed.scale[1, 0, :2].tolist() == [16.0, 17.0] and not packed.weight[1].reshape(2, 16, 4)[:, 2:].any()


def test_layout_of_eight_bits() -> None:
    q = torch.randint(-128, 128, (16, 10)).to(torch.int8)
    zeros = torch.arange(32, dtype=torch.int32).reshape(16, 2)
    packed = pack_weight(q, torch.ones(16, 2), zeros, 7, 8)
    words = packed.weight.view(torch.int8).reshape(1, 3, 16, 4)  # two steps of the first group, one of the last
    assert torch.equal(words[0, 0], q[:, :4]) and torch.equal(words[0, 1, :, :3], q[:, 4:7])
    assert torch.equal(words[0, 2, :, :3], q[:, 7:]) and not words[0, 1:, :, 3].any()
    assert packed.zero is not None and torch.equal(packed.zero[0].to(torch.int32), zeros.t())


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_that_are_read(bits: int) -> None:
    layer = random_layer(64, 256, bits, 64, True, "affine", 0)
    packed = pack_weight(**layer, group=64, bits=bits)
    assert packed.bits == stored_bits(bits) == (4 if bits <= 4 else 8)
    assert packed.nbytes == 64 * 256 * packed.bits // 8 + 64 * 4 * (4 + 1)


# --- the leaf ---------------------------------------------------------------------------------------------------------

SPECS = {
    "w8 per channel": QuantSpec(IntType(8, True), Scheme.SYMMETRIC, PerAxis(0)),
    "w8 per tensor": QuantSpec(IntType(8, False), Scheme.AFFINE, PerTensor()),
    "w4 in groups": QuantSpec(IntType(4, True), Scheme.SYMMETRIC, PerGroup(32)),
    "w4 affine in groups": QuantSpec(IntType(4, False), Scheme.AFFINE, PerGroup(64)),
    "w3 in groups": QuantSpec(IntType(3, True), Scheme.SYMMETRIC, PerGroup(128)),
    "w2 per channel": QuantSpec(IntType(2, True), Scheme.SYMMETRIC, PerAxis(0)),
    "w6 affine per channel": QuantSpec(IntType(6, False), Scheme.AFFINE, PerAxis(0)),
}


@dataclass(frozen=True)
class Here(Reference):
    """The reference, but for weight-only linear layers."""

    name: ClassVar[str] = "here"

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        return NativeWeightOnlyLeaf(region) if region.data is None else super().lower_anchor(region)


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, length: int, channels: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(length)
        self.linear = nn.Linear(length, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@functools.cache
def quantized(spec: str, bias: bool) -> tuple[Any, Any]:
    recipe = Recipe("weights", QConfig(None, SPECS[spec]))
    models = [
        qfx.quantize(Layer(200, 50, bias), torch.randn(2, 200), recipe=recipe, target=target, verbose=False)
        for target in (Here(), Reference())
    ]
    native, reference = (next(m for m in model.modules() if isinstance(m, AnchorLeaf)) for model in models)
    assert type(native) is NativeWeightOnlyLeaf and type(reference) is AnchorLeaf
    return native, reference


def leaves(spec: str, bias: bool = True) -> tuple[Any, Any]:
    """The native leaf and the reference's of one quantized layer, neither called before."""
    native, reference = quantized(spec, bias)
    return copy.deepcopy(native), copy.deepcopy(reference)


def products(leaf: AnchorLeaf, x: Tensor) -> Tensor:
    weight = leaf.weight_qparams.dequantize(leaf.integers()).double()
    return x.double().abs() @ weight.abs().t() + (0 if leaf.bias is None else leaf.bias.double().abs())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 2), (0,), (MOST,), (MOST + 1,)])
def test_leaf_equals_the_reference(spec: str, shape: tuple[int, ...]) -> None:
    native, reference = leaves(spec, bias=len(shape) == 1)
    x = torch.randn(*shape, 200)
    y, expected = native(x), reference(x)
    assert native.packs and (native._run is not None) == (0 < x.numel() <= MOST * 200)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert bool(((y.double() - expected.double()).abs() <= TOLERANCE * products(reference, x)).all())


@pytest.mark.parametrize("spec", ["w8 per channel", "w4 affine in groups"])
def test_leaf_in_bfloat16(spec: str) -> None:
    native, reference = leaves(spec)
    x = torch.randn(4, 200).bfloat16()
    y = native._run(x) if native._run else native.prepared(x)(x)
    exact = x.double() @ reference.weight_qparams.dequantize(reference.integers()).double().t() + reference.bias
    assert y.dtype == torch.bfloat16
    assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + TOLERANCE * products(reference, x)).all())


def test_leaf_passes_gradients() -> None:
    native, reference = leaves("w4 in groups")
    gradients = []
    for leaf in (native, reference):
        x = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
        leaf(x).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])
    with torch.no_grad():
        native(x)
    assert native._run is not None


def test_leaf_takes_any_strides() -> None:
    native, reference = leaves("w8 per channel")
    x = torch.randn(200, 3).t()
    assert torch.allclose(native(x), reference(x), atol=1e-5)


def test_leaf_copies_pickles_and_loads() -> None:
    native, _ = leaves("w4 in groups")
    x = torch.randn(1, 200)
    y = native(x)
    for twin in (copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        assert twin._run is None and torch.equal(twin(x), y)
    state = {name: torch.zeros_like(value) for name, value in native.state_dict().items()}
    native.load_state_dict(state)
    assert not native(x).any()


def test_leaf_compiles() -> None:
    native, reference = leaves("w4 affine in groups")
    x = torch.randn(1, 200)
    compiled = torch.compile(native, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), reference(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    native, reference = leaves("w8 per channel", bias=False)
    x = torch.randn(1, 200, dtype=dtype)
    assert torch.equal(native._weight_only(x), reference._weight_only(x)) and native._run is None
    native(x)
    assert native._run is None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    native, reference = leaves("w4 in groups")
    monkeypatch.setattr(weight_only, "library", lambda: None)
    x = torch.randn(1, 200)
    assert torch.equal(native(x), reference(x))


def _zero_points_beyond(region: AnchorRegion) -> AnchorRegion:
    assert region.weight_qparams is not None
    return replace(region, weight_qparams=replace(region.weight_qparams, zero_point=torch.full((4,), 200)))


def test_zero_points_beyond_the_integers_are_not_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (4, 16), generator=generator).to(torch.int8)
    qparams = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), 0, None, -8, 7, torch.int8)
    aten = torch.ops.aten
    region = AnchorRegion(
        OPS["linear"], aten.linear.default, None, q, qparams, 4, None, None, (), (), None, torch.float32
    )
    x = torch.randn(1, 16)
    assert NativeWeightOnlyLeaf(region).packs
    beyond = _zero_points_beyond(region)
    leaf = NativeWeightOnlyLeaf(beyond)
    assert not leaf.packs and torch.equal(leaf(x), AnchorLeaf(beyond)(x))


def _in_child(run: Any, x: Tensor, expected: Tensor, answers: Any) -> None:
    answers.put(torch.equal(run(x), expected))


@pytest.mark.filterwarnings("ignore")
def test_child_of_a_fork_runs_serially() -> None:
    layer = random_layer(64, 256, 4, 64, True, "middle", 0)
    torch.set_num_threads(2)
    run = bind(kernel(), pack_weight(**layer, group=64, bits=4), None)
    x = torch.randn(16, 256)
    expected = run(x)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(run, x, expected, answers))
    child.start()
    assert answers.get(timeout=20)
    child.join(timeout=20)
    assert child.exitcode == 0
