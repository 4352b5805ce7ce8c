"""Specs are values: they compare, hash, print and pickle, and refuse what cannot be meant."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from qfx.errors import ConfigError
from qfx.observers import Histogram, MinMax
from qfx.spec import (
    INT4,
    INT8,
    UINT4,
    UINT8,
    DerivedSpec,
    FixedSpec,
    IntType,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    QConfig,
    QuantSpec,
    Scheme,
    SharedSpec,
)
from qfx.training import Estimator, Fixed


@pytest.mark.parametrize("bits", range(2, 9))
def test_limits_of_integers(bits: int) -> None:
    signed, unsigned = IntType(bits, True), IntType(bits, False)
    assert (signed.quant_min, signed.quant_max) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.quant_min, unsigned.quant_max) == (0, 2**bits - 1)
    assert (signed.dtype, unsigned.dtype) == (torch.int8, torch.uint8)
    assert (str(signed), str(unsigned)) == (f"int{bits}", f"uint{bits}")
    narrow = QuantSpec(signed, narrow_range=True)
    assert narrow.quant_min == -narrow.quant_max
    assert narrow.bits == bits


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 8.0, "8", None, True])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ConfigError, match="2 to 8 bits, got"):
        IntType(bits, True)  # type: ignore[arg-type]


def test_layouts_of_granularities() -> None:
    assert PerTensor().layout() == (None, None)
    assert PerAxis(1).layout() == (1, None)
    assert PerGroup(32).layout() == (-1, 32)
    assert PerToken().layout() == (-1, -1)


@pytest.mark.parametrize("size", [0, -1])
def test_groups_hold_something(size: int) -> None:
    with pytest.raises(ConfigError, match="at least one element"):
        PerGroup(size)


def test_static_per_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="only at run time"):
        QuantSpec(INT8, granularity=PerToken())
    assert QuantSpec(INT8, granularity=PerToken(), dynamic=True).dynamic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "float16", None])
def test_scales_are_kept_in_float32_or_float16(dtype: object) -> None:
    with pytest.raises(ConfigError, match="scales are not kept as") as raised:
        QuantSpec(INT8, scale_dtype=dtype)  # type: ignore[arg-type]
    assert "torch.float32 or torch.float16" in raised.value.hint


def test_float16_scales_are_for_weights() -> None:
    with pytest.raises(ConfigError, match="found at run time"):
        QuantSpec(INT8, granularity=PerToken(), dynamic=True, scale_dtype=torch.float16)
    spec = QuantSpec(INT8, scale_dtype=torch.float16)
    with pytest.raises(ConfigError, match="scales of activations are float32") as raised:
        QConfig(spec, None)
    assert "for weights" in raised.value.hint
    assert QConfig(None, spec).weight is spec
    assert FixedSpec(UINT8, 0.1, 0).scale_dtype is torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_fixed_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ConfigError, match="positive and finite"):
        FixedSpec(UINT8, scale, 0)


@pytest.mark.parametrize(("element", "zero_point"), [(UINT8, -1), (UINT8, 256), (INT8, 128), (UINT4, 16)])
def test_a_fixed_zero_point_is_one_of_the_integers(element: IntType, zero_point: int) -> None:
    with pytest.raises(ConfigError, match="zero has no integer"):
        FixedSpec(element, 0.1, zero_point)


VALUES = [
    (lambda: QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(32), MinMax), "int4 symmetric per group of 32"),
    (lambda: QuantSpec(UINT8, observer=Histogram), "uint8 affine per tensor"),
    (lambda: QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True), "int8 symmetric per token dynamic"),
    (
        lambda: QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), narrow_range=True),
        "int8 symmetric per axis 0 narrow range",
    ),
    (
        lambda: QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(64), scale_dtype=torch.float16),
        "int4 symmetric per group of 64 float16 scales",
    ),
    (lambda: FixedSpec(UINT8, 1 / 256, 0), "uint8 fixed scale 0.00390625 zero point 0"),
    (lambda: SharedSpec(0, QuantSpec(UINT8)), "shares input 0"),
    (lambda: DerivedSpec(), "int32 at input_scale * weight_scale"),
    (lambda: QConfig(QuantSpec(UINT8), None), "weight: float; activation: uint8 affine per tensor"),
]


@pytest.mark.parametrize(("make", "text"), VALUES, ids=[text for _, text in VALUES])
def test_specs_are_values(make, text: str) -> None:  # type: ignore[no-untyped-def]
    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == text
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bits = 3


def test_specs_differ_in_every_field() -> None:
    base = QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), MinMax)
    changes = {
        "element": INT4,
        "scheme": Scheme.AFFINE,
        "granularity": PerAxis(1),
        "observer": MinMax.with_options(),
        "dynamic": True,
        "narrow_range": True,
        "ranges": Fixed(),
        "estimator": Estimator.STRAIGHT_THROUGH,
        "scale_dtype": torch.float16,
    }
    others = {dataclasses.replace(base, **{name: value}) for name, value in changes.items()}
    assert base not in others
    assert len(others) == len(changes) == len(dataclasses.fields(base))


def test_bits_of_derived_specs() -> None:
    assert DerivedSpec().bits == 32
    assert SharedSpec(0, QuantSpec(INT4)).bits == 4
    assert (FixedSpec(UINT4, 0.1, 0).quant_min, FixedSpec(UINT4, 0.1, 0).quant_max) == (0, 15)
