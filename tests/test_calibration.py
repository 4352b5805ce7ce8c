"""Calibration: data that fit, data that do not, and the warnings about data that mislead."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import qfx
from qfx.api import TargetWarning, graphs
from qfx.calibration import CalibrationWarning, OutlierWarning
from qfx.errors import CalibrationError, ConfigError, QfxWarning
from qfx.fake_quant import FakeQuantize
from qfx.meta import graph_info
from qfx.observers import Histogram, Observer, Percentile
from qfx.roundings import fake_quants
from qfx.spec import UINT8, IntType, QConfig, QuantSpec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.head(self.stem(x).relu() * gain)


MODEL = Net().eval()
ROWS = torch.randn(64, 6)
BATCHES = list(ROWS.split(16))


def prepared(example: Any = None, recipe: str | qfx.Recipe = "int8", model: nn.Module = MODEL) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TargetWarning)
        return qfx.prepare(model, ROWS[:2] if example is None else example, recipe=recipe, target="reference")


def observers(model: nn.Module) -> dict[str, FakeQuantize]:
    return {str(n.target): m for n, m in fake_quants(graphs(model)[""])}


def messages(model: nn.Module, data: Any) -> list[str]:
    """The warnings that calibration gives, and nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qfx.calibrate(model, data)
    return [str(w.message) for w in caught if isinstance(w.message, QfxWarning)]


# --- data that fit ----------------------------------------------------------------------------------------------------


def test_every_activation_and_weight_gets_a_scale() -> None:
    model = prepared()
    assert messages(model, BATCHES) == []
    modules = observers(model)
    assert len(modules) >= 4
    assert all(m.scale.numel() and math.isfinite(m.scale.sum()) and not m.observing for m in modules.values())
    assert graph_info(graphs(model)[""]).stage == "CALIBRATED"


def test_ranges_are_those_of_all_batches() -> None:
    recipe = qfx.Recipe("min-max", dataclasses.replace(qfx.Recipe.int8().default, activation=QuantSpec(UINT8)))
    model = prepared(recipe=recipe)
    assert messages(model, BATCHES) == []
    source = next(m for name, m in observers(model).items() if name.endswith(".x"))
    assert source.observer is not None
    low, high = source.observer.range()
    assert (float(low), float(high)) == (float(ROWS.min()), float(ROWS.max()))


class Rows(Dataset[Tensor]):
    train = True

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> Tensor:
        return ROWS[i]


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(ROWS)


LABELS = torch.zeros(64, dtype=torch.int64)


@pytest.mark.parametrize(
    "data",
    [
        lambda: BATCHES,
        lambda: iter(BATCHES),
        lambda: (b for b in BATCHES),
        lambda: [(b,) for b in BATCHES],
        lambda: [[b, "label"] for b in BATCHES],
        lambda: DataLoader(Rows(), batch_size=16),
        lambda: DataLoader(TensorDataset(ROWS, LABELS), batch_size=16),
        lambda: DataLoader(Stream(), batch_size=16),
    ],
    ids=["list", "iterator", "generator", "tuples", "lists", "loader", "labels", "stream"],
)
def test_any_iterable_will_do(data: Any) -> None:
    model, want = prepared(), prepared()
    assert messages(model, data()) == []
    qfx.calibrate(want, BATCHES)
    assert {k: v.scale.tolist() for k, v in observers(model).items()} == {
        k: v.scale.tolist() for k, v in observers(want).items()
    }


def test_mappings_keep_the_examples_keys() -> None:
    model = prepared({"x": ROWS[:2]})
    assert messages(model, [{"label": 3, "x": b} for b in BATCHES]) == []


def test_an_example_with_a_number_beside_the_tensor() -> None:
    model = prepared((ROWS[:2], 2.0))
    assert messages(model, [(b, 2.0) for b in BATCHES]) == []


# --- data that do not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [[], (), iter([]), DataLoader(TensorDataset(ROWS[:0]))], ids=lambda d: type(d).__name__
)
def test_empty_data(data: Any) -> None:
    with pytest.raises(CalibrationError, match="calibration data are empty") as caught:
        qfx.calibrate(prepared(), data)
    assert "generator" in caught.value.hint


