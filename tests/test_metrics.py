"""Metrics: known values, and inputs that break naive formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.errors import ConfigError
from qfx.metrics import cosine, sqnr_db, top1_agreement

ONES = torch.ones(4)


def test_sqnr_of_known_noise() -> None:
    assert sqnr_db(ONES, ONES * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(ONES, ONES * 1.01) == pytest.approx(40.0, abs=1e-3)
    assert sqnr_db(ONES * 1e-30, ONES * 1.1e-30) == pytest.approx(20.0, abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "actual", "expected"),
    [
        (ONES, ONES, math.inf),
        (torch.zeros(4), torch.zeros(4), math.inf),
        (torch.zeros(4), ONES, -math.inf),
        (ONES, torch.tensor([1.0, math.inf, 1.0, 1.0]), -math.inf),
        (torch.zeros(0), torch.zeros(0), math.inf),
    ],
)
def test_sqnr_at_its_limits(reference: torch.Tensor, actual: torch.Tensor, expected: float) -> None:
    assert sqnr_db(reference, actual) == expected


def test_nan_is_not_hidden() -> None:
    broken = torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert math.isnan(sqnr_db(ONES, broken))
    assert math.isnan(sqnr_db(broken, ONES))
    assert math.isnan(cosine(ONES, broken))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.uint8])
def test_dtypes_are_widened(dtype: torch.dtype) -> None:
    x = torch.full((1000,), 100).to(dtype)  # the sum of squares overflows every one of them
    assert sqnr_db(x, (x - 1).to(dtype)) == pytest.approx(40.0, abs=0.1)
    assert cosine(x, x) == pytest.approx(1.0)


def test_sqnr_detaches() -> None:
    assert sqnr_db(ONES.clone().requires_grad_(), ONES * 2) == pytest.approx(0.0)


@pytest.mark.parametrize("metric", [sqnr_db, cosine])
def test_shapes_must_agree(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"\[4\] and \[2, 4\]"):
        metric(ONES, torch.ones(2, 4))


@given(st.integers(0, 2**31), st.sampled_from([1e-20, 1.0, 1e15]))
def test_cosine_stays_in_its_interval(seed: int, size: float) -> None:
    x = torch.randn(7, generator=torch.Generator().manual_seed(seed)) * size
    assert cosine(x, x) <= 1.0
    assert cosine(x, 3 * x) == pytest.approx(1.0, abs=1e-6)
    assert cosine(x, -x) >= -1.0
    assert -1.0 <= cosine(x, x.flip(0)) <= 1.0


def test_cosine_of_zeros() -> None:
    assert cosine(torch.zeros(3), torch.zeros(3)) == 1.0
    assert cosine(torch.zeros(3), torch.ones(3)) == 0.0
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0.0


def test_top1_agreement() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert top1_agreement(logits, logits * 2) == 1.0
    assert top1_agreement(logits, -logits) == 0.0
    other = logits.clone()
    other[0] = logits[0].flip(0)
    assert top1_agreement(logits, other) == 0.75
