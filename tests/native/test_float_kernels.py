"""The float operators of the native engine (qfx/csrc/native) against torch, in every instruction set that runs here."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qfx
from qfx import affine, jit

NATIVE = Path(qfx.__file__).parent / "csrc" / "native"
SOURCE = Path(__file__).parent / "float_kernels.cpp"
SOURCES = (SOURCE, *sorted(NATIVE.glob("*.h")))
X86 = platform.machine() == "x86_64"

# The last -march wins over the standard one; -O1 because it compiles faster.
BUILDS = {"widest": (), "plain": ("-O1", "-DQFX_PLAIN_VECTORS")}
if X86:
    BUILDS |= {"sse2": ("-O1", "-march=x86-64")}

pytestmark = [
    pytest.mark.skipif(jit.unavailable() is not None, reason="C++ cannot be compiled here"),
    pytest.mark.xdist_group("float_kernels"),
]
in_every_build = pytest.mark.parametrize("build", BUILDS)

SEEDS = st.integers(0, 2**31)
THREADS = st.integers(1, 4)
INTEGERS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}

_PTR, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def fields(text: str, kind: object) -> list[tuple[str, object]]:
    return [(name, kind) for name in text.split()]


class QuantizeTo(ctypes.Structure):
    _fields_ = fields("inverse zero_point low high", _FLOAT)


class Sink(ctypes.Structure):
    _fields_ = [("floats", _PTR), ("integers", _PTR), ("to", QuantizeTo)]


class HeadStrides(ctypes.Structure):
    _fields_ = fields("batch head token", _LONG)


class Mask(ctypes.Structure):
    _fields_ = [("added", _PTR), *fields("batch head query", _LONG), ("causal", ctypes.c_bool), ("past", _LONG)]


class AttentionShape(ctypes.Structure):
    _fields_ = [
        *fields("batch heads kv_heads q_len kv_len head_dim value_dim", _LONG),
        *fields("q k v out", HeadStrides),
        ("scale", _FLOAT),
        ("mask", Mask),
    ]


@functools.cache
def library(build: str) -> ctypes.CDLL:
    loaded = jit.load(SOURCES, flags=BUILDS[build])
    assert loaded is not None
    loaded.attention_scratch_floats.restype = _LONG
    return loaded


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return _PTR(None if x is None else x.data_ptr())


def sizes(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (_LONG * len(values))(*values)


@dataclass
class Out:
    """Where an operator's results go: floats, integers, or both, of one shape."""

    shape: tuple[int, ...]
    want: str = "floats integers"
    dtype: torch.dtype = torch.uint8
    scale: float = 0.0371
    zero_point: int = 7
    low: int | None = None
    high: int | None = None

    def __post_init__(self) -> None:
        least, most = INTEGERS[self.dtype]
        self.low, self.high = self.low or least, self.high or most
        # A margin behind each, to see that nobody writes there.
        self._floats = torch.full((math.prod(self.shape) + 32,), 123.0)
        self._integers = torch.full((math.prod(self.shape) + 32,), 77, dtype=self.dtype)

    def sink(self) -> Sink:
        to = QuantizeTo(1 / torch.tensor(self.scale), self.zero_point, self.low, self.high)
        floats = pointer(self._floats if "floats" in self.want else None)
        integers = pointer(self._integers if "integers" in self.want else None)
        return Sink(floats, integers, to)

    @property
    def floats(self) -> Tensor:
        count = math.prod(self.shape)
        assert (self._floats[count:] == 123).all()
        return self._floats[:count].view(self.shape)

    @property
    def integers(self) -> Tensor:
        count = math.prod(self.shape)
        assert (self._integers[count:] == 77).all()
        return self._integers[:count].view(self.shape)

    def quantized(self, x: Tensor) -> Tensor:
        """What torch makes of ``x``, to the integer."""
        return affine.quantize(
            x,
            torch.tensor(self.scale),
            torch.tensor(self.zero_point),
            quant_min=self.low,
            quant_max=self.high,
            dtype=self.dtype,
        )

    def check_integers(self) -> None:
        assert torch.equal(self.integers, self.quantized(self.floats))


