"""The search from end to end: the three verbs, and ``qfx.quantize(..., recipe="auto")``."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import score_cache
from qfx.accuracy_control import AccuracyWarning
from qfx.allocation import InfeasibleBudget
from qfx.api import graphs
from qfx.auto_recipe import AutoRecipe
from qfx.choices import FLOAT, Choice
from qfx.errors import CalibrationError, ConfigError, UnsupportedError
from qfx.recipe import QuantRule, Recipe, Subject
from qfx.widths import Trial

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(score_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())
    return tmp_path


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3), nn.Conv2d(5, 6, 3, bias=False)
        self.up, self.head = nn.ConvTranspose2d(6, 7, 2), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def table(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> qfx.Sensitivity:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(score_cache, "cache_dir", lambda: tmp_path_factory.mktemp("scores"))
        return qfx.sensitivity(
            model, X[:2], data=[X[:20], X[20:]], target="reference", weight_bits=(2, 3, 4, 8), activation_bits=(4, 8)
        )


def quantized(model: nn.Module, recipe: Any, x: Any = X, **options: Any) -> nn.Module:
    options = {"target": "reference", "verbose": False, "calibration": [x], **options}
    return qfx.quantize(model, x[:2], recipe=recipe, **options)


def stored_weight_bytes(made: nn.Module) -> dict[str, int]:
    """What the leaves of a converted model really keep of the weights and their scales, by the layer's path."""
    found = {}
    for path, module in made.named_modules():
        if hasattr(module, "weight_qparams"):
            found[path] = sum(t.numel() * t.element_size() for t in (module.weight, module.weight_qparams.scale))
    return found


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_sensitivity(model: nn.Module, table: qfx.Sensitivity) -> None:
    assert [layer.path for layer in table.layers] == ["stem", "left", "right", "up", "head"]
    assert table.groups == ((0,), (1, 2), (3,), (4,))
    assert [layer.end for layer in table.layers] == [True, False, False, False, True]
    assert table.rows == 32 and table.score == "fisher" and table.model == "Residual"
    assert table.agreement is not None and table.agreement.correlation > 0.8
    assert set(table.scores) == {
        Trial(layer.key, part, bits)
        for layer in table.layers
        for part, widths in (("weight", (2, 3, 4, 8)), ("activation", (4, 8)))
        for bits in widths
    }
    assert json.dumps(table.to_dict()) and "rank correlation with kl" in str(table)


def test_the_cheap_score_orders_as_the_exact_ones_do(model: nn.Module, table: qfx.Sensitivity) -> None:
    data, widths = [X[:20], X[20:]], {"weight_bits": (2, 3, 4, 8), "activation_bits": (4, 8)}
    exact = qfx.sensitivity(model, X[:2], data=data, target="reference", score="kl", **widths)
    assert table.correlation(exact) > 0.9
    assert exact.agreement is None


