"""``qfx.check``: what it finds, that its remedies mend it, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Diagnosis, PerTensor, Recipe, check
from qfx.calibration import CalibrationWarning
from qfx.calling import codegen_of
from qfx.doctor import _asked
from qfx.errors import CalibrationError, ConfigError
from qfx.findings import RULES
from qfx.observers import MinMax, Percentile
from qfx.portable import portable
from qfx.remedies import Mending, Reader, changed, float_activations, in_float, whole_weight

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
INT8 = Recipe.int8()
ACTIVATION, WEIGHT = INT8.default.activation, INT8.default.weight
assert ACTIVATION is not None and WEIGHT is not None


class Net(nn.Module):
    """A convolution whose result two layers read, one of them through a sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


def images(count: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


_MADE: dict[tuple[nn.Module, float], nn.Module] = {}


def standard(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """int8, calibrated on images of that scale; made once."""
    if (model, scale) not in _MADE:
        _MADE[model, scale] = quantized(model, images(64, 1, scale))
    return _MADE[model, scale]


def quantized(model: nn.Module, data: Tensor | None = None, recipe: str | Recipe = "int8") -> nn.Module:
    data = images(64, 1) if data is None else data
    return qfx.quantize(model, data[:2], calibration=[data], recipe=recipe, target="reference", verbose=False)


def outlying(count: int = 64) -> Tensor:
    """One value in ten thousand lies far out."""
    x = images(count * 16, 3).flatten()
    x[:: len(x) // 4 + 1] = 200.0
    return x.reshape(-1, 2, 6, 6)


def one_great(model: nn.Module, factor: float = 1e4) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule("first").weight[0] *= factor  # type: ignore[operator,index]
        model.get_submodule("first").bias[0] = 0  # type: ignore[index,operator]
    return model


def percentile(value: float) -> Any:
    return Percentile.with_options(percentile=value)


def dynamic_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def spiky() -> Tensor:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 500.0
    return x


Case = tuple[str, str, Recipe, Any, Any]  # the rule's name, the layer, the recipe, calibration data, other data


def cases() -> Iterator[Any]:
    clips = replace(ACTIVATION, observer=percentile(80.0))
    clips_weight = replace(WEIGHT, granularity=PerTensor(), observer=percentile(80.0))
    chosen = INT8.set("first", activation=clips, weight=6)
    yield pytest.param("clipping", "first", chosen, images(64), None, id="chosen")
    yield pytest.param("drift", "first", INT8, images(64, 1, 0.05), images(64), id="drift")
    yield pytest.param("clipping", "first", INT8, images(64, 1, 0.65), images(64), id="clipping")
    yield pytest.param("unused", "first", INT8, images(64, 1, 20.0), images(64), id="unused")
    yield pytest.param("outliers", "first", INT8, outlying(), outlying(), id="outliers")
    yield pytest.param("zero channels", "first", INT8.set("first", weight=replace(WEIGHT, granularity=PerTensor())),
                       images(64), None, id="zero channels")  # fmt: skip
    yield pytest.param("clipped weight", "head", INT8.set("head", weight=clips_weight), images(64), None, id="weight")


def mended(recipe: Recipe, remedies: list[str]) -> Recipe:
    """The recipe after the remedies were pasted one behind the other."""
    names: dict[str, Any] = {"recipe": recipe, "qfx": qfx, "replace": replace}
    for remedy in remedies:
        exec(remedy, names)
    made = names["recipe"]
    assert isinstance(made, Recipe) and made != recipe
    return made


@pytest.mark.parametrize(("rule", "layer", "recipe", "calibration", "data"), cases())
def test_every_finding_has_a_remedy_that_mends_it(
    model: nn.Module, rule: str, layer: str, recipe: Recipe, calibration: Tensor, data: Tensor | None
) -> None:
    model = one_great(model) if rule == "zero channels" else model
    data = images(64, 2) if data is None else data
    found = check(quantized(model, calibration, recipe), [data]).findings
    assert any(f.rule == rule and layer in (f.layer, *f.remedy.split("'")) for f in found), found
    assert all(f.remedy.count("\n") == 0 and f.remedy.startswith("recipe = recipe.s") for f in found)
    again = check(quantized(model, calibration, mended(recipe, [f.remedy for f in found])), [data])
    places = {(f.rule, f.layer, f.operator) for f in found}
    assert not [f for f in again.findings if (f.rule, f.layer, f.operator) in places], f"{found}\n{again}"


def test_dynamic_ranges_tell_of_outliers() -> None:
    model, recipe = dynamic_model(), Recipe.int8_dynamic()
    x = spiky()
    qmodel = qfx.quantize(model, x[:4], recipe=recipe, target="reference", verbose=False)
    found = check(qmodel, x.split(128))
    first = found.findings[0]
    assert (first.rule, first.remedy) == ("outliers", "recipe = recipe.set('0', activation=None)")
    row = found.rows[0]
    assert (row.part, row.drift, row.used) == ("dynamic", None, None)
    bulk = float(x.abs().flatten().sort().values[math.ceil(0.999 * x.numel()) - 1])
    assert row.outliers == pytest.approx(500 / bulk, rel=0.04)
    recipe = mended(recipe, [f.remedy for f in found.findings])
    again = check(qfx.quantize(model, x[:4], recipe=recipe, target="reference", verbose=False), [x])
    assert again.healthy
    assert {row.bits for row in again.rows if row.part == "weight"} == {8}


def test_the_rules_are_all_met() -> None:
    met = {c.values[0] for c in cases()}
    assert {rule.name for rule in RULES} == met


def test_a_healthy_model_has_no_findings(model: nn.Module) -> None:
    found = check(standard(model), images(128, 5).split(32))
    assert found.healthy and found.samples == 128
    assert {row.part for row in found.rows} == {"activation", "weight"}
    values = [row for row in found.rows if row.part == "activation"]
    assert [(row.layer, row.operator) for row in values[:2]] == [("", "input x"), ("", "relu")]
    assert all(row.used is not None and 0.5 < row.used < 1.5 for row in values)
    assert all(row.clipped < 0.01 for row in values)
    assert str(found).endswith("128 samples; no findings")
    assert "first" in str(found) and len(str(found).splitlines()) == len(found.rows) + 4


def test_shares_are_those_of_the_data(model: nn.Module) -> None:
    qmodel, x = standard(model, 0.5), images(32, 2)
    row = check(qmodel, [x]).rows[0]
    gm = portable(qmodel)
    low, high = (-int(gm.x_zero_point) * float(gm.x_scale), (255 - int(gm.x_zero_point)) * float(gm.x_scale))
    half = float(gm.x_scale) / 2
    assert row.below == pytest.approx(float((x < low - half).float().mean()), abs=1e-6) and row.below
    assert row.above == pytest.approx(float((x > high + half).float().mean()), abs=1e-6) and row.above
    assert row.used == pytest.approx(float(x.max() - x.min()) / (high - low), rel=1e-4)


def test_a_remedy_names_all_that_read_the_value(model: nn.Module) -> None:
    found = check(standard(model, 20.0), [images(64)]).findings
    relu = next(f for f in found if f.operator == "relu" and not f.layer)
    assert relu.remedy == "recipe = recipe.skip('body.0').skip('', op='add')"
    assert next(f for f in found if f.operator == "mean").remedy == "recipe = recipe.set('head', activation=None)"


def test_low_bits_may_clip_more(model: nn.Module) -> None:
    recipe = INT8.set("*", activation=3, weight=3)
    assert check(quantized(model, recipe=recipe), [images(128, 5)]).healthy


def test_batch_statistics_do_not_matter(model: nn.Module) -> None:
    qmodel, x = standard(model), images(48, 2)
    whole = check(qmodel, [x])
    parts = check(qmodel, [(part, torch.zeros(len(part))) for part in x.split(7)])  # with labels
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert (a.name, a.part, a.count) == (b.name, b.part, b.count)
        assert a.part == "weight" or (a.used, a.drift) == pytest.approx((b.used, b.drift), rel=0.02)


def test_limit(model: nn.Module) -> None:
    qmodel = standard(model)
    assert check(qmodel, images(64, 2).split(8), limit=3).samples == 24
    for limit in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="limit is"):
            check(qmodel, [images(2)], limit=limit)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error::qfx.calibration.CalibrationWarning")
def test_data_that_calibrated_are_known_again(model: nn.Module, tmp_path: Path) -> None:
    data, qmodel = images(64, 1), standard(model)
    check(qmodel, [images(64, 2)])
    check(qmodel, [torch.cat([data[:8], images(56, 2)])])
    path = tmp_path / "model.qfx"
    qfx.save(qmodel, path)
    for twin in (qmodel, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), qfx.load(path, target="reference")):
        with pytest.warns(CalibrationWarning, match="64 of the 64 samples"):
            check(twin, data[torch.randperm(64)].split(16))
    with pytest.warns(CalibrationWarning, match="20 of the 20"):
        check(qmodel, [data[:20]])


@pytest.mark.parametrize("way", ["copy", "pickle", "file"])
def test_models_that_were_copied_or_saved(model: nn.Module, tmp_path: Path, way: str) -> None:
    qmodel, x = standard(model, 0.05), [images(32, 2)]
    if way == "file":
        qfx.save(qmodel, tmp_path / "m")
        twin = qfx.load(tmp_path / "m", target="reference")
    else:
        twin = copy.deepcopy(qmodel) if way == "copy" else pickle.loads(pickle.dumps(qmodel))
    found = check(twin, x)
    assert found == check(qmodel, x) and not found.healthy


def test_the_model_stays_as_it_is(model: nn.Module) -> None:
    qmodel, x = standard(model), images(4, 2)
    before, state = qmodel(x), {k: v.clone() for k, v in portable(qmodel).state_dict().items()}
    check(qmodel, [x])
    assert torch.equal(qmodel(x), before)
    assert all(torch.equal(v, state[k]) for k, v in portable(qmodel).state_dict().items())


def test_plain_values(model: nn.Module) -> None:
    found = check(standard(model, 0.05), [images(32)])
    assert isinstance(found, Diagnosis)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["samples"] == 32 and len(plain["rows"]) == len(found.rows)
    assert plain["findings"][0]["remedy"] == found.findings[0].remedy
    many = replace(found, findings=found.findings * 10)
    assert f"… and {len(many.findings) - 8} more" in str(many)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, *more: Tensor, by: float = 1.0) -> Tensor:
        return self.fc(x * by if mask is None else x * mask)