def outs(seed: int, dtype: torch.dtype, *shape: int) -> Out:
    """Both kinds of result; the seed chooses the zero point and whether the range is less than the type's."""
    return Out(shape, dtype=dtype, zero_point=[0, 7, 121][seed % 3], high=[None, 100][seed % 5 == 0])


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ulps(x: Tensor, exact: Tensor) -> float:
    """The largest error of ``x`` (float32) in units in the last place of ``exact`` (float64)."""
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs().clamp(min=2.0**-126)).exponent - 24)
    finite = exact.abs() < torch.finfo(torch.float32).max
    assert torch.equal(x[~finite].double(), exact[~finite].float().double())
    return ((x.double() - exact).abs() / unit)[finite].max().item()


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


# --- functions of one number ------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[float, float]] = {  # name -> parameters, in the order of float_kernels.cpp
    "relu": (0, 0),
    "clamp": (-1.5, 2.25),
    "leaky_relu": (0.01, 0),
    "hardsigmoid": (0, 0),
    "hardswish": (0, 0),
    "elu": (0.7, 0),
    "sigmoid": (0, 0),
    "silu": (0, 0),
    "tanh": (0, 0),
    "gelu": (0, 0),
    "gelu_tanh": (0, 0),
}
FUNCTIONS = ("exp", "exp_nonpositive", "exp2_nonpositive", "expm1_nonpositive", "erf")
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-1.5, 2.25),
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}
# Function, range, error allowed in ulp or (gelu, whose small values are differences) relative to |x|.
IN_ULPS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
    "elu": (lambda x: torch.where(x > 0, x, 0.7 * torch.expm1(x)), -200, 200, 2.5),
    "sigmoid": (torch.sigmoid, -87, 200, 3),
    "silu": (lambda x: x * torch.sigmoid(x), -87, 200, 3.5),
    "tanh": (torch.tanh, -30, 30, 2.5),
    "exp": (torch.exp, -150, 100, 1.1),
    "exp_nonpositive": (torch.exp, -87.3, 0, 1.1),
    "exp2_nonpositive": (torch.exp2, -126, 0, 2.5),
    "expm1_nonpositive": (torch.expm1, -200, 0, 1.1),
    "erf": (torch.erf, -6, 6, 1.5),
}
RELATIVE_TO_X: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(build: str, name: str, x: Tensor, out: Out, threads: int = 1) -> None:
    kind, parameters = list(ACTIVATIONS).index(name), map(_FLOAT, ACTIVATIONS[name])
    sink = out.sink()
    library(build).activation(threads, kind, *parameters, pointer(x), ctypes.byref(sink), _LONG(x.numel()))


def of(build: str, name: str, x: Tensor) -> Tensor:
    out = Out(tuple(x.shape), want="floats")
    if name in FUNCTIONS:
        library(build).function(FUNCTIONS.index(name), pointer(x), _PTR(out.sink().floats), _LONG(x.numel()))
    else:
        activation(build, name, x, out)
    return out.floats


def spread(low: float, high: float) -> Tensor:
    """Evenly spaced floats and, for both signs within the range, such of every magnitude."""
    magnitudes = torch.logspace(-44, math.log10(max(-low, high)), 40_001, dtype=torch.float64).float()
    x = torch.cat([torch.linspace(low, high, 40_003), magnitudes, -magnitudes])
    return x[(x >= low) & (x <= high)]


@in_every_build
@pytest.mark.parametrize("name", IN_ULPS)
def test_the_error_of_a_function_is_bounded_in_ulps(build: str, name: str) -> None:
    function, low, high, most = IN_ULPS[name]
    x = spread(low, high)
    assert ulps(of(build, name, x), function(x.double())) <= most


