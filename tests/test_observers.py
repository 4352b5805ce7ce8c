"""Observers: the ranges they choose, the data they refuse, and factories as values."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qfx import affine
from qfx.errors import CalibrationError, ConfigError
from qfx.fake_quant import FakeQuantize
from qfx.observers import Histogram, MinMax, MovingAverageMinMax, Mse, Observer, Percentile
from qfx.spec import INT8, UINT8, Granularity, IntType, PerAxis, PerGroup, PerTensor, QuantSpec, Scheme

AFFINE = QuantSpec(UINT8)
SYMMETRIC = QuantSpec(INT8, Scheme.SYMMETRIC)
EVERY = [MinMax, MovingAverageMinMax, Histogram, Percentile, Mse]
every = pytest.mark.parametrize("factory", EVERY, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Searches over small tensors: threads that wait for each other would cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seen(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer(batch)
    return observer


def ends(observer: Observer) -> tuple[float, float]:
    low, high = observer.range()
    return float(low), float(high)


def mse(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Mean squared error of ``x`` (one axis) under each of several ranges, measured."""
    scale, zero_point = affine.choose_qparams(
        low, high, symmetric=spec.scheme is Scheme.SYMMETRIC, quant_min=spec.quant_min, quant_max=spec.quant_max
    )
    results = []
    for s, z in zip(scale.split(64), zero_point.split(64), strict=True):
        step, offset = s.unsqueeze(1), z.unsqueeze(1).float()
        q = (torch.round(x * (1 / step)) + offset).clamp(spec.quant_min, spec.quant_max)
        results.append(((q - offset) * step - x).double().square().mean(1))
    return torch.cat(results)


# --- what all have in common ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_the_layer(factory: type[Observer], value: float) -> None:
    observer = factory(AFFINE)
    observer.layer = "encoder.3.attention"
    observer(torch.randn(5))
    before = ends(observer)
    with pytest.raises(CalibrationError, match="NaN" if math.isnan(value) else "infinity") as caught:
        observer(torch.tensor([1.0, value, 2.0]))
    assert caught.value.where == "encoder.3.attention"
    assert "encoder.3.attention" in str(caught.value)
    assert ends(observer) == before


@every
def test_empty_tensors_are_ignored(factory: type[Observer]) -> None:
    observer = factory(AFFINE)
    observer(torch.zeros(0, 4))
    assert not observer.seen
    seen(observer, torch.tensor([-1.0, 1.0]))
    before = ends(observer)
    observer(torch.zeros(0))
    assert observer.seen and ends(observer) == before


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_measured_in_float32(factory: type[Observer], dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    got, want = seen(factory(AFFINE), x), seen(factory(AFFINE), x.float())
    assert got.qparams()[0].dtype is torch.float32
    assert [t.tolist() for t in got.qparams()] == [t.tolist() for t in want.qparams()]


@every
def test_observing_returns_the_tensor_and_keeps_no_graph(factory: type[Observer]) -> None:
    x = torch.randn(9, requires_grad=True)
    observer = factory(AFFINE)
    assert observer(x) is x
    assert not any(t.requires_grad for t in observer.qparams())


@every
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=str)
@pytest.mark.parametrize(
    "batches",
    [
        [[5.0] * 3],
        [[-5.0] * 3],
        [[0.0] * 3],
        [[0.0] * 3, [-1.0, 2.0]],
        [[1e-20, -1e-20], [-1.0, 2.0]],
        [[1.0, 2.0], [-1e30, 1e30]],
        [[-1e-30, 1e-30]],
        [[-3e38, 1.0, 3e38]],
        [[-3.3e38, 5.0], [12.0]],
        [[1e-45]],
    ],
    ids=str,
)
def test_odd_data_give_finite_scales(factory: type[Observer], spec: QuantSpec, batches: list[list[float]]) -> None:
    observer = seen(factory(spec), *(torch.tensor(b) for b in batches))
    scale, zero_point = observer.qparams()
    assert math.isfinite(scale) and float(scale) > 0
    assert spec.quant_min <= int(zero_point) <= spec.quant_max
    if factory not in (MovingAverageMinMax, Mse):  # these average batches
        x = torch.tensor([value for batch in batches for value in batch])
        bounds = {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
        error = (affine.fake_quantize(x, scale, zero_point, **bounds)[0] - x).abs()
        assert float(error.max()) <= 0.02 * float(x.abs().max()) + 2 * affine.MIN_SCALE


@every
@pytest.mark.parametrize("scheme", Scheme)
def test_float16_scales(factory: type[Observer], scheme: Scheme) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-3
    wide = seen(factory(QuantSpec(INT8, scheme)), x).qparams()[0]
    scale = seen(factory(QuantSpec(INT8, scheme, scale_dtype=torch.float16)), x).qparams()[0]
    assert scale.dtype is torch.float32 and torch.equal(scale.half().float(), scale)
    assert not torch.equal(wide.half().float(), wide)
    assert torch.allclose(scale, wide, rtol=0.02)


@every
def test_copies_go_their_own_way(factory: type[Observer]) -> None:
    observer = seen(factory(AFFINE), torch.tensor([-1.0, 1.0]))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(observer)))
    before = ends(observer)
    assert ends(twin) == before
    twin(torch.tensor([-50.0, 50.0]))
    assert ends(observer) == before != ends(twin)


