"""How data use a range: the statistics against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx import affine
from qfx.digests import MOST, digests_of
from qfx.integer_weights import weight_use
from qfx.range_use import BULK, RangeUse, ValueCounts

SEEDS = st.integers(0, 10**6)
MAGNITUDES = st.floats(-12.0, 12.0).map(lambda e: 10.0**e)
BIN = 0.033  # a bin's relative width


def batches_of(seed: int, magnitude: float, count: int, number: int) -> list[torch.Tensor]:
    """Heavy-tailed values, a third of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) ** 3 * magnitude
    x[torch.rand(count, generator=generator) < 1 / 3] = 0.0
    return list(x.split(-(-count // number)))


def ranked(x: torch.Tensor, share: float) -> float:
    """The least value that ``share`` of all do not exceed."""
    return float(x.sort().values[max(math.ceil(share * x.numel()), 1) - 1])


@given(SEEDS, MAGNITUDES, st.integers(3, 4000), st.integers(1, 4))
def test_extremes_and_quantiles(seed: int, magnitude: float, count: int, number: int) -> None:
    batches, counts = batches_of(seed, magnitude, count, number), ValueCounts()
    for batch in batches:
        counts.add(batch)
    x = torch.cat(batches)
    assert counts.total == count
    assert counts.extremes == (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
    values = x[x != 0]
    if not len(values):
        assert counts.outliers == 1.0 and counts.bulk() == (0.0, 0.0)
        return
    wanted = float(values.abs().max()) / ranked(values.abs(), BULK)
    assert counts.outliers == pytest.approx(wanted, rel=BIN)
    tail = int((1 - BULK) * len(values))
    ordered = values.sort().values
    low, high = min(float(ordered[tail]), 0.0), max(float(ordered[-1 - tail]), 0.0)
    assert counts.bulk() == pytest.approx((low, high), rel=BIN)


LIMITS = st.sampled_from([(0, 255), (-127, 127), (-8, 7)])


@given(SEEDS, MAGNITUDES, st.integers(1, 2000), LIMITS, st.floats(0.05, 20.0))
def test_clipping_is_what_quantize_clips(
    seed: int, magnitude: float, count: int, limits: tuple[int, int], stretch: float
) -> None:
    batches = batches_of(seed, magnitude, count, 2)
    x = torch.cat(batches)
    low, high = x.min() * stretch, x.max() * stretch
    quant_min, quant_max = limits
    scale, zero_point = affine.choose_qparams(
        low, high, symmetric=quant_min == -127, quant_min=quant_min, quant_max=quant_max
    )
    use = RangeUse(scale, zero_point, quant_min, quant_max)
    for batch in batches:
        use.add(batch)
    free = affine.quantize(x, scale, zero_point, quant_min=-(2**30), quant_max=2**30, dtype=torch.int32)
    edge = ((x / scale).abs() % 1 - 0.5).abs() < 1e-3  # on the edge of a step, float32 decides
    assert use.below == pytest.approx(float((free < quant_min).float().mean()), abs=float(edge.float().mean()) + 1e-6)
    assert use.above == pytest.approx(float((free > quant_max).float().mean()), abs=float(edge.float().mean()) + 1e-6)
    width = float(scale) * (quant_max - quant_min)
    wanted = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / width
    assert use.used == pytest.approx(wanted, rel=1e-4)


def test_drift_is_in_widths_of_the_range_and_leaves_outliers_out() -> None:
    use = RangeUse(torch.tensor(1 / 255), torch.tensor(0, dtype=torch.int32), 0, 255)  # [0, 1]
    x = torch.linspace(0, 3, 30001)
    use.add(x)
    use.add(torch.tensor([1000.0]))
    assert use.drift == pytest.approx(2.0, abs=0.1)
    assert use.values.outliers == pytest.approx(1000 / 3, rel=0.04)
    assert use.reach == pytest.approx(1 / 3, rel=0.04)  # the outlier is clipped, so that nothing serves it
    within = RangeUse(torch.tensor(2 / 255), torch.tensor(127, dtype=torch.int32), 0, 255)
    within.add(torch.linspace(-0.5, 0.5, 1001))
    assert within.drift == pytest.approx(-0.25, abs=0.02)
    assert within.below == within.above == 0.0


def test_nothing_and_zeros() -> None:
    use = RangeUse(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 255)
    use.add(torch.zeros(0, 3))
    assert use.values.total == 0 and use.below == 0.0
    use.add(torch.zeros(5))
    assert (use.used, use.values.outliers, use.drift, use.reach) == (0.0, 1.0, 0.0, 1.0)
    use.add(torch.full((2,), 3.0))
    assert use.values.extremes == (0.0, 3.0)


@given(SEEDS, st.sampled_from([2, 4, 8]), st.sampled_from([(None, None), (0, None), (1, None), (-1, 4)]))
def test_weights(seed: int, bits: int, layout: tuple[int | None, int | None]) -> None:
    axis, group_size = layout
    limits = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    w[2], w[:, 3], w[4] = 0.0, 0.0, w[4] * 1e-6
    low, high = affine.min_max(w, axis, group_size)
    scale, zero_point = affine.choose_qparams(low, high, symmetric=True, **limits)
    q = affine.quantize(w, scale, zero_point, axis=axis, group_size=group_size, dtype=torch.int8, **limits)
    channels = axis if axis is not None and group_size is None else 0
    use = weight_use(q, scale, zero_point, axis, group_size, bits=bits, channels=channels)
    lost = {(None, None): (2, 4), (0, None): (), (1, None): (), (-1, 4): ()}[layout]
    assert use.zero_channels == lost
    ends = (q <= limits["quant_min"] + 1) | (q >= limits["quant_max"])
    whole = ends.movedim(channels, 0).all(1)
    assert use.at_ends == pytest.approx(max(0, int(ends.movedim(channels, 0)[~whole].sum()) - scale.numel()) / 48)


def test_clipped_weights_lie_at_the_ends() -> None:
    w = torch.linspace(-1, 1, 400).reshape(2, 200)
    q = affine.quantize(
        w, torch.tensor(0.5 / 127), torch.tensor(0), quant_min=-128, quant_max=127, dtype=torch.int8
    )
    use = weight_use(q, torch.tensor(0.5 / 127), torch.tensor(0), None, None, bits=8, channels=0)
    assert use.at_ends == pytest.approx(0.5, abs=0.02)


def test_digests_know_a_sample_in_any_batch() -> None:
    x, ids = torch.randn(10, 3, 40, 40), torch.randint(0, 9, (10, 7))
    whole = digests_of([x, ids])
    assert len(set(whole)) == 10
    assert digests_of([ids[2:5].clone(), x[2:5].clone()]) == whole[2:5]
    assert not set(digests_of([x + 1e-3, ids])) & set(whole)
    assert digests_of([x.double(), ids]) != whole
    assert len(digests_of([torch.zeros(2 * MOST, 1)])) == MOST
    assert len(digests_of([torch.tensor(1.0)])) == 1 and digests_of([]) == digests_of([])
    assert digests_of([torch.randn(4, 3).bfloat16()]) and digests_of([torch.zeros(2, 0)])