@in_every_build
@pytest.mark.parametrize("name", RELATIVE_TO_X)
def test_the_error_of_gelu_is_small_against_x(build: str, name: str) -> None:
    x = spread(-20, 20)
    error = (of(build, name, x).double() - RELATIVE_TO_X[name](x.double())).abs()
    assert (error / x.abs().clamp(min=1e-30)).max() <= 1.2e-7
    assert of(build, name, torch.tensor([-1e30, 1e30, math.inf])).tolist() == [0, x.new_tensor(1e30).item(), math.inf]


@in_every_build
@pytest.mark.parametrize("name", EXACT)
def test_activations_of_plain_arithmetic_equal_torchs(build: str, name: str) -> None:
    x = torch.cat([spread(-10, 10), torch.tensor([-math.inf, -1e38, 1e38, math.inf])])
    torch.testing.assert_close(of(build, name, x), EXACT[name](x), rtol=0, atol=0, equal_nan=True)


@in_every_build
def test_functions_far_out(build: str) -> None:
    x = torch.tensor([-math.inf, -1e30, -200.0, 200.0, 1e30, math.inf])
    expected = {
        "exp": [0, 0, 0, math.inf, math.inf, math.inf],
        "erf": [-1, -1, -1, 1, 1, 1],
        "tanh": [-1, -1, -1, 1, 1, 1],
        "sigmoid": [0, 0, 0, 1, 1, 1],
    }
    for name, values in expected.items():
        assert of(build, name, x).tolist() == values, name
    for name in ("exp_nonpositive", "exp2_nonpositive"):
        assert of(build, name, x[:3]).tolist() == [0, 0, 0], name
        assert of(build, name, torch.zeros(3)).tolist() == [1, 1, 1], name


@in_every_build
def test_nan_passes_through_and_is_quantized_to_the_zero_point(build: str) -> None:
    x = torch.full((19,), math.nan)
    for name in ACTIVATIONS:
        out = Out((19,), zero_point=121)
        activation(build, name, x, out)
        assert out.floats.isnan().all(), name
        assert (out.integers == 121).all(), name
    for name in FUNCTIONS:
        assert of(build, name, x).isnan().all(), name


@in_every_build
@given(name=st.sampled_from(list(ACTIVATIONS)), count=st.integers(1, 2500), seed=SEEDS, threads=THREADS)
def test_integers_of_activations_are_those_of_the_floats(
    build: str, name: str, count: int, seed: int, threads: int
) -> None:
    x = randn(seed, count) * 4
    both = outs(seed, torch.uint8, count)
    activation(build, name, x, both)
    both.check_integers()
    again = outs(seed, torch.uint8, count)
    again.want = "integers"
    activation(build, name, x, again, threads)
    assert torch.equal(again.integers, both.integers)


# --- arithmetic, quantize, dequantize ---------------------------------------------------------------------------------

ARITHMETIC = (torch.add, torch.sub, torch.mul, torch.div)


@in_every_build
@given(
    kind=st.sampled_from(range(4)),
    rows=st.integers(1, 9),
    cols=st.integers(1, 300),
    broadcast=st.sampled_from(["", "a", "b"]),
    seed=SEEDS,
    threads=THREADS,
)
def test_arithmetic_equals_torchs(
    build: str, kind: int, rows: int, cols: int, broadcast: str, seed: int, threads: int
) -> None:
    a, b = (randn(seed + i, 1 if broadcast == name else rows, cols) for i, name in enumerate("ab"))
    out = outs(seed, torch.int8, rows, cols)
    sink = out.sink()
    operands = (pointer(a), _LONG(len(a)), pointer(b), _LONG(len(b)))
    library(build).arithmetic(threads, kind, *operands, ctypes.byref(sink), _LONG(rows), _LONG(cols))
    assert torch.equal(out.floats, ARITHMETIC[kind](a, b))
    out.check_integers()


