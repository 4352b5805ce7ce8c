"""Accuracy control: the drop holds, in few trials; whatever ends it, the best so far is returned, never silently."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx import score_cache
from qfx.accuracy_control import AccuracyWarning, Outcome, Trials, control
from qfx.auto_recipe import AutoRecipe
from qfx.bit_allocation import Allocation, allocate_bits, ladder
from qfx.budget import Budget
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.errors import CalibrationError, ConfigError
from qfx.recipe import Recipe
from qfx.sensitivity_table import Sensitivity
from qfx.widths import Trial

WIDTHS = (2, 4, 8)


def start(layers: int = 10, fixed: int = 0) -> Allocation:
    """All layers in 2 bits; the first ``fixed`` of them by the user's own rule."""
    facts = tuple(
        LayerFacts(
            key=f"l{i}:linear",
            path=f"l{i}",
            op="linear",
            weight_shape=(2, 10),
            scales=2,
            macs=10,
            end=False,
            qconfig=Recipe.int8().default,
            given=Choice(2 if i < fixed else 8, 8),
            fixed=i < fixed,
            choices=(*(Choice(w, 8) for w in WIDTHS), FLOAT),
        )
        for i in range(layers)
    )
    scores = {Trial(x.key, "weight", w): (1.0 + i) / w for i, x in enumerate(facts) for w in WIDTHS}
    groups = tuple((i,) for i in range(layers))
    found = Sensitivity(
        "Net", Recipe.int8(), "reference", "kl", "nats", "only", 32, facts, groups, scores, scores
    )
    return allocate_bits(found, Budget(2.0), pin=None)


class Metric:
    """A metric of the allocation's damage, which is noted for every call; ``raising`` it at one of them."""

    def __init__(self, of: Callable[[Allocation], Any] | None = None, at: int = 0, raising: Any = None) -> None:
        self.of = of or (lambda a: 1.0 - a.damage / 100.0)
        self.at, self.raising = at, raising
        self.seen: list[Allocation | None] = []

    def __call__(self, allocation: Allocation | None) -> Any:
        self.seen.append(allocation)
        if len(self.seen) == self.at:
            if isinstance(self.raising, BaseException):
                raise self.raising
            return self.raising
        return 1.0 if allocation is None else self.of(allocation)


def quietly(*args: Any, **options: Any) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return control(*args, **options)


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3, 40])
@pytest.mark.parametrize("max_drop", [0.0, 1e-4, 0.01, 0.1, 5.0])
def test_the_first_rung_that_holds(layers: int, max_drop: float) -> None:
    metric = Metric()
    outcome = quietly(start(layers), metric, Trials("c"), max_drop=max_drop)
    rungs = ladder(start(layers))
    expected = next(i for i, rung in enumerate(rungs) if 1.0 - metric.of(rung) <= max_drop + 1e-9)
    assert outcome.holds and outcome.allocation == rungs[expected] and outcome.ended == ""
    assert outcome.trials <= 2 * math.ceil(math.log2(len(rungs))) + 2
    assert len(metric.seen) <= outcome.trials + 1 and len(metric.seen) == len(set(map(id, metric.seen)))


def test_what_holds_at_once_takes_one_trial() -> None:
    metric = Metric()
    outcome = quietly(start(), metric, Trials("c"), max_drop=10.0)
    assert outcome.trials == 1 and metric.seen == [None, start()]
    assert str(outcome) == f"metric {outcome.metric:g}, float 1: drop {1 - outcome.metric:.4g} after 1 trials"


@given(st.lists(st.floats(0.0, 1.0), min_size=19, max_size=19), st.floats(0.0, 1.0))
def test_a_noisy_metric_holds_too(noise: list[float], max_drop: float) -> None:
    rungs = ladder(start(6))
    values = {rung: value for rung, value in zip(map(str_of, rungs), noise, strict=True)}
    outcome = quietly(start(6), Metric(lambda a: values[str_of(a)]), Trials("c"), max_drop=max_drop)
    assert outcome.holds and outcome.reference - outcome.metric <= max_drop + 1e-9
    if outcome.allocation != rungs[-1]:
        assert outcome.metric == values[str_of(outcome.allocation)]


def str_of(allocation: Allocation) -> str:
    return " ".join(map(str, allocation.choices))


def test_float_always_holds_and_is_not_measured_again() -> None:
    metric = Metric(lambda a: -1e9)
    outcome = quietly(start(4), metric, Trials("c"), max_drop=0.0)
    assert set(outcome.allocation.choices) == {FLOAT} and outcome.metric == outcome.reference == 1.0
    assert not any(a is not None and set(a.choices) == {FLOAT} for a in metric.seen)


def test_a_drop_of_exactly_what_is_allowed_holds() -> None:
    outcome = quietly(start(4), Metric(lambda a: 1.0 - 0.1 - 0.2), Trials("c"), max_drop=0.3)
    assert outcome.trials == 1