@pytest.mark.parametrize("factory", [Histogram, Percentile])
@pytest.mark.parametrize("size", [2.0**-30, 1024.0])
def test_scaling_the_data_scales_the_range(factory: type[Observer], size: float) -> None:
    x = torch.randn(200)
    low, high = ends(seen(factory(AFFINE), x))
    scaled = ends(seen(factory(AFFINE), x * size))
    assert scaled == (pytest.approx(low * size, rel=1e-3), pytest.approx(high * size, rel=1e-3))


# --- MinMax and its moving average ------------------------------------------------------------------------------------


def granular(granularity: Granularity) -> QuantSpec:
    return QuantSpec(INT8, Scheme.SYMMETRIC, granularity)


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(4), PerGroup(3, axis=0)], ids=str
)
def test_min_max_is_that_of_all_data(granularity: Granularity) -> None:
    batches = [torch.randn(5, 6) for _ in range(3)]
    low, high = seen(MinMax(granular(granularity)), *batches).range()
    extremes = [affine.min_max(b, *granularity.layout()) for b in batches]
    assert torch.equal(low, torch.stack([e[0] for e in extremes]).amin(0))
    assert torch.equal(high, torch.stack([e[1] for e in extremes]).amax(0))


@every
def test_per_channel_of_a_vector_keeps_no_alias(factory: type[Observer]) -> None:
    if factory in (Histogram, Percentile):
        return
    x = torch.tensor([1.0, -2.0])
    observer = seen(factory(granular(PerAxis(0))), x)
    before = [t.clone() for t in observer.range()]
    x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, observer.range(), strict=True))


def test_moving_average() -> None:
    observer = MovingAverageMinMax(AFFINE, averaging_constant=0.25)
    seen(observer, torch.tensor([-4.0, 8.0]), torch.tensor([0.0, 4.0]), torch.tensor([-8.0, 0.0]))
    assert ends(observer) == (0.75 * -3.0 + 0.25 * -8.0, 0.75 * 7.0)
    per_channel = seen(MovingAverageMinMax(granular(PerAxis(0))), torch.randn(3, 9), torch.randn(3, 9))
    assert per_channel.range()[0].shape == (3,)


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.1, math.nan])
def test_averaging_constant_out_of_range(constant: float) -> None:
    with pytest.raises(ConfigError, match="averaging_constant"):
        MovingAverageMinMax(AFFINE, constant)