@in_every_build
@given(dtype=st.sampled_from(list(INTEGERS)), count=st.integers(1, 700), seed=SEEDS, threads=THREADS)
def test_quantize_and_dequantize_equal_torchs(
    build: str, dtype: torch.dtype, count: int, seed: int, threads: int
) -> None:
    is_signed = dtype is torch.int8
    out = outs(seed, dtype, count)
    out.want = "integers"
    x = randn(seed, count) * torch.tensor([0.1, 10, 1e20, 1e38])[torch.arange(count) % 4]
    x[:: 1 + seed % 7] = (torch.arange(len(x[:: 1 + seed % 7])) - 20.5) * out.scale  # ties
    for i, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        x[(seed + 3 * i) % count] = value
    sink = out.sink()
    library(build).quantize_floats(threads, is_signed, pointer(x), ctypes.byref(sink), _LONG(count))
    assert torch.equal(out.integers, out.quantized(x))
    y = torch.empty(count)
    library(build).dequantize_integers(
        threads, is_signed, pointer(out.integers), pointer(y), _FLOAT(out.scale), out.zero_point, _LONG(count)
    )
    expected = affine.dequantize(out.integers, torch.tensor(out.scale), torch.tensor(out.zero_point))
    assert torch.equal(y, expected)


@in_every_build
def test_a_boolean_mask_becomes_zeros_and_minus_infinities(build: str) -> None:
    keep = randn(0, 5, 67) > 0
    added = torch.empty(5, 67)
    library(build).mask_of_bools(2, pointer(keep), pointer(added), _LONG(keep.numel()))
    assert torch.equal(added, torch.zeros(5, 67).masked_fill(~keep, -math.inf))


# --- norms ------------------------------------------------------------------------------------------------------------


def norm(
    build: str,
    is_rms: bool,
    x: Tensor,
    out: Out,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
    threads: int = 1,
    eps: float = 1e-5,
) -> None:
    sink = out.sink()
    tensors = (x, residual, weight, bias)
    library(build).norm(
        threads, is_rms, *map(pointer, tensors), ctypes.byref(sink), pointer(sums), *map(_LONG, x.shape), _FLOAT(eps)
    )