def test_items_by_name_and_by_place() -> None:
    model, x, mask = Scaled().eval(), torch.randn(64, 4), torch.ones(64, 4)
    example = {"x": x, "mask": mask}
    by_name = qfx.quantize(model, example, verbose=False, target="reference")
    assert _asked(codegen_of(portable(by_name)).binder) == (2, ["x", "mask"])
    named = check(by_name, [{"labels": 0, "mask": mask[:8], "x": x[:8] / 2}])
    assert named == check(by_name, [(x[:8] / 2, mask[:8], 0)]) and named.samples == 8
    with pytest.raises(CalibrationError, match=r"item 0 of the data is no call of the model: .*'x' is missing"):
        check(by_name, [{}])
    alone = qfx.quantize(model, x, verbose=False, target="reference")
    assert _asked(codegen_of(portable(alone)).binder) == (1, ["x"])
    assert check(alone, [(x + 1, torch.zeros(64))]).samples == 64


class Stops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.sum()) > -1e9 else x


def test_models_that_cannot_be_checked(model: nn.Module) -> None:
    x = images(8)
    with pytest.raises(ConfigError, match="qfx did not quantize it"):
        check(model, [x])
    with pytest.raises(ConfigError, match="it is PREPARED"):
        check(qfx.prepare(model, x), [x])
    parts = quantized(Stops().eval())
    with pytest.raises(ConfigError, match=r"1 parts, the first is 'body'.*\n.*get_submodule\('body'\)"):
        check(parts, [x])
    assert check(parts.get_submodule("body"), [x]).rows
    with pytest.raises(ConfigError, match=r"nothing in .* is quantized"):
        check(quantized(model, recipe=INT8.skip("*")), [x])


