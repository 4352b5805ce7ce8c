"""What a measurement knows of each layer, which trials it makes, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx import api, score_cache
from qfx.choices import FLOAT, Choice
from qfx.divergence import Kl
from qfx.errors import CalibrationError, ConfigError, QfxWarning, UnsupportedError
from qfx.layers import layers_of
from qfx.measure import Measurement, _spread, facts_of, measure_sensitivity
from qfx.meta import kept_calls
from qfx.observers import Mse
from qfx.recipe import Recipe
from qfx.samples import samples_of
from qfx.scan import scan
from qfx.sensitivity_table import Sensitivity, rank_correlation
from qfx.spec import PerGroup
from qfx.targets import Reference
from qfx.widths import Trial

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in parts of 8 rows, so that a few rows are several."""
    monkeypatch.setattr("qfx.samples._MOST_ROWS", 8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x).relu()).relu()
        return self.head(x @ x.softmax(-1).t() @ x)


def calibrated(recipe: Recipe, data: Any = X, model: nn.Module | None = None) -> fx.GraphModule:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model or Net().eval(), X[:2], recipe=recipe, target="reference")
        api.keep_rows(made, 32)
        api.calibrate(made, data if isinstance(data, list) else [data])
    return api.graphs(made)[""]


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return calibrated(Recipe.int8())


def measured(gm: fx.GraphModule, wanted: Measurement, recipe: Recipe | None = None) -> Sensitivity:
    samples = samples_of(gm, kept_calls(gm), rows=wanted.rows, split=wanted.splits)
    return measure_sensitivity(gm, samples, wanted, recipe=recipe or Recipe.int8(), target=Reference(), model="Net")


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(recipe: Recipe, wanted: Measurement | None = None) -> dict[str, Any]:
    gm = calibrated(recipe)
    wanted = wanted or Measurement((2, 4), (4, 8))
    return {y.path: facts_of(gm, y, wanted, recipe, Reference()) for y in layers_of(gm)}


def test_facts() -> None:
    found = facts(Recipe.int8().set("mid", weight=4).skip("head"))
    assert list(found) == ["stem", "mid", ""] and "head" not in found
    stem, mid, product = found.values()
    assert (stem.key, stem.op, stem.weight_shape, stem.scales, stem.numel) == ("stem:linear", "linear", (8, 6), 8, 48)
    assert (stem.given, stem.fixed, stem.end) == (Choice(8, 8), False, True)
    assert set(stem.choices) == {*(Choice(w, a) for w in (2, 4, 8) for a in (4, 8)), FLOAT}
    assert (mid.given, mid.fixed) == (Choice(4, 8), True)
    assert (product.weight_shape, product.numel, product.scales, product.given) == ((), 0, 0, Choice(None, 8))
    assert set(product.choices) == {Choice(None, 4), Choice(None, 8), FLOAT}


def test_facts_of_groups_and_of_dynamic_data() -> None:
    grouped = facts(Recipe.w4a16(32), Measurement((4,), ()))
    assert grouped["stem"].scales == 8 and grouped["stem"].given == Choice(4, None)
    dynamic = facts(Recipe.int8_dynamic(), Measurement((4,), (4,)))
    assert dynamic["stem"].choices == (Choice(4, None), Choice(8, None), FLOAT)  # its data have no range to choose


@pytest.mark.parametrize(
    ("bits", "shape", "scales", "size"),
    [
        (8, (4, 3, 3, 3), 4, 4 * 27 + 16),
        (6, (4, 3, 3, 3), 4, 4 * 21 + 16),
        (4, (4, 3, 3, 3), 4, 4 * 14 + 16),  # a row of 27 in two per byte
        (3, (5, 7), 5, 5 * 3 + 20),
        (2, (5, 7), 5, 5 * 2 + 20),
        (None, (5, 7), 5, 140),
        (8, (), 0, 0),
    ],
)
def test_bytes(graph: fx.GraphModule, bits: int | None, shape: tuple[int, ...], scales: int, size: int) -> None:
    from dataclasses import replace

    layer = facts_of(graph, layers_of(graph)[0], Measurement(), Recipe.int8(), Reference())
    layer = replace(layer, weight_shape=shape, scales=scales, macs=10)
    costs = layer.costs(Choice(bits, 8))
    assert costs["weight_bytes"] == size
    assert costs["bit_operations"] == 10 * (bits or 32) * 8
    assert costs["weight_bits"] == layer.numel * (bits or 32)
    assert "latency_ms" not in costs
    assert replace(layer, times=((FLOAT, 2.0),)).costs(FLOAT)["latency_ms"] == 2.0


def test_only_what_the_target_can_run() -> None:
    class NoNarrow(Reference):
        def refuses(self, node: Any, row: Any, qconfig: Any) -> str | None:
            narrow = qconfig.weight is not None and qconfig.weight.bits < 4
            return "too narrow" if narrow else super().refuses(node, row, qconfig)

    gm = calibrated(Recipe.int8())
    found = facts_of(gm, layers_of(gm)[0], Measurement((2, 4), (8,)), Recipe.int8(), NoNarrow())
    assert found.choices == (Choice(4, 8), Choice(8, 8), FLOAT)


# --- trials and results -----------------------------------------------------------------------------------------------