def test_layers_with_rules_of_the_users_are_not_overruled() -> None:
    with pytest.warns(AccuracyWarning, match="by the recipe's own rules") as caught:
        outcome = control(start(4, fixed=1), Metric(lambda a: 0.5), Trials("c"), max_drop=0.1)
    assert not outcome.holds and outcome.allocation.choices[0] == Choice(2, 8)
    assert "the drop is 0.5, more than 0.1" in str(caught[0].message)
    assert "recipe's own rules" in str(outcome)


# --- what ends it early -----------------------------------------------------------------------------------------------


def test_a_time_budget_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(a: Allocation) -> float:
        now[0] += 10.0
        return 0.9 - a.damage / 1000.0

    with pytest.warns(AccuracyWarning, match="its time budget.*best of 3"):
        outcome = control(start(), Metric(slow), Trials("c"), max_drop=0.05, time_budget=25.0)
    assert (outcome.trials, outcome.holds, outcome.ended) == (3, False, "its time budget")
    assert outcome.allocation == ladder(start())[2]  # the last and best of 0, 1, 2
    with pytest.warns(AccuracyWarning):
        least = control(start(), Metric(slow), Trials("c"), max_drop=0.0, time_budget=1e-9)
    assert least.trials == 1  # at least one


def test_time_that_runs_out_while_it_holds_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(a: Allocation) -> float:
        now[0] += 10.0
        return 1.0 - a.damage / 100.0

    rungs = ladder(start())
    allowed = rungs[5].damage / 100.0
    outcome = quietly(start(), Metric(slow), Trials("c"), max_drop=allowed, time_budget=45.0)
    assert outcome.holds and outcome.ended == "its time budget" and outcome.allocation == rungs[8]


def test_ctrl_c_returns_the_best_so_far() -> None:
    metric = Metric(lambda a: 0.5 - a.damage / 1000.0, at=5, raising=KeyboardInterrupt())
    with pytest.warns(AccuracyWarning, match="Ctrl-C"):
        outcome = control(start(), metric, Trials("c"), max_drop=0.01)
    assert (outcome.trials, outcome.ended) == (3, "Ctrl-C") and outcome.allocation == ladder(start())[2]


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_before_the_first_trial_is_the_users(at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        control(start(), Metric(at=at, raising=KeyboardInterrupt()), Trials("c"), max_drop=0.01)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (math.nan, "the metric gave nan"),
        (math.inf, "the metric gave inf"),
        (None, "the metric gave a NoneType"),
        ((0.5, 0.5), "the metric gave a tuple"),
        (torch.ones(2), "the metric gave a Tensor"),
        ("good", "the metric gave a str"),
        (ZeroDivisionError("no data"), "the metric failed: ZeroDivisionError: no data"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("at", [1, 4])
def test_a_metric_that_fails_keeps_the_trials(tmp_path: Path, value: Any, what: str, at: int) -> None:
    state = tmp_path / "state.json"
    with pytest.raises(ConfigError, match=what) as caught:
        control(start(), Metric(at=at, raising=value), Trials("c", state), max_drop=0.01)
    assert caught.value.hint
    kept = Trials("c", state)
    assert len(kept.metrics) == max(at - 2, 0) and (kept.reference is None) is (at == 1)


@pytest.mark.parametrize("value", [1, True, torch.tensor(1.0), torch.tensor([1.0])], ids=repr)
def test_what_is_a_number(value: Any) -> None:
    assert quietly(start(), Metric(lambda a: value), Trials("c"), max_drop=0.0).trials == 1


# --- the state file ---------------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "folder" / "state.json"
    whole = Metric()
    expected = quietly(start(), whole, Trials("c"), max_drop=0.05)
    first = Metric(at=4, raising=KeyboardInterrupt())
    with pytest.warns(AccuracyWarning):
        control(start(), first, Trials("c", state), max_drop=0.05)
    second = Metric()
    assert quietly(start(), second, Trials("c", state), max_drop=0.05) == expected
    assert first.seen[:-1] + second.seen == whole.seen  # nothing is measured again
    third = Metric()
    assert quietly(start(), third, Trials("c", state), max_drop=0.05) == expected and third.seen == []
    assert [p.name for p in state.parent.iterdir()] == ["state.json"]
    tighter = Metric()  # another drop is another question to the same trials
    assert quietly(start(), tighter, Trials("c", state), max_drop=0.01).holds
    assert not {map(str_of, filter(None, tighter.seen))} & {map(str_of, filter(None, whole.seen))}


GOOD = {"version": 1, "content": "c", "reference": 1.0, "metrics": {}}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"version": 1, "cont', "no state of a search"),
        ("", "no state of a search"),
        ("[]", "no state of a search"),
        ("null", "no state of a search"),
        ('name = "toml"', "no state of a search"),
        (json.dumps({"version": 1, "content": "c"}), "no state of a search"),
        (json.dumps({**GOOD, "metrics": ["a"]}), "no state of a search"),
        (json.dumps({**GOOD, "metrics": {"a": "x"}}), "no state of a search"),
        (json.dumps({**GOOD, "reference": "x"}), "no state of a search"),
        (json.dumps({**GOOD, "content": "d"}), "another search"),
        (json.dumps({**GOOD, "version": 2}), "another search"),
        ("\xff\xfe", "no state of a search"),
    ],
)
def test_foreign_and_torn_files_are_refused_and_left_alone(tmp_path: Path, text: str, what: str) -> None:
    state = tmp_path / "state.json"
    state.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=what) as caught:
        Trials("c", state)
    assert "state.json" in str(caught.value) and "another file" in caught.value.hint
    assert state.read_bytes() == text.encode("latin-1")


