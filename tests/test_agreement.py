"""What may differ between a prepared model and its integers, by the dtype of the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.agreement import LayerAgreement, require
from qfx.errors import VerifyError
from qfx.models import MODELS_SMALL


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (LayerAgreement("conv", "a.b", 2, None, 1), "off by 2 LSB at 'conv' where it may be off by 1 LSB"),
        (LayerAgreement("out", "a.b", None, 0.5, 1e-3), "off by 0.5 of its greatest magnitude at 'out' .* 0.001"),
    ],
)
def test_the_first_layer_that_breaks_the_contract_is_named(layer: LayerAgreement, text: str) -> None:
    fine = LayerAgreement("fine", "z", 1, None, 1)
    require([fine])
    with pytest.raises(VerifyError, match=text) as caught:
        require([fine, layer, LayerAgreement("later", "c", 9, None, 1)])
    assert caught.value.where == "a.b"


@pytest.mark.parametrize(
    ("dtype", "lsb", "relative"), [(torch.float32, 1, 1e-3), (torch.float16, 1, 2e-3), (torch.bfloat16, 2, 1.6e-2)]
)
def test_half_precision_may_differ_by_its_own_rounding(dtype: torch.dtype, lsb: int, relative: float) -> None:
    model, example = MODELS_SMALL["resnet20"]()

    def cast(x: Any) -> Any:
        return x.to(dtype) if x.is_floating_point() else x

    assert isinstance(model, nn.Module) and isinstance(example, tuple)
    prepared = qfx.prepare(model.to(dtype), tuple(map(cast, example)))
    found = qfx.report(qfx.convert(qfx.calibrate(prepared, [tuple(map(cast, example))]), check=True)).agreement
    assert {layer.allowed for layer in found if layer.lsb is not None} == {lsb}
    (allowed,) = {layer.allowed for layer in found if layer.lsb is None}
    assert allowed == pytest.approx(relative, rel=0.03)