def test_an_exhausted_generator() -> None:
    data = (b for b in BATCHES)
    qfx.calibrate(prepared(), data)
    with pytest.raises(CalibrationError, match="empty"):
        qfx.calibrate(prepared(), data)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"x": ROWS}, "is a mapping, the example is positional"),
        ("rows", "is a str"),
        (None, "is a NoneType"),
        ((), "has 0 entries, the example has 1"),
        (ROWS.double(), "dtype torch.float64, the example has torch.float32"),
        (ROWS.long(), "dtype torch.int64"),
        (ROWS[0], "number of dimensions 1, the example has 2"),
        (ROWS.to("meta"), "device meta, the example has cpu"),
        ((3,), "has tensors at"),
        (((ROWS,),), "has tensors at"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_items_that_do_not_fit_are_named(item: Any, text: str) -> None:
    model = prepared()
    with pytest.raises(CalibrationError, match=text) as caught:
        qfx.calibrate(model, [BATCHES[0], item])
    assert "calibration item 1" in str(caught.value)
    assert not any(m.observing for m in observers(model).values())


def test_positional_items_for_a_mapping() -> None:
    model = prepared({"x": ROWS[:2]})
    with pytest.raises(CalibrationError, match="is positional, the example is a mapping with keys"):
        qfx.calibrate(model, [ROWS])
    with pytest.raises(CalibrationError, match=r"has no \['x'\]; its keys are \['y'\]"):
        qfx.calibrate(model, [{"y": ROWS}])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_name_the_layer(value: float) -> None:
    class Broken(Net):
        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            return self.head(self.stem(x) * gain / x[:, :1].abs())

    model = prepared(model=Broken().eval())
    bad = ROWS.clone()
    bad[3] = 0.0 if math.isinf(value) else math.nan
    with pytest.raises(CalibrationError, match=r"infinity|NaN") as caught:
        qfx.calibrate(model, [bad])
    assert caught.value.where
    assert not any(m.observing for m in observers(model).values())


def test_after_a_failure_calibration_can_be_repeated() -> None:
    model, want = prepared(), prepared()
    with pytest.raises(CalibrationError):
        qfx.calibrate(model, ["no tensor"])
    with pytest.raises(CalibrationError, match="not CALIBRATED"):
        qfx.convert(model)
    for each in (model, want):
        qfx.calibrate(each, BATCHES)
    assert [m.scale.tolist() for m in observers(model).values()] == [m.scale.tolist() for m in observers(want).values()]


def test_only_prepared_models_are_calibrated() -> None:
    with pytest.raises(ConfigError, match="no model that qfx"):
        qfx.calibrate(Net(), BATCHES)


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 31, 32])
def test_too_few_samples(samples: int) -> None:
    model = prepared()
    found = messages(model, [ROWS[:samples]])
    if samples >= 32:
        assert found == []
        return
    (text,) = found
    assert text.startswith(f"ranges come from {samples} sample{'s' * (samples > 1)}; 32 or more are usual")
    assert ("warning", text.split(". Pass")[0]) in graph_info(graphs(model)[""]).notes


def test_samples_are_counted_over_batches() -> None:
    assert messages(prepared(), ROWS[:32].split(1)) == []
    assert len(messages(prepared(), ROWS[:31].split(1))) == 1


def test_weight_only_recipes_need_no_samples() -> None:
    assert messages(prepared(recipe="w8a16"), [ROWS[:1]]) == []
    assert messages(prepared(recipe="int8_dynamic"), [ROWS[:1]]) == []


class Held(Rows):
    train = False


class Split(Rows):
    def __init__(self, split: str) -> None:
        self.split = split


@pytest.mark.parametrize(
    ("dataset", "warns"),
    [
        (Rows(), False),
        (Held(), True),
        (Subset(Held(), range(64)), True),
        (Subset(Subset(Held(), range(64)), range(64)), True),
        (Subset(Rows(), range(64)), False),
        (Split("test"), True),
        (Split("val"), True),
        (Split("Validation"), True),
        (Split("train"), False),
        (TensorDataset(ROWS), False),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else type(value).__name__,
)
def test_held_out_data(dataset: Any, warns: bool) -> None:
    found = messages(prepared(), DataLoader(dataset, batch_size=16))
    assert [("held-out split" in text) for text in found] == [True] * warns


def test_the_data_set_itself_is_looked_at() -> None:
    class Batches(list[Tensor]):
        train = False

    with pytest.warns(CalibrationWarning, match="held-out split"):
        qfx.calibrate(prepared(), Batches(BATCHES))


def test_outliers_that_are_clipped_name_their_layer() -> None:
    factory = Percentile.with_options(percentile=99.0)
    weight = qfx.Recipe.int8().default.weight
    recipe = qfx.Recipe("clips", QConfig(QuantSpec(UINT8, observer=factory), weight))
    data = ROWS.repeat(20, 1)
    data[0, 0] = 1e4
    model = prepared(recipe=recipe)
    with pytest.warns(OutlierWarning, match=r"layer\(s\) clip outliers, first .*: values reach \d+ times"):
        qfx.calibrate(model, [data])
    notes = [text for topic, text in graph_info(graphs(model)[""]).notes if topic == "outliers"]
    assert notes and len(notes) == len(set(notes))
    assert messages(prepared(recipe=recipe), [ROWS]) == []  # nothing clipped, nothing said


def test_ranges_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, int] = {}
    search = Histogram.range

    def counted(self: Observer) -> tuple[Tensor, Tensor]:
        calls[id(self)] = calls.get(id(self), 0) + 1
        assert isinstance(self, Histogram)
        return search(self)

    monkeypatch.setattr(Histogram, "range", counted)
    qfx.calibrate(prepared(), BATCHES)
    assert calls and set(calls.values()) == {1}


def test_four_bits_of_activation_calibrate_too() -> None:
    recipe = qfx.Recipe.int8().set("stem", activation=4, weight=3)
    model = prepared(recipe=recipe)
    assert messages(model, BATCHES) == []
    assert {m.spec.bits for m in observers(model).values()} >= {3, 4, 8}
    assert IntType(4, False) in {m.spec.element for m in observers(model).values() if isinstance(m.spec, QuantSpec)}


def test_a_model_that_writes_to_its_input_leaves_the_data_alone() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x.relu_())
            return out

    data = [ROWS.clone(), ROWS.clone()]
    qfx.quantize(Writer().eval(), ROWS[:1].clone(), calibration=data, target="reference", verbose=False)
    assert all(torch.equal(d, ROWS) for d in data)