def test_a_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.json"
    Trials("c", state, reference=1.0).save()
    before = state.read_text()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    kept = Trials("c", state)
    kept.reference = 2.0
    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.save()
    assert state.read_text() == before and Trials("c", state).reference == 1.0


# --- through qfx.quantize ---------------------------------------------------------------------------------------------


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path_factory.mktemp("scores")
    monkeypatch.setattr(score_cache, "cache_dir", lambda: path)
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())


class Agreement:
    """The share of rows whose class is the float model's, in per cent; it notes every model."""

    def __init__(self, model: nn.Module, at: int = 0, raising: Any = None) -> None:
        with torch.no_grad():
            self.classes = model(X).argmax(-1)
        self.models: list[nn.Module] = []
        self.at, self.raising = at, raising

    def __call__(self, model: nn.Module) -> float:
        self.models.append(model)
        if len(self.models) == self.at:
            raise self.raising
        assert not torch.is_grad_enabled() and not model.training
        found: Tensor = model(X)
        return 100.0 * float((found.argmax(-1) == self.classes).float().mean())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.bias.zero_()  # else one class takes all
    return model


def quantized(model: nn.Module, metric: Any, **options: Any) -> nn.Module:
    chosen = {"average_weight_bits": 4.5, "weight_bits": (2, 4, 8), "metric": metric, "max_drop": 1.0, **options}
    auto = AutoRecipe(**chosen)
    return qfx.quantize(model, X[:2], calibration=[X], recipe=auto, target="reference", verbose=False)


@torch.no_grad()
def measured(metric: Agreement, model: nn.Module) -> float:
    metric.at = 0
    return metric(model)


def test_the_drop_holds_for_the_model_that_is_returned(model: nn.Module) -> None:
    metric = Agreement(model)
    with torch.no_grad():
        before = model(X)
    found = quantized(model, metric)
    assert measured(metric, found) >= 99.0
    report = qfx.report(found)
    assert report.allocation is not None
    assert report.allocation.costs["average_weight_bits"] > 4.5  # bits were given back
    (note,) = [text for topic, text in report.notes if topic == "accuracy"]
    assert note.startswith("metric ") and "float 100" in note
    with torch.no_grad():
        assert torch.equal(model(X), before)
        assert torch.equal(metric.models[0](X), before)  # the float model, as it is prepared


def test_never_worse_in_silence(model: nn.Module) -> None:
    narrow = Recipe.int8().set("2", weight=2).set("4", weight=2)
    metric = Agreement(model)
    with pytest.warns(AccuracyWarning, match="own rules"):
        found = quantized(model, metric, base=narrow, average_weight_bits=8.0)
    assert measured(metric, found) < 99.0


def test_resumed_in_another_process(model: nn.Module, tmp_path: Path) -> None:
    """Neither models nor functions have their old addresses."""

    def make_loss() -> Any:
        return lambda output, item: output.square().mean()

    state = tmp_path / "state.json"
    first = Agreement(model, at=3, raising=KeyboardInterrupt())
    with pytest.warns(AccuracyWarning, match="Ctrl-C"):
        quantized(model, first, state=state, score=make_loss(), max_drop=0.0)
    score_cache._KEPT.clear()
    second = Agreement(model)
    found = quantized(model, second, state=state, score=make_loss(), max_drop=0.0)
    assert second.models and measured(second, found) == 100.0
    tried = json.loads(state.read_text())["metrics"]
    assert len(tried) >= len(second.models) - 1
    third = Agreement(model)
    quantized(model, third, state=state, score=make_loss(), max_drop=0.0)
    assert third.models == []
    for other in ({"average_weight_bits": 4.0}, {"weight_bits": (2, 3, 8)}, {"pin_first_last": None}):
        with pytest.raises(ConfigError, match="another search"):
            quantized(model, third, state=state, score=make_loss(), **other)


def test_a_failing_metric_names_itself(model: nn.Module) -> None:
    def broken(_: nn.Module) -> float:
        raise FileNotFoundError("val.csv")

    with pytest.raises(ConfigError, match=r"the metric failed: FileNotFoundError: val\.csv"):
        quantized(model, broken)


def test_it_needs_calibration(model: nn.Module) -> None:
    auto = AutoRecipe(metric=Agreement(model), max_drop=1.0)
    prepared = qfx.prepare(model, X[:2], recipe=auto, target="reference")
    with pytest.raises(CalibrationError, match="not CALIBRATED"):
        qfx.convert(prepared)