def test_the_users_model_is_untouched(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    assert [p.grad for p in model.parameters()] == [None] * 9
    qfx.sensitivity(model, X[:2], target="reference", weight_bits=(4,), activation_bits=(), rows=2, check=0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.grad for p in model.parameters()] == [None] * 9 and torch.is_grad_enabled()


def test_latency(model: nn.Module) -> None:
    found = qfx.sensitivity(
        model, X[:2], target="reference", weight_bits=(4,), activation_bits=(), rows=2, check=0, latency=True
    )
    assert all({c for c, _ in layer.times} == set(layer.choices) for layer in found.layers)
    most = sum(layer.costs(layer.given)["latency_ms"] for layer in found.layers)
    assert qfx.allocate(found, latency_ms=10 * most, pin_first_last=None).rules
    with pytest.raises(InfeasibleBudget, match="latency_ms"):
        qfx.allocate(found, latency_ms=1e-9)


@pytest.mark.parametrize("data", [[], iter(())], ids=["list", "generator"])
def test_no_data(model: nn.Module, data: Any) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        qfx.sensitivity(model, X[:2], data=data, target="reference")


def test_data_that_fail_midway(model: nn.Module) -> None:
    def broken() -> Any:
        yield X[:4]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        qfx.sensitivity(model, X[:2], data=broken(), target="reference")


def test_refusals(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="finds its bits itself"):
        qfx.sensitivity(model, X[:2], recipe="auto")
    with pytest.raises(ConfigError, match="there is no score 'snr'"):
        qfx.sensitivity(model, X[:2], score="snr")
    with pytest.raises(ConfigError, match=r"(?s)layer='hed'.*nearest names are 'head'"):
        qfx.sensitivity(model, X[:2], recipe=Recipe.int8().skip("hed"), target="reference")
    with pytest.raises(UnsupportedError, match="no layer that is quantized"):
        qfx.sensitivity(nn.Softmax(-1), ROWS, target="reference")


class Output(dict[str, Any]):
    """As Hugging Face's: a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


torch.utils._pytree.register_pytree_node(
    Output, lambda d: (list(d.values()), list(d)), lambda values, keys: Output(zip(keys, values, strict=True))
)


class Tokens(nn.Module):
    """Takes keywords, returns a dict in which the logits do not come first."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        hidden = self.mix(x).tanh()
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


def test_calls_by_keyword_and_results_in_a_dict() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    data = [{"input_ids": torch.randint(30, (8, 5)), "attention_mask": torch.ones(8, 5)} for _ in range(4)]
    found = qfx.sensitivity(model, data[0], data=data, target="reference", weight_bits=(2, 8), activation_bits=(8,))
    assert found.rows == 32
    assert found.scores[Trial("head:linear", "weight", 2)] > 0.0  # the logits were scored, not what comes first
    made = qfx.quantize(
        model, data[0], calibration=data, recipe=AutoRecipe(weight_bits=(4, 8)), target="reference", verbose=False
    )
    assert set(made(**data[0])) == {"hidden", "logits"}


def test_a_loss_gets_what_the_model_returns() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    seen = []

    def loss(output: Any, item: Any) -> Tensor:
        seen.append((sorted(output), sorted(item)))
        return F.cross_entropy(output["logits"], item["labels"])

    data = [{"input_ids": torch.randint(30, (8, 5)), "labels": torch.randint(3, (8,))} for _ in range(2)]
    example = {"input_ids": data[0]["input_ids"]}
    widths = {"weight_bits": (2,), "activation_bits": ()}
    found = qfx.sensitivity(model, example, data=data, score=loss, target="reference", **widths)
    assert set(map(str, seen)) == {"(['hidden', 'logits'], ['input_ids', 'labels'])"}
    assert found.unit == "of the loss" and all(math.isfinite(s) for s in found.scores.values())


def test_a_model_that_capture_stops_at() -> None:
    class Stopping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if float(x.sum()) > 1e9:
                x = -x
            return self.b(x)

    torch.manual_seed(0)
    model = Stopping().eval()
    with pytest.raises(UnsupportedError, match="capture stopped at 2 parts"):
        qfx.sensitivity(model, ROWS, target="reference")
    for auto in (AutoRecipe(), AutoRecipe(max_drop=1.0, metric=lambda m: 1.0)):
        with pytest.raises(ConfigError, match="needs a model captured whole"):
            quantized(model, auto, ROWS)


# --- allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [3.0, 5.0])
def test_the_bytes_of_the_quantized_model_are_those_of_the_budget(
    model: nn.Module, table: qfx.Sensitivity, average: float
) -> None:
    elements = sum(layer.numel for layer in table.layers)
    budget = average / 8 * elements + 4 * sum(layer.scales for layer in table.layers)
    recipe = qfx.allocate(table, weight_bytes=budget, pin_first_last=None)
    made = quantized(model, recipe)
    stored = stored_weight_bytes(made)
    chosen = {rule.layer: rule.qconfig for rule in recipe.rules}
    for layer in table.layers:
        qconfig = chosen[layer.path]
        assert qconfig is not None and qconfig.weight is not None and qconfig.activation is not None
        choice = Choice(qconfig.weight.bits, qconfig.activation.bits)
        assert stored[layer.path] == layer.costs(choice)["weight_bytes"], layer.path
    assert sum(stored.values()) <= budget


def test_budgets_together(table: qfx.Sensitivity) -> None:
    recipe = qfx.allocate(table, average_weight_bits=5.0, weight_bytes=900, bit_operations=5e7, pin_first_last=None)
    chosen = [Choice(rule.qconfig.weight.bits, rule.qconfig.activation.bits) for rule in recipe.rules]  # type: ignore[union-attr]
    allocation = qfx.Allocation(table, tuple(chosen), None)
    assert allocation.costs["average_weight_bits"] <= 5.0 and allocation.costs["weight_bytes"] <= 900
    assert allocation.costs["bit_operations"] <= 5e7
    with pytest.raises(InfeasibleBudget, match="weight_bytes 300"):
        qfx.allocate(table, average_weight_bits=5.0, weight_bytes=300)


def test_the_front(table: qfx.Sensitivity) -> None:
    front = qfx.pareto(table, "average_weight_bits", points=6, pin_first_last=None)
    assert 3 <= len(front) <= 6
    for a, b in itertools.pairwise(front):
        assert a.costs["average_weight_bits"] < b.costs["average_weight_bits"] and a.damage > b.damage


def test_names_with_signs_of_patterns_and_with_children() -> None:
    """A rule of the search means one path: a path is no pattern, and what lies inside of it has rules of its own."""
    recipe = Recipe("r", Recipe.int8().default, (QuantRule(None, "linear", "block[0]*", exact=True),))
    assert recipe.resolve(Subject("linear", "block[0]*"))[0] is None
    for other in ("block0", "block[0]*.fc"):
        assert recipe.resolve(Subject("linear", other))[0] is not None
    assert QuantRule(None, layer="", exact=True).matches(Subject("linear", ""))
    assert not QuantRule(None, layer="", exact=True).matches(Subject("linear", "a"))


def test_parents_and_children_that_both_hold_weights() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.child = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(F.linear(x, self.weight).relu()).relu()

    torch.manual_seed(0)
    model = nn.Sequential(Parent(), Parent(), nn.Linear(6, 3)).eval()
    found = qfx.sensitivity(model, ROWS, target="reference", weight_bits=(2, 8), activation_bits=(), rows=8, check=0)
    assert [layer.path for layer in found.layers] == ["0", "0.child", "1", "1.child", "2"]
    choices = (Choice(2, 8), Choice(8, 8), Choice(8, 8), Choice(2, 8), FLOAT)
    made = quantized(model, qfx.Allocation(found, choices, None).recipe(), ROWS)
    rows = [row for row in qfx.report(made).rows if row.operator == "linear"]
    assert [row.weight_bits for row in rows] == [2, 8, 8, 2, None]


# --- quantize ---------------------------------------------------------------------------------------------------------


def test_auto(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    before = copy.deepcopy(model.state_dict())
    made = quantized(model, "auto", verbose=True)
    report = qfx.report(made)
    assert report.allocation is not None
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header[header.index("a") + 1] == "fisher"
    rows = {row.layer: row for row in report.rows if row.layer}
    chosen = dict(zip((x.path for x in report.allocation.sensitivity.layers), report.allocation.choices, strict=True))
    assert {path: rows[path].weight_bits for path in chosen} == {path: c.weight for path, c in chosen.items()}
    assert rows["stem"].weight_bits == rows["head"].weight_bits == 8
    assert rows["left"].weight_bits == rows["right"].weight_bits
    assert all(rows[path].sensitivity is not None for path in chosen)
    assert report.allocation.costs["weight_bytes"] <= 0.75 * sum(
        layer.costs(layer.given)["weight_bytes"] for layer in report.allocation.sensitivity.layers
    )
    assert "bits found by" in report.summary() and json.dumps(report.to_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sum(stored_weight_bytes(made).values()) <= report.allocation.costs["weight_bytes"]
    assert graphs(made)[""].meta.get("qfx_calls") == ()  # calibration data are let go of


def test_what_the_search_found_is_a_recipe_like_any_other(model: nn.Module) -> None:
    auto = AutoRecipe(average_weight_bits=6.0, weight_bits=(2, 4, 8), activation_bits=(6, 8), score="kl")
    made = quantized(model, auto)
    allocation = qfx.report(made).allocation
    assert allocation is not None and allocation.costs["average_weight_bits"] <= 6.0
    by_hand = quantized(model, allocation.recipe())
    assert torch.equal(made(X), by_hand(X))
    assert [(r.weight_bits, r.activation_bits) for r in qfx.report(made).rows] == [
        (r.weight_bits, r.activation_bits) for r in qfx.report(by_hand).rows
    ]


def test_rules_of_the_users_are_kept(model: nn.Module) -> None:
    base = Recipe.int8().set("left", weight=3, why="mine").skip("up")
    made = quantized(model, AutoRecipe(base=base, weight_bits=(2, 4, 8), pin_first_last=None, average_weight_bits=4.0))
    rows = {row.layer: row for row in qfx.report(made).rows if row.layer}
    assert rows["left"].weight_bits == 3 and rows["left"].reason == "mine"
    assert rows["up"].weight_bits is None and not rows["up"].integer


@pytest.mark.parametrize("pin", ["float", 4], ids=str)
def test_pins(model: nn.Module, pin: Any) -> None:
    auto = AutoRecipe(pin_first_last=pin, weight_bits=(2, 4, 8), average_weight_bits=20.0 if pin == "float" else 3.7)
    rows = {row.layer: row for row in qfx.report(quantized(model, auto)).rows if row.layer}
    ends = {rows[path].weight_bits for path in ("stem", "head")}
    assert ends == ({None} if pin == "float" else {4})


def test_prepared_and_converted_by_hand(model: nn.Module) -> None:
    auto = AutoRecipe(average_weight_bits=6.0, weight_bits=(2, 4, 8))
    prepared = qfx.prepare(model, X[:2], recipe=auto, target="reference")
    with pytest.raises(CalibrationError, match="not CALIBRATED"):
        qfx.convert(prepared)
    qfx.calibrate(prepared, [X])
    first, second = qfx.convert(prepared, check=True), qfx.convert(prepared)
    assert torch.equal(first(X), second(X))
    assert qfx.report(first).agreement


def test_inplace(model: nn.Module) -> None:
    auto = AutoRecipe(average_weight_bits=6.0, weight_bits=(2, 4, 8))
    with pytest.raises(ConfigError, match="accuracy control converts the model more than once"):
        quantized(model, AutoRecipe(max_drop=1.0, metric=lambda m: 1.0), inplace=True)
    assert not any(p.is_meta for p in model.parameters())
    twin = copy.deepcopy(model)
    made = quantized(twin, auto, inplace=True)
    assert torch.equal(made(X), quantized(model, auto)(X)) and all(p.is_meta for p in twin.parameters())


def test_pipelines_must_fit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with pytest.raises(ConfigError, match="nothing in it finds bit widths"):
        quantized(model, "auto", ROWS, pipeline=qfx.Pipeline.default("int8"))
    with pytest.raises(ConfigError, match="it finds bit widths, the recipe gives them"):
        quantized(model, "int8", ROWS, pipeline=qfx.Pipeline.default("auto"))
    made = quantized(model, AutoRecipe(8.0, weight_bits=(4, 8)), ROWS, pipeline=qfx.Pipeline.default("auto"))
    allocation = qfx.report(made).allocation  # the recipe of the call, not of the pipeline
    assert allocation is not None and allocation.costs["average_weight_bits"] == 8.0


def test_training_needs_the_bits_beforehand(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="training needs the bits beforehand") as caught:
        qfx.quantize_qat(model, X[:2], train=lambda m: None, recipe="auto")
    assert "qfx.allocate" in caught.value.hint


def test_budgets_that_cannot_be_met(model: nn.Module) -> None:
    with pytest.raises(InfeasibleBudget, match="average_weight_bits 1 is too small"):
        quantized(model, AutoRecipe(average_weight_bits=1.0, weight_bits=(2, 8), score="kl"))


@pytest.mark.parametrize("score", ["fisher", "sqnr"])
def test_one_layer_only(score: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).eval()
    (row,) = qfx.report(quantized(model, AutoRecipe(score=score), ROWS)).rows
    assert row.weight_bits == 8  # it is first and last, and pinned
    with pytest.raises(InfeasibleBudget, match=r"average_weight_bits 4 is too small: the least .* is 8"):
        quantized(model, AutoRecipe(average_weight_bits=4.0, score=score), ROWS)
    (row,) = qfx.report(quantized(model, AutoRecipe(score=score, pin_first_last=None), ROWS)).rows
    assert row.weight_bits is not None and row.weight_bits < 8


def test_no_layer_at_all() -> None:
    with pytest.raises(UnsupportedError, match="no layer that is quantized"):
        quantized(nn.Softmax(-1), "auto", ROWS)


def test_one_number_a_row_has_no_classes() -> None:
    """Every divergence would be 0, and every layer would get 2 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    with pytest.raises(ConfigError, match="no classes") as caught:
        quantized(model, "auto", ROWS)
    assert "sqnr" in caught.value.hint
    assert qfx.report(quantized(model, AutoRecipe(score="sqnr"), ROWS)).allocation is not None


def test_attention_of_torch() -> None:
    """Its projections share one place, so that they get one choice."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), encoder, nn.Linear(8, 3)).eval()
    tokens = torch.randn(16, 4, 6)
    made = quantized(model, AutoRecipe(average_weight_bits=6.0, weight_bits=(2, 4, 8)), tokens)
    rows = [row for row in qfx.report(made).rows if row.operator == "linear"]
    assert len({row.weight_bits for row in rows if row.layer == "1.self_attn"}) == 1
    assert made(tokens).shape == (16, 4, 3)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(x).relu()).relu()).relu())

    torch.manual_seed(0)
    made = quantized(Tied().eval(), AutoRecipe(average_weight_bits=5.0, weight_bits=(2, 3, 4, 8)), ROWS)
    rows = {row.layer: row.weight_bits for row in qfx.report(made).rows}
    assert rows["a"] == rows["b"] in (2, 3, 4)


def test_the_state_of_control_is_in_the_report(model: nn.Module) -> None:
    calls = []

    def metric(m: nn.Module) -> float:
        calls.append(m)
        return 1.0 if len(calls) == 1 else 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        auto = AutoRecipe(average_weight_bits=6.0, weight_bits=(4, 8), max_drop=0.1, metric=metric, rows=8)
        made = quantized(model, auto)
    report = qfx.report(made)
    assert report.allocation is not None and set(report.allocation.choices) == {FLOAT}  # float always holds
    assert report.quantized == 0 and torch.equal(made(X), model(X))


def test_without_a_search_nothing_is_shown(model: nn.Module) -> None:
    report = qfx.report(quantized(model, "int8"))
    assert report.allocation is None and "fisher" not in str(report)
    assert all(row.sensitivity is None for row in report.rows)
    with pytest.raises(ConfigError, match="no search to show"):
        report.html()