def exact_norm(is_rms: bool, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    weight, bias = (None if p is None else p.double() for p in (weight, bias))
    shape = x.shape[-1:]
    return F.rms_norm(x.double(), shape, weight, eps) if is_rms else F.layer_norm(x.double(), shape, weight, bias, eps)


@in_every_build
@given(
    is_rms=st.booleans(),
    rows=st.integers(1, 7),
    cols=st.integers(1, 300),
    parts=st.sets(st.sampled_from(["residual", "weight", "bias", "sums"])),
    seed=SEEDS,
    threads=THREADS,
)
def test_norms_are_torchs(
    build: str, is_rms: bool, rows: int, cols: int, parts: set[str], seed: int, threads: int
) -> None:
    x = randn(seed, rows, cols) * 3 + 1
    residual = randn(seed + 1, rows, cols) if "residual" in parts else None
    weight = randn(seed + 2, cols) if "weight" in parts else None
    bias = randn(seed + 3, cols) if "bias" in parts and not is_rms else None
    sums = torch.empty(rows, cols) if "sums" in parts else None
    total = x if residual is None else x + residual
    out = outs(seed, torch.int8, rows, cols)
    norm(build, is_rms, x, out, residual, weight, bias, sums, threads)
    exact = exact_norm(is_rms, total, weight, bias)
    size = exact_norm(is_rms, total, None, None).abs() * (1 if weight is None else weight.abs())
    assert ((out.floats - exact).abs() <= 1e-6 * size + 3e-7 * (1 if bias is None else 1 + bias.abs())).all()
    out.check_integers()
    if sums is not None:
        assert torch.equal(sums, total)
    alone = outs(seed, torch.int8, rows, cols)
    norm(build, is_rms, x, alone, residual, weight, bias, None, 1)
    assert same_bits(alone.floats, out.floats)


@in_every_build
def test_layer_norm_is_as_accurate_as_torchs_where_the_mean_is_large(build: str) -> None:
    x = randn(0, 16, 769) + 1000
    out = Out((16, 769))
    norm(build, False, x, out)
    exact = exact_norm(False, x, None, None)
    error, torchs = ((y.double() - exact).abs().max() for y in (out.floats, F.layer_norm(x, (769,))))
    assert error <= torchs


@in_every_build
@pytest.mark.parametrize("onto", ["x", "residual"])
def test_the_sum_may_overwrite_what_is_added(build: str, onto: str) -> None:
    x, residual = randn(0, 5, 77), randn(1, 5, 77)
    total = x + residual
    out = Out((5, 77))
    norm(build, False, x, out, residual, sums=x if onto == "x" else residual)
    assert torch.equal(x if onto == "x" else residual, total)
    torch.testing.assert_close(out.floats, F.layer_norm(total, (77,)), atol=2e-6, rtol=2e-6)


# --- softmax ----------------------------------------------------------------------------------------------------------


def mask_of(added: Tensor | None, shape: tuple[int, ...], causal: bool = False, past: int = 0) -> Mask:
    strides = (0, 0, 0) if added is None else added.expand(shape).stride()[:3]
    return Mask(pointer(added), *strides, causal, past)


def hidden_later(q_len: int, kv_len: int, past: int) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(past).logical_not()


def random_mask(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Broadcast over the dimensions that the seed says; some keys hidden, the first one never."""
    small = tuple(n if seed >> i & 1 else 1 for i, n in enumerate(shape[:3]))
    added = randn(seed, *small, shape[3])
    added[added > 0.8] = -math.inf
    added[..., 0] = 0.5
    return added


def softmax(build: str, x: Tensor, out: Out, mask: Mask, scale: float = 1.0, threads: int = 1) -> None:
    sink = out.sink()
    library(build).softmax_rows(
        threads, pointer(x), ctypes.byref(sink), ctypes.byref(mask), sizes(*x.shape), _FLOAT(scale)
    )


@in_every_build
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 300)),
    masked=st.booleans(),
    causal=st.booleans(),
    past=st.integers(0, 40),
    scale=st.sampled_from([1.0, 0.125, 5.0]),
    seed=SEEDS,
    threads=THREADS,
)
def test_softmax_is_torchs(
    build: str,
    shape: tuple[int, ...],
    masked: bool,
    causal: bool,
    past: int,
    scale: float,
    seed: int,
    threads: int,
) -> None:
    x = randn(seed, *shape) * 4
    added = random_mask(seed, shape) if masked else None
    scores = x.double() * scale + (0 if added is None else added.double())
    if causal:
        scores = scores.masked_fill(hidden_later(*shape[2:], past), -math.inf)
    exact = torch.softmax(scores, -1)
    out = Out(shape, scale=1 / 255, zero_point=0)
    softmax(build, x, out, mask_of(added, shape, causal, past), scale, threads)
    # The rounding of a score is an error of the power: 2^-24 of a score of at most some 100, thrice.
    torch.testing.assert_close(out.floats.double(), exact, rtol=4e-7 + 2e-7 * x.abs().max().item() * scale, atol=1e-37)
    assert ((exact == 0) <= (out.floats == 0)).all()
    out.check_integers()


@in_every_build
@pytest.mark.parametrize("keys", [100, 1500])  # less and more than waits on the stack
def test_softmax_to_integers_alone(build: str, keys: int) -> None:
    x = randn(0, 1, 2, 5, keys) * 9
    both = Out(tuple(x.shape), scale=1 / 255, zero_point=0)
    softmax(build, x, both, Mask())
    both.check_integers()
    alone = Out(tuple(x.shape), want="integers", scale=1 / 255, zero_point=0)
    softmax(build, x, alone, Mask())
    assert torch.equal(alone.integers, both.integers)


@in_every_build
def test_softmax_of_a_row_without_keys_is_nan_as_torchs(build: str) -> None:
    x = torch.full((1, 1, 2, 13), -math.inf)
    x[0, 0, 1] = math.nan
    out = Out((1, 1, 2, 13))
    softmax(build, x, out, Mask())
    assert out.floats.isnan().all()


# --- attention --------------------------------------------------------------------------------------------------------


def heads_of(seed: int, batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """[batch, heads, tokens, dim] as it lies in the output of a linear layer that makes more than this."""
    return randn(seed, batch, tokens, heads * dim + 5)[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)


def operands(heads: int, q_len: int, kv_len: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one sample."""
    q, k, v = (heads_of(seed, 1, heads, tokens, dim) for seed, tokens in enumerate((q_len, kv_len, kv_len)))
    return q, k, v


def strides_of(x: Tensor) -> HeadStrides:
    return HeadStrides(*x.stride()[:3])


def attention(
    build: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Out,
    mask: Mask | None = None,
    scale: float | None = None,
    threads: int = 1,
) -> None:
    """Into ``out`` of shape [batch, q_len, heads, value_dim]: what the next linear layer reads."""
    batch, heads, q_len, head_dim = q.shape
    value_dim = v.shape[-1]
    shape = AttentionShape(
        *(batch, heads, k.shape[1], q_len, k.shape[2], head_dim, value_dim),
        *map(strides_of, (q, k, v)),
        HeadStrides(q_len * heads * value_dim, value_dim, heads * value_dim),
        head_dim**-0.5 if scale is None else scale,
        mask or Mask(),
    )
    sink = out.sink()
    scratch = torch.full((library(build).attention_scratch_floats(ctypes.byref(shape), threads) + 16,), math.nan)
    used = scratch[:-16]
    library(build).attend(threads, *map(pointer, (q, k, v)), ctypes.byref(sink), ctypes.byref(shape), pointer(used))
    assert scratch[-16:].isnan().all()


def attended(
    build: str, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, causal: bool = False, past: int = 0
) -> Tensor:
    """Floats [batch, q_len, heads, value_dim]."""
    batch, heads, q_len, _ = q.shape
    out = Out((batch, q_len, heads, v.shape[-1]), want="floats")
    attention(build, q, k, v, out, mask_of(added, (batch, heads, q_len, k.shape[2]), causal, past))
    return out.floats


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """[batch, q_len, heads, value_dim] in float64; rows that see nothing are zeros."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if added is not None:
        scores = scores + added.double()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return (torch.softmax(scores, -1).nan_to_num(0) @ v).transpose(1, 2)


@in_every_build
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    q_len=st.integers(1, 130),
    kv_len=st.integers(1, 200),
    dims=st.tuples(st.integers(1, 80), st.integers(1, 80)) | st.sampled_from([(64, 64), (32, 32), (33, 128)]),
    masked=st.booleans(),
    causal=st.booleans(),
    past=st.integers(0, 70),
    seed=SEEDS,
    threads=THREADS,
)
def test_attention_is_torchs(
    build: str,
    batch: int,
    kv_heads: int,
    groups: int,
    q_len: int,
    kv_len: int,
    dims: tuple[int, int],
    masked: bool,
    causal: bool,
    past: int,
    seed: int,
    threads: int,
) -> None:
    heads = kv_heads * groups
    q = heads_of(seed, batch, heads, q_len, dims[0])
    k = heads_of(seed + 1, batch, kv_heads, kv_len, dims[0])
    v = heads_of(seed + 2, batch, kv_heads, kv_len, dims[1])
    added = random_mask(seed, (batch, heads, q_len, kv_len)) if masked else None
    mask = mask_of(added, (batch, heads, q_len, kv_len), causal, past)
    out = outs(seed, torch.int8, batch, q_len, heads, dims[1])
    attention(build, q, k, v, out, mask, threads=threads)
    exact = exact_attention(q, k, v, added, hidden_later(q_len, kv_len, past) if causal else None)
    torch.testing.assert_close(out.floats.double(), exact, atol=4e-6, rtol=4e-6)
    out.check_integers()
    alone = outs(seed, torch.int8, batch, q_len, heads, dims[1])
    attention(build, q, k, v, alone, mask, threads=1)
    assert same_bits(alone.floats, out.floats)


@in_every_build
@pytest.mark.parametrize("q_len", [1, 2, 61])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_several_blocks_of_keys(build: str, q_len: int, causal: bool) -> None:
    kv_len = 700
    q, k, v = operands(2, q_len, kv_len, 40)
    k[:, :, 500:] *= 4  # the maximum rises on the way
    added = random_mask(7, (1, 2, q_len, kv_len))
    got = attended(build, q, k, v, added, causal, kv_len - q_len)
    hidden = hidden_later(q_len, kv_len, kv_len - q_len) if causal else None
    torch.testing.assert_close(got.double(), exact_attention(q, k, v, added, hidden), atol=4e-6, rtol=4e-6)


@in_every_build
def test_a_block_of_hidden_keys_in_front_leaves_no_trace(build: str) -> None:
    q, k, v = operands(2, 7, 400, 16)
    added = torch.full((1, 2, 7, 400), -500.0)  # from 0, all these weights would be 0
    added[..., :300] = -math.inf
    got = attended(build, q, k, v, added)
    torch.testing.assert_close(got.double(), exact_attention(q, k, v, added), atol=2e-4, rtol=2e-4)


@in_every_build
@pytest.mark.parametrize("q_len", [1, 9])
def test_attention_is_as_accurate_as_torchs(build: str, q_len: int) -> None:
    q, k, v = operands(4, q_len, 197, 64)
    q, k = 3 * q, 3 * k
    exact = exact_attention(q, k, v)
    torchs = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    error, theirs = ((y.double() - exact).abs().mean() for y in (attended(build, q, k, v), torchs))
    assert error <= 4 * theirs


@in_every_build
@pytest.mark.parametrize("q_len", [1, 7])
def test_queries_without_keys_give_zeros_and_all_least_masks_the_mean(build: str, q_len: int) -> None:
    q, k, v = operands(2, q_len, 300, 16)
    for value in (-math.inf, torch.finfo(torch.float32).min):
        added = torch.full((1, 2, q_len, 300), value)
        got = attended(build, q, k, v, added)
        torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)
        torch.testing.assert_close(got, torchs, atol=1e-6, rtol=1e-6)
    assert got.abs().max() > 0


@in_every_build
@pytest.mark.parametrize("q_len", [1, 7])
def test_nan_in_a_query_reaches_its_result_and_no_other(build: str, q_len: int) -> None:
    q, k, v = operands(2, q_len, 30, 16)
    q[0, 1, 0, 3] = math.nan
    expected = torch.zeros(1, q_len, 2, 16, dtype=torch.bool)
    expected[0, 0, 1] = True
    assert torch.equal(attended(build, q, k, v).isnan(), expected)


# --- embedding -------------------------------------------------------------------------------------------------------


@in_every_build
@pytest.mark.parametrize("cols", [1, 77])
def test_embedding_gathers_rows_and_tells_of_wrong_indices(build: str, cols: int) -> None:
    table, index = randn(0, 11, cols), torch.randint(0, 11, (29,))
    y = torch.empty(29, cols)
    arguments = (pointer(index), pointer(table), pointer(y), _LONG(29), _LONG(11), _LONG(cols))
    assert library(build).gather(3, *arguments) == 1
    assert torch.equal(y, table[index])
    index[4], index[28] = -1, 11
    assert library(build).gather(3, *arguments) == 0
    assert (y[[4, 28]] == 0).all()


# --- builds that do not run here --------------------------------------------------------------------------------------


@in_every_build
def test_the_vectors_have_the_width_of_the_build(build: str) -> None:
    lanes = library(build).lanes()
    assert lanes == 4 if build != "widest" else lanes in (4, 8, 16)


@pytest.mark.skipif(not X86, reason="an instruction set of x86")
def test_it_compiles_for_avx512(tmp_path: Path) -> None:
    compiler = jit.compiler()
    assert compiler is not None
    flags = shlex.split("-std=c++17 -fopenmp -march=x86-64 -mavx512f -mavx512bw -mavx512vl -mavx512dq -c")
    program = tmp_path / "width.cpp"
    program.write_text(f'#include "{SOURCE}"\nstatic_assert(qfx::f32::kLanes == 16 && qfx::f32::kTileRows == 12);\n')
    command = [*compiler.command, *flags, str(program), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