# --- histograms -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-20, 20), st.integers(-6, 6)), min_size=1, max_size=5), st.integers(0, 2**31))
def test_growing_keeps_every_count(batches: list[tuple[float, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    observer, total, everything = Histogram(AFFINE, bins=64), 0, []
    for shift, exponent in batches:
        x = (torch.randn(40, generator=generator) + shift) * 10.0**exponent
        x[::4] = 0.0  # counted apart
        observer(x)
        total += int((x != 0).sum())
        everything.append(x)
    x = torch.cat(everything)
    edges = observer.edges()
    assert int(observer.counts.sum()) == total
    assert observer.extremes == (float(x.min()), float(x.max()))
    assert float(edges[0]) <= float(x.min()) and float(x.max()) <= float(edges[-1])


def test_growing_moves_counts_to_where_they_belong() -> None:
    first, second = torch.rand(500) + 1, torch.rand(500) * 30 - 15
    grown = seen(Histogram(AFFINE, bins=128), first, second)
    edges = grown.edges()
    exact = torch.histogram(torch.cat([first, second]).double(), bins=edges).hist
    difference = (grown.counts.cumsum(0) - exact.cumsum(0)).abs()
    assert float(difference.max()) <= 2  # values on an edge, up to float32


def test_histograms_are_per_tensor() -> None:
    for factory in (Histogram, Percentile):
        with pytest.raises(ConfigError, match="observes per tensor, the spec asks for per axis 0"):
            factory(granular(PerAxis(0)))


@pytest.mark.parametrize("bins", [-3, 0, 1])
def test_too_few_bins_or_steps(bins: int) -> None:
    for factory in (Histogram, Percentile):
        with pytest.raises(ConfigError, match=f"{factory.__name__} counts in at least 2 bins, got {bins}"):
            factory(AFFINE, bins=bins)
    with pytest.raises(ConfigError, match="at least 1 range, got steps="):
        Mse(AFFINE, steps=min(bins, 0))


def brute_force(x: Tensor, spec: QuantSpec) -> float:
    """The smallest error over a fine grid of ranges."""
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    if spec.scheme is Scheme.SYMMETRIC:
        bound = torch.cat([torch.linspace(0.002, 1.5, 200), torch.logspace(-3, -1, 50)]) * max(-low, high)
        return float(mse(x, -bound, bound, spec).min())
    fine, coarse = (
        torch.linspace(0.005, 1.34, 200),
        torch.cat([torch.linspace(0.05, 1.34, 16), torch.tensor([0.01, 0.02])]),
    )
    ratios = coarse if low and high else fine
    best = math.inf
    for _ in range(2):
        pairs = torch.cartesian_prod(*(end * (ratios if end else ratios[:1]) for end in (low, high)))
        errors = mse(x, pairs[:, 0], pairs[:, 1], spec)
        best = min(best, float(errors.min()))
        low, high = pairs[errors.argmin()].tolist()
        ratios = torch.linspace(0.96, 1.04, 17)
    return best


MANY = 4000  # so many that brute force cannot fit the noise of the sample
DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(MANY),
    "relu": lambda: torch.randn(MANY).relu(),
    "gelu": lambda: torch.nn.functional.gelu(torch.randn(MANY)),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((MANY,)),
    "student": lambda: torch.distributions.StudentT(2.0).sample((MANY,)),
    "uniform": lambda: torch.rand(MANY) * 2 - 0.3,
    "negative": lambda: -(torch.rand(MANY) ** 3),
    "shifted": lambda: torch.randn(MANY) * 0.5 + 3,
    "bimodal": lambda: torch.cat([torch.randn(MANY // 2) * 0.1 - 1, torch.randn(MANY // 2) * 0.1 + 2]),
    "outlier": lambda: torch.cat([torch.randn(MANY - 1), torch.tensor([60.0])]),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_histogram_is_as_good_as_brute_force(name: str, scheme: Scheme, bits: int) -> None:
    x = DISTRIBUTIONS[name]()
    spec = QuantSpec(IntType(bits, scheme is Scheme.SYMMETRIC), scheme)
    low, high = seen(Histogram(spec), x).range()
    assert float(mse(x, low[None], high[None], spec)) <= 1.05 * brute_force(x, spec)


@pytest.mark.parametrize("bits", [2, 8])
def test_histogram_after_growth_is_as_good_as_brute_force(bits: int) -> None:
    batches = [torch.randn(500) * size for size in (0.5, 1.0, 1.3)]
    spec = QuantSpec(IntType(bits, False))
    low, high = seen(Histogram(spec), *batches).range()
    x = torch.cat(batches)
    assert float(mse(x, low[None], high[None], spec)) <= 1.05 * brute_force(x, spec)


def test_histogram_keeps_values_that_pile_up_exactly() -> None:
    for values in ([0.0, 1.0], [5.0], [-6.0, 0.0]):
        x = torch.tensor(values).repeat(50)
        scale, zero_point = seen(Histogram(AFFINE), x).qparams()
        fake, _ = affine.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=255)
        torch.testing.assert_close(fake, x, rtol=1e-6, atol=0)


def test_histogram_of_unsigned_narrow_and_signed_affine() -> None:
    x = torch.randn(MANY)
    for spec in (QuantSpec(INT8), QuantSpec(UINT8, Scheme.SYMMETRIC), QuantSpec(UINT8, narrow_range=True)):
        low, high = seen(Histogram(spec), x).range()
        assert float(mse(x, low[None], high[None], spec)) <= 1.05 * brute_force(x, spec)


# --- Percentile and Mse -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_that_of_the_data(percentile: float) -> None:
    x = torch.randn(20_000)
    low, high = ends(seen(Percentile(AFFINE, percentile), x))
    tail = (100 - percentile) / 200
    assert low == pytest.approx(float(x.quantile(tail)), abs=0.1)
    assert high == pytest.approx(float(x.quantile(1 - tail)), abs=0.1)


def test_percentile_of_everything_is_the_extremes() -> None:
    x = torch.randn(1000)
    assert ends(seen(Percentile(AFFINE, 100.0), x)) == (float(x.min()), float(x.max()))


def test_percentile_leaves_out_an_outlier_and_zeros() -> None:
    x = torch.cat([torch.rand(10_000), torch.zeros(90_000), torch.tensor([1000.0])])
    low, high = ends(seen(Percentile(AFFINE, 99.9, bins=4096), x))
    assert low >= 0.0 and high < 2.0


@pytest.mark.parametrize("percentile", [50.0, 101.0, 0.999, math.nan])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(ConfigError, match="percentile lies in"):
        Percentile(AFFINE, percentile)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerGroup(100), PerGroup(64)], ids=str)
def test_mse_beats_min_max_on_heavy_tails(granularity: Granularity) -> None:
    x = torch.distributions.StudentT(2.0).sample((4, 1000))
    spec = QuantSpec(IntType(4, True), Scheme.SYMMETRIC, granularity)
    layout = dict(zip(("axis", "group_size"), granularity.layout(), strict=True))
    errors = {}
    for factory in (MinMax, Mse):
        scale, zero_point = seen(factory(spec), x).qparams()
        bounds = {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
        errors[factory] = float((affine.fake_quantize(x, scale, zero_point, **layout, **bounds)[0] - x).square().sum())
    assert errors[Mse] < 0.95 * errors[MinMax]


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerGroup(4)], ids=str)
def test_mse_is_best_of_its_grid(granularity: Granularity) -> None:
    """Each scale's factor is the best of the grid for its own elements."""
    x = torch.randn(3, 10) ** 3
    spec = QuantSpec(IntType(3, True), Scheme.SYMMETRIC, granularity)
    observer = Mse(spec, steps=20)
    observer(x)
    axis, group_size = granularity.layout()
    bounds = {"quant_min": spec.quant_min, "quant_max": spec.quant_max}

    def error(low: Tensor, high: Tensor) -> Tensor:
        qparams = affine.choose_qparams(low, high, symmetric=True, **bounds)
        fake, _ = affine.fake_quantize(x, *qparams, axis=axis, group_size=group_size, **bounds)
        return observer._reduce((fake - x).square())

    low, high = affine.min_max(x, axis, group_size)
    candidates = torch.stack([error(low * r, high * r) for r in torch.linspace(1.0, 0.2, 20).tolist()])
    torch.testing.assert_close(error(*observer.range()), candidates.amin(0))
    torch.testing.assert_close(observer._reduce(x.square()).sum(), x.square().sum())


def test_mse_averages_batches() -> None:
    batches = [torch.randn(50) * 2, torch.randn(50), torch.randn(50) * 5]
    alone = torch.tensor([ends(seen(Mse(AFFINE), b)) for b in batches]).mean(0)
    torch.testing.assert_close(torch.tensor(ends(seen(Mse(AFFINE), *batches))), alone)


# --- factories and one's own ------------------------------------------------------------------------------------------


def test_factories_are_values() -> None:
    one, other = Histogram.with_options(bins=512), Histogram.with_options(bins=512)
    assert one == other and hash(one) == hash(other)
    assert one != Histogram.with_options(bins=256) != Percentile.with_options(bins=256)
    assert Percentile.with_options(bins=64, percentile=99.0) == Percentile.with_options(percentile=99.0, bins=64)
    assert str(one) == "Histogram(bins=512)"
    assert pickle.loads(pickle.dumps(one)) == one
    observer = one(AFFINE)
    assert isinstance(observer, Histogram) and observer.bins == 512
    assert QuantSpec(UINT8, observer=one) == QuantSpec(UINT8, observer=other) != QuantSpec(UINT8, observer=Histogram)


class Fixed(Observer):
    """Whatever the data, one range."""

    def __init__(self, spec: QuantSpec, bound: float = 3.0) -> None:
        super().__init__(spec)
        self.bound = bound

    def observe(self, x: Tensor) -> None:
        self.min_max(x)

    def range(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(-self.bound), torch.tensor(self.bound)


@pytest.mark.parametrize("factory", [Fixed, Fixed.with_options(bound=3.0), partial(Fixed, bound=3.0)])
def test_ones_own_observer(factory: Callable[[QuantSpec], Observer]) -> None:
    module = FakeQuantize(QuantSpec(INT8, Scheme.SYMMETRIC, observer=factory), layer="mine")
    module.observing = True
    module(torch.randn(4))
    module.calculate()
    assert float(module.scale) == pytest.approx(3 / 127.5)
    with pytest.raises(CalibrationError, match="mine"):
        module(torch.tensor([math.nan]))


def test_an_observer_without_methods_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Observer(AFFINE)(torch.ones(1))
    with pytest.raises(NotImplementedError):
        Observer(AFFINE).range()