def test_data_that_cannot_be_run(model: nn.Module) -> None:
    qmodel = standard(model)
    with pytest.raises(CalibrationError, match="there are no data"):
        check(qmodel, [])
    with pytest.raises(CalibrationError, match="the data are one Tensor"):
        check(qmodel, images(2))
    with pytest.raises(CalibrationError, match="item 1 of the data is a str"):
        check(qmodel, [images(2), "no"])
    with pytest.raises(CalibrationError, match=r"item 1 of the data is no call of the model.*float64"):
        check(qmodel, [images(2), images(2).double()])
    with pytest.raises(CalibrationError, match="item 0 of the data is no call"):
        check(qmodel, [()])


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_the_first_layer_that_sees_nan_is_named(model: nn.Module, value: float, kind: str) -> None:
    x = images(4)
    x[1, 0, 2, 2] = value
    with pytest.raises(CalibrationError, match=f"item 1 of the data gives {kind} here") as caught:
        check(standard(model), [images(4), x])
    assert caught.value.where == "first"


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), Ratio(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class Ratio(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x + x.abs().amax(-1, keepdim=True))


def test_nan_inside_is_named_by_the_layer_that_makes_it() -> None:
    model = Divides().eval()
    with torch.no_grad():
        model.a.bias.zero_()
    qmodel = qfx.quantize(model, torch.randn(4, 4), calibration=[torch.randn(64, 4)], verbose=False, target="reference")
    with pytest.raises(CalibrationError, match="gives NaN here") as caught:
        check(qmodel, [torch.zeros(2, 4)])
    assert caught.value.where == "norm"


def test_pruned_channels_are_no_finding(model: nn.Module) -> None:
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.get_submodule("first").weight[3] = 0  # type: ignore[operator]
    found = check(quantized(pruned), [images(64, 5)])
    assert found.healthy
    assert all(not row.zero_channels for row in found.rows)


def test_minmax_clips_nothing_of_its_own_data(model: nn.Module) -> None:
    data, recipe = images(64, 1), INT8.set("*", activation=replace(ACTIVATION, observer=MinMax))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        row = check(quantized(model, data, recipe), [data]).rows[0]
    assert (row.below, row.above) == (0.0, 0.0) and row.used == pytest.approx(1.0, abs=0.02)


def test_a_later_remedy_keeps_what_an_earlier_one_changed() -> None:
    reader = Reader("fc", "linear", True, ACTIVATION, replace(WEIGHT, element=qfx.IntType(4, True)))
    mending = Mending(INT8)
    four = "weight=replace(recipe.default.weight, element=qfx.IntType(bits=4, signed=True)"
    assert mending.statement(float_activations, [reader]) == f"recipe = recipe.set('fc', activation=None, {four}))"
    whole = mending.statement(whole_weight, [replace(reader, weight=replace(reader.weight, observer=percentile(90.0)))])
    assert whole == f"recipe = recipe.set('fc', activation=None, {four}))"
    assert mending.statement(in_float, [reader]) == "recipe = recipe.skip('fc')"
    assert mending.statement(whole_weight, [reader]) == "recipe = recipe.skip('fc')"


@pytest.mark.parametrize("base", [None, WEIGHT])
def test_specs_are_written_as_code(base: qfx.QuantSpec | None) -> None:
    specs = [
        ACTIVATION,
        replace(WEIGHT, granularity=qfx.PerGroup(32), ranges=qfx.Learned(), estimator=qfx.Estimator.STRAIGHT_THROUGH),
        replace(ACTIVATION, scheme=qfx.Scheme.SYMMETRIC, observer=percentile(99.0), narrow_range=True),
        qfx.QuantSpec(qfx.IntType(8, True), granularity=qfx.PerToken(), dynamic=True),
    ]
    for spec in specs:
        code = changed(spec, base, "weight")
        assert eval(code, {"qfx": qfx, "replace": replace, "recipe": INT8}) == spec
    assert changed(WEIGHT, WEIGHT, "weight") == "recipe.default.weight" and changed(None, base, "weight") == "None"


def test_narrow_weights_of_a_convolution_are_known_as_such() -> None:
    """Their integers lie packed in rows, behind a reshape."""
    x = torch.randn(64, 3, 8, 8)
    recipe = qfx.Recipe.int8().set(op="conv2d", weight=4)
    quantized = qfx.quantize(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), x, recipe=recipe, verbose=False)
    (weight,) = [row for row in qfx.check(quantized, [x.flip(0)]).rows if row.part == "weight"]
    assert weight.bits == 4
