"""``qfx.compare``: which values are compared, and what they are compared with."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import qfx
from qfx.comparison import compare
from qfx.errors import CaptureError, ConfigError
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


@pytest.fixture(autouse=True)
def _quiet() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        yield


def test_float_against_quantized_names_every_layer() -> None:
    model = Net().eval()
    quantized = qfx.quantize(model, X, verbose=False)
    found = compare(model, quantized, X)
    assert (found.first, found.second) == ("FUSED", "CONVERTED")
    assert [(row.operator, row.layer) for row in found.rows] == [
        ("conv2d", "conv"), ("relu", ""), ("flatten", ""), ("linear", "fc")
    ]  # fmt: skip
    assert [row.shape for row in found.rows] == [(4, 8, 6, 6), (4, 8, 6, 6), (4, 288), (4, 5)]
    assert all(20 < row.sqnr_db < 80 for row in found.rows)
    assert found.rows[-1].sqnr_db == pytest.approx(sqnr_db(model(X), quantized(X)), abs=1.5)  # ties round apart
    assert "SQNR dB, CONVERTED against FUSED" in str(found) and f"{found.rows[0].sqnr_db:.1f}" in str(found)


def test_a_layer_that_is_damaged_stands_out_and_so_do_those_behind_it() -> None:
    model = Net().eval()
    recipe = qfx.Recipe.int8().set("conv", weight=2)
    found = compare(model, qfx.quantize(model, X, recipe=recipe, verbose=False), X)
    good = compare(model, qfx.quantize(model, X, verbose=False), X)
    assert all(bad.sqnr_db < fine.sqnr_db - 10 for bad, fine in zip(found.rows, good.rows, strict=True))
    assert found.worst(1)[0].sqnr_db == min(row.sqnr_db for row in found.rows)
    assert len(found.worst(2)) == 2


def test_prepared_models_are_float_before_calibration_and_rounded_after() -> None:
    model = Net().eval()
    prepared = qfx.prepare(model, X)
    assert {row.sqnr_db for row in compare(model, prepared, X).rows} == {math.inf}
    qfx.calibrate(prepared, [X])
    rounded = compare(model, prepared, X)
    assert rounded.second == "CALIBRATED"
    assert all(20 < row.sqnr_db < 80 for row in rounded.rows)
    same = compare(prepared, qfx.convert(prepared), X)
    assert all(row.sqnr_db > 45 for row in same.rows)
    assert sqnr_db(model(X), prepared(X)) > 100  # it still computes in float


def test_a_model_equals_itself() -> None:
    model = Net().eval()
    quantized = qfx.quantize(model, X, verbose=False)
    for one in (model, quantized):
        assert {row.sqnr_db for row in compare(one, one, X).rows} == {math.inf}


def test_inputs_by_keyword() -> None:
    model, example = MODELS_SMALL["bert_base"]()
    found = compare(model, qfx.quantize(model, example, verbose=False), example)
    assert len(found.rows) > 20 and all(row.sqnr_db > 10 for row in found.rows)
    assert found.to_dict()["rows"]


def test_models_are_left_alone() -> None:
    model = Net()  # in training mode
    before = {name: t.clone() for name, t in model.state_dict().items()}
    compare(model, qfx.quantize(Net().eval(), X, verbose=False), X)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Stops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if float(x.sum()) > -1e9 else x


def test_what_cannot_be_compared() -> None:
    model = Net().eval()
    quantized = qfx.quantize(model, X, verbose=False)
    with pytest.raises(ConfigError, match="no value in common"):
        compare(nn.Sequential(nn.Tanh()), quantized, X)
    with pytest.raises(CaptureError):
        compare(model, quantized, torch.randn(4, 5))
    with pytest.raises(ConfigError, match="captured in 1 parts, the first is 'body'"):
        compare(quantized, qfx.quantize(Stops().eval(), X, verbose=False), X)
