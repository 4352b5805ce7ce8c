"""FakeQuantize: passing, observing and rounding, static, dynamic and fixed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from qfx import affine
from qfx.errors import CalibrationError, ConfigError
from qfx.fake_quant import FakeQuantize
from qfx.observers import Histogram, MinMax
from qfx.spec import INT4, INT8, UINT8, FixedSpec, PerAxis, PerGroup, PerToken, QuantSpec, Scheme

TOKEN = QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)


def calibrated(spec: QuantSpec, x: Tensor) -> FakeQuantize:
    module = FakeQuantize(spec, layer="block.0")
    module.observing = True
    module(x)
    module.observing = False
    module.calculate()
    module.quantizing = True
    return module


def test_it_passes_tensors_through_until_told() -> None:
    module, x = FakeQuantize(QuantSpec(UINT8)), torch.randn(5)
    assert module(x) is x
    assert module.observer is not None and not module.observer.seen
    module.observing = True
    assert module(x) is x
    assert module.observer.seen


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(UINT8),
        QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), MinMax),
        QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(4), narrow_range=True),
        QuantSpec(UINT8, observer=Histogram),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_quantize_and_dequantize(spec: QuantSpec, dtype: torch.dtype) -> None:
    x = torch.randn(3, 10).to(dtype)
    module = calibrated(spec, x)
    axis, group_size = spec.granularity.layout()
    bounds = {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
    layout = {"axis": axis, "group_size": group_size}
    q = affine.quantize(x, module.scale, module.zero_point, **layout, **bounds, dtype=spec.element.dtype)
    want = affine.dequantize(q, module.scale, module.zero_point, **layout, dtype=dtype)
    got = module(x)
    assert got.dtype is dtype
    assert torch.equal(got, want)
    assert module.scale.dtype is torch.float32 and module.zero_point.dtype is torch.int32


def test_what_saw_nothing_names_its_layer() -> None:
    with pytest.raises(CalibrationError, match=r"no calibration data.*block\.0"):
        FakeQuantize(QuantSpec(UINT8), layer="block.0").calculate()


def test_rounding_without_a_scale_is_an_error() -> None:
    module = FakeQuantize(QuantSpec(UINT8))
    module.quantizing = True
    with pytest.raises(ConfigError, match="scale"):
        module(torch.randn(3))


def test_gradients_pass_straight_through_inside_the_range() -> None:
    module = calibrated(QuantSpec(UINT8), torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-5.0, -0.5, 0.0, 0.5, 5.0], requires_grad=True)
    module(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_a_dynamic_scale_follows_every_call() -> None:
    module = FakeQuantize(TOKEN)
    assert module.dynamic and module.observer is None
    module.quantizing = True
    for size in (1.0, 1000.0):
        x = torch.randn(2, 3, 8) * size * torch.tensor([1.0, 10.0, 100.0]).unsqueeze(1)
        scale, zero_point = module.qparams(x)
        assert scale.shape == zero_point.shape == (2, 3, 1)
        torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 127.5)
        assert bool(((module(x) - x).abs() <= scale * 0.501).all())
    module.calculate()
    assert module.scale.numel() == 0


def test_a_dynamic_scale_takes_empty_batches() -> None:
    for granularity_spec in (TOKEN, QuantSpec(UINT8, dynamic=True)):
        module = FakeQuantize(granularity_spec)
        module.quantizing = True
        assert module(torch.zeros(0, 4)).shape == (0, 4)


def test_a_dynamic_scale_has_no_gradient_of_its_own() -> None:
    module = FakeQuantize(TOKEN)
    module.quantizing = True
    x = torch.randn(2, 8, requires_grad=True)
    module(x).sum().backward()
    scale, _ = module.qparams(x)
    assert not scale.requires_grad
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0}


def test_a_fixed_spec_is_ready_at_once() -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the user's business, not the scale's
    try:
        module = FakeQuantize(FixedSpec(UINT8, 1 / 256, 0))
    finally:
        torch.set_default_dtype(previous)
    module.calculate()
    module.quantizing = True
    assert module.observer is None and not module.dynamic
    assert module.scale.dtype is torch.float32
    x = torch.rand(50)
    assert float((module(x) - x).abs().max()) <= 1 / 256


def test_copies_share_nothing() -> None:
    module = calibrated(QuantSpec(UINT8), torch.tensor([-1.0, 1.0]))
    twin = copy.deepcopy(module)
    before = module.scale.clone()
    twin.observing = True
    twin(torch.tensor([-9.0, 9.0]))
    twin.calculate()
    assert torch.equal(module.scale, before)
    assert float(twin.scale) > float(before)


def test_it_shows_its_spec() -> None:
    assert repr(FakeQuantize(FixedSpec(UINT8, 0.5, 3))) == "FakeQuantize(uint8 fixed scale 0.5 zero point 3)"