def test_weights_and_data_apart(graph: fx.GraphModule) -> None:
    found = measured(graph, Measurement((2, 8), (4,), "sqnr"))
    keys = ["stem:linear", "mid:linear", "matmul", "head:linear"]
    expected = {Trial(k, "weight", b) for k in keys if k != "matmul" for b in (2, 8)}
    assert set(found.scores) == expected | {Trial(k, "activation", 4) for k in keys}
    assert found.damages == {t: pytest.approx(10 ** (-score / 10)) for t, score in found.scores.items()}
    assert (found.score, found.unit, found.rows, found.target) == ("sqnr", "dB", 20, "reference")
    assert all(found.scores[Trial(k, "weight", 2)] < found.scores[Trial(k, "weight", 8)] for k in keys if k != "matmul")


@pytest.mark.parametrize(("weights", "data"), [((3,), ()), ((), (3,))])
def test_either_alone(graph: fx.GraphModule, weights: tuple[int, ...], data: tuple[int, ...]) -> None:
    found = measured(graph, Measurement(weights, data, "kl"))
    assert {t.part for t in found.scores} == ({"weight"} if weights else {"activation"})


def test_nothing_to_measure(graph: fx.GraphModule) -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        measured(graph, Measurement((), ()))


def test_the_agreement_is_that_of_the_two_scores(graph: fx.GraphModule) -> None:
    wanted = Measurement((2, 4), (4, 8), check=5)
    found = measured(graph, wanted)
    assert found.agreement is not None and found.agreement.exact == "kl" and found.agreement.trials == 5
    some = _spread(list(found.scores), dict(found.scores), 5)
    samples = samples_of(graph, kept_calls(graph), rows=32, split=True)
    exact = scan(graph, layers_of(graph), some, samples, Kl())
    assert found.agreement.correlation == rank_correlation([found.scores[t] for t in some], list(exact.values()))
    assert measured(graph, Measurement((2, 4), (4, 8), check=0)).agreement is None
    assert measured(graph, Measurement((2,), (), "kl")).agreement is None


def test_trials_that_are_checked_are_spread() -> None:
    trials = [Trial(str(i), "weight", 4) for i in range(10)]
    scores = {t: float(-i) for i, t in enumerate(trials)}
    assert [t.key for t in _spread(trials, scores, 4)] == ["9", "6", "3", "0"]
    assert len(_spread(trials, scores, 10)) == len(_spread(trials, scores, 99)) == 10
    assert _spread(trials, scores, 1) == _spread(trials, scores, 0) == []
    for count in range(2, 10):
        assert len(set(_spread(trials, scores, count))) == count


def test_the_data_are_the_first_rows() -> None:
    gm = calibrated(Recipe.int8(), [X[:3], X[3:5]])
    assert measured(gm, Measurement((4,), (), "kl")).rows == 5  # they end early
    long = calibrated(Recipe.int8(), [X, X])
    parts = samples_of(long, kept_calls(long), rows=11, split=True)
    assert [len(part.inputs[0]) for part in parts] == [8, 3]
    whole = samples_of(long, kept_calls(long), rows=11, split=False)
    assert [len(part.inputs[0]) for part in whole] == [20] and torch.equal(whole[0].inputs[0], X)
    with pytest.raises(CalibrationError, match="no data"):
        samples_of(long, [], rows=4, split=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"weight_bits": (1, 4)}, "weight_bits holds 1"),
        ({"activation_bits": (9,)}, "activation_bits holds 9"),
        ({"weight_bits": (4.0,)}, "weight_bits holds 4.0"),
        ({"weight_bits": ("4",)}, "weight_bits holds '4'"),
        ({"score": "mse"}, "no score 'mse'"),
        ({"score": 3}, "no score 3"),
        ({"mode": "all"}, "no mode 'all'"),
        ({"mode": "all_but"}, "fisher"),
        ({"rows": 0}, "0 rows"),
    ],
    ids=str,
)
def test_what_cannot_be_measured(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Measurement(**options)


def test_a_model_without_layers() -> None:
    gm = calibrated(Recipe.int8(), model=nn.Softmax(-1))
    with pytest.raises(UnsupportedError, match="no layer that is quantized"):
        measured(gm, Measurement())


def test_data_whose_observer_keeps_one_width() -> None:
    default = Recipe.int8().default
    assert default.activation is not None
    from dataclasses import replace

    recipe = Recipe("mse", replace(default, activation=replace(default.activation, observer=Mse)))
    gm = calibrated(recipe)
    assert measured(gm, Measurement((4,), (8,), "kl"), recipe).scores
    with pytest.raises(ConfigError, match="Mse") as caught:
        measured(gm, Measurement((4,), (4,), "kl"), recipe)
    assert "Histogram" in caught.value.hint


def test_one_layer() -> None:
    gm = calibrated(Recipe.int8(), model=nn.Linear(6, 3).eval())
    found = measured(gm, Measurement((2, 4), (8,)))
    assert [layer.end for layer in found.layers] == [True] and found.groups == ((0,),)
    assert found.agreement is not None and found.agreement.trials == 3


def test_a_group_wise_weight_has_a_scale_for_each_group() -> None:
    spec = Recipe.w4a16(4).default.weight
    assert spec is not None and spec.granularity == PerGroup(4)
    gm = calibrated(Recipe.w4a16(4))
    found = facts_of(gm, layers_of(gm)[0], Measurement((4,), ()), Recipe.w4a16(4), Reference())
    assert found.scales == 8 * 2  # six columns: a group of four and one of two
