"""The front that is shaped as torch's FX mode: same names, same signatures, the house's numbers."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import compat
from qfx.compat import QConfigMapping, convert_fx, prepare_fx, prepare_qat_fx
from qfx.errors import CalibrationError, ConfigError
from qfx.fake_quant import FakeQuantize
from qfx.metrics import sqnr_db
from qfx.observers import MinMax
from qfx.recipe import Recipe
from qfx.spec import QConfig
from qfx.tools.bench_compat import compat_sqnr
from qfx.tools.bench_figures import Options
from qfx.trained_fake_quant import TrainedFakeQuantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as tq
    from torch.ao.nn.quantized import FloatFunctional
    from torch.ao.quantization import quantize_fx as fx_mode
    from torch.ao.quantization.backend_config import get_native_backend_config
    from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::qfx.QfxWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DEFAULT = compat.get_default_qconfig_mapping()
QAT = compat.get_default_qat_qconfig_mapping()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)
        self.labels = ("a", "b")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Stubs(nn.Module):
    """A model that was made ready for eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.add, self.cat, self.mul = FloatFunctional(), FloatFunctional(), FloatFunctional()
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.quant(x))
        y = self.add.add_relu(x, self.second(x))
        return self.dequant(self.last(self.mul.mul_scalar(self.cat.cat([x, y], 1), 0.5)))


def batches(count: int = 4, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def integers(qmodel: nn.Module) -> set[str]:
    return {row.layer for row in qfx.report(qmodel).rows if row.integer and row.layer}


# --- the names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in compat.__all__ if name not in ("QConfig", "QConfigMapping")])
def test_signatures(name: str) -> None:
    """Every call that torch's function takes by position or keyword means the same here."""
    theirs = inspect.signature(getattr(fx_mode, name, None) or getattr(tq, name)).parameters
    ours = inspect.signature(getattr(compat, name)).parameters
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)
    for parameter in theirs.values():
        own = ours[parameter.name]
        assert (own.default is own.empty) == (parameter.default is parameter.empty)
        if not isinstance(parameter.default, torch.dtype):
            assert own.default == parameter.default


def test_names_of_the_mapping() -> None:
    names = [name for name in vars(tq.QConfigMapping) if not name.startswith("_")]
    assert all(callable(getattr(QConfigMapping, name)) for name in names)
    assert vars(tq.QConfigMapping()) == vars(QConfigMapping())


def test_defaults() -> None:
    x86, qnnpack = compat.get_default_qconfig(), compat.get_default_qat_qconfig("qnnpack")
    assert x86 == Recipe.int8().default
    assert qnnpack.activation == x86.activation and str(qnnpack.weight) == "int8 symmetric per tensor"
    with pytest.raises(ConfigError, match=r"'arm'(?s:.)*fbgemm"):
        compat.get_default_qconfig("arm")
    with pytest.raises(ConfigError, match="version 1"):
        compat.get_default_qconfig_mapping("x86", 1)


# --- after training ---------------------------------------------------------------------------------------------------


def test_the_users_loop_calibrates() -> None:
    """Bit for bit what qfx.quantize gives with the same batches."""
    model, data = Net().eval(), batches()
    prepared = prepare_fx(model, DEFAULT, (data[0],))
    for x in data[:3]:
        with torch.no_grad():
            assert torch.allclose(prepared(x), model(x), atol=1e-5)
    made = convert_fx(prepared)
    wanted = qfx.quantize(model, data[0], calibration=data[:3], verbose=False)
    assert torch.equal(made(data[3]), wanted(data[3]))
    assert integers(made) == {"conv", "fc"}
    assert made.labels == ("a", "b")  # attributes of the user's


def test_it_goes_on_observing() -> None:
    model, data = Net().eval(), batches()
    prepared = prepare_fx(model, DEFAULT, (data[0],))
    prepared(data[0])
    first = convert_fx(prepared)
    prepared(100 * data[1])
    second = convert_fx(prepared)
    assert sqnr_db(model(100 * data[1]), second(100 * data[1])) > 25 > sqnr_db(
        model(100 * data[1]), first(100 * data[1])
    )
    assert torch.equal(convert_fx(copy.deepcopy(prepared))(data[2]), second(data[2]))


def test_without_data() -> None:
    prepared = prepare_fx(Net().eval(), DEFAULT, (batches()[0],))
    with pytest.raises(CalibrationError, match="no calibration data reached this layer"):
        convert_fx(prepared)


def test_values_that_are_not_finite() -> None:
    prepared = prepare_fx(Net().eval(), DEFAULT, (batches()[0],))
    with pytest.raises(CalibrationError, match="NaN"):
        prepared(torch.full((8, 3, 8, 8), float("nan")))


def test_what_was_not_prepared() -> None:
    for model in (Net(), qfx.quantize(Net().eval(), batches()[0], verbose=False)):
        with pytest.raises(ConfigError, match=r"quantized already|no model that qfx.prepare returned"):
            convert_fx(model)


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_a_mapping_of_torch(backend: str) -> None:
    model, data = Net().eval(), batches()
    prepared = prepare_fx(model, tq.get_default_qconfig_mapping(backend).set_module_name("fc", None), (data[0],))
    for x in data[:3]:
        prepared(x)
    made = convert_fx(prepared)
    assert sqnr_db(model(data[3]), made(data[3])) > 25
    assert "conv" in integers(made) and "fc" not in integers(made)
    text = str(qfx.report(made))
    assert "the mapping's qconfig for fc" in text and ("reduce_range is not needed" in text) == (backend == "fbgemm")


def test_names_are_checked_against_the_model() -> None:
    """What is there and was folded away, as a batch norm, may be named; what is not there may not."""
    x = batches()[0]
    for name in ("norm", "drop", "conv"):
        prepare_fx(Net().eval(), compat.get_default_qconfig_mapping().set_module_name(name, None), (x,))
    for mapping in (
        compat.get_default_qconfig_mapping().set_module_name("convs", None),
        compat.get_default_qconfig_mapping().set_module_name_regex("onv", None),
        compat.get_default_qconfig_mapping().set_module_name_object_type_order("inside", nn.Linear, 0, None),
    ):
        with pytest.raises(ConfigError, match="module_name"):
            prepare_fx(Net().eval(), mapping, (x,))


class Top(nn.Module):
    """A user's observer as torch's documentation has them."""

    dtype, qscheme, quant_min, quant_max = torch.quint8, torch.per_tensor_affine, 0, 255

    def __init__(self) -> None:
        super().__init__()
        self.top = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.top = torch.maximum(self.top, x.abs().max())
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.top / 127, torch.tensor(128)


class Peaks(tq.MinMaxObserver):
    """One that is derived from torch's."""


class Own(MinMax):
    """One that is derived from qfx's."""


@pytest.mark.parametrize("observer", [Top, Peaks, Peaks.with_args(reduce_range=False), Own])
def test_an_observer_of_the_users(observer: Any) -> None:
    model, data = Net().eval(), batches()
    qconfig = tq.QConfig(activation=observer, weight=tq.default_per_channel_weight_observer)
    prepared = prepare_fx(model, QConfigMapping().set_global(qconfig), (data[0],))
    for x in data[:3]:
        prepared(x)
    assert sqnr_db(model(data[3]), convert_fx(prepared)(data[3])) > 25
    kinds = {type(m) for m in prepared.modules()}
    assert kinds & {Top, Peaks, Own}


# --- stubs ------------------------------------------------------------------------------------------------------------


def test_stubs_and_float_functionals() -> None:
    model, data = Stubs().eval(), batches()
    prepared = prepare_fx(model, DEFAULT, (data[0],))
    for x in data[:3]:
        prepared(x)
    made = convert_fx(prepared)
    assert sqnr_db(model(data[3]), made(data[3])) > 25
    rows = {row.operator for row in qfx.report(made).rows if row.integer}
    assert {"conv2d", "add", "relu", "cat"} <= rows


def test_a_quant_wrapper() -> None:
    model = tq.QuantWrapper(nn.Sequential(nn.Linear(8, 8), nn.ReLU())).eval()
    made = qfx.quantize(model, torch.randn(16, 8), verbose=False)
    assert integers(made) >= {"module.0"}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", [QAT, tq.get_default_qat_qconfig_mapping("fbgemm")], ids=["qfx", "torch"])
def test_training(mapping: Any) -> None:
    model, data = Net().train(), batches()
    prepared = prepare_qat_fx(model, mapping, (data[0],))
    assert prepared.training
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-2)
    for x in data:
        optimizer.zero_grad()
        prepared(x).square().sum().backward()
        optimizer.step()
    with pytest.raises(ConfigError, match=r"training mode(?s:.)*eval\(\)"):
        convert_fx(prepared)
    made = convert_fx(prepared.eval())
    assert sqnr_db(prepared(data[0]), made(data[0])) > 30
    assert not torch.equal(prepared.state_dict()["conv.weight"], model.state_dict()["conv.weight"])


def test_switches() -> None:
    data = batches()
    prepared = prepare_qat_fx(Net().train(), QAT, (data[0],))
    prepared(data[0])
    ranged = [m for m in prepared.modules() if isinstance(m, TrainedFakeQuantize) and not m.constant]
    before = [m.scale.clone() for m in ranged]
    prepared.apply(compat.disable_observer)
    prepared(9 * data[1])
    assert all(torch.equal(m.scale, b) for m, b in zip(ranged, before, strict=True))
    prepared.apply(compat.enable_observer)
    prepared(9 * data[1])
    assert not any(torch.equal(m.scale, b) for m, b in zip(ranged, before, strict=True))

    prepared.eval()
    rounded = prepared(data[2])
    prepared.apply(compat.disable_fake_quant)
    plain = prepared(data[2])
    prepared.apply(compat.enable_fake_quant)
    assert not torch.equal(plain, rounded) and torch.equal(prepared(data[2]), rounded)


def test_switches_after_training() -> None:
    model, data = Net().eval(), batches()
    prepared = prepare_fx(model, DEFAULT, (data[0],))
    with pytest.raises(CalibrationError, match="no calibration data"):
        prepared.apply(compat.enable_fake_quant)
    prepared.apply(compat.disable_fake_quant)
    prepared(data[0])
    prepared.apply(compat.disable_observer)
    prepared(100 * data[1])
    prepared.apply(compat.enable_fake_quant)
    made = convert_fx(prepared)
    assert sqnr_db(prepared(data[0]), made(data[0])) > 40 and sqnr_db(model(data[0]), made(data[0])) > 30
    assert not torch.equal(prepared(data[0]), model(data[0]))
    assert all(m.quantizing for m in prepared.modules() if isinstance(m, FakeQuantize))


def test_plain_observers_cannot_train() -> None:
    with pytest.raises(ConfigError, match=r"(?s)global qconfig: HistogramObserver only observes.*qat_qconfig_mapping"):
        prepare_qat_fx(Net().train(), tq.get_default_qconfig_mapping(), (batches()[0],))


# --- the eager functions ----------------------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.table(tokens))))


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, {"first", "second"}),
        ({nn.Linear}, {"first", "second"}),
        ({"first"}, {"first"}),
        ({"second": tq.per_channel_dynamic_qconfig}, {"second"}),
        ({"": tq.default_dynamic_qconfig, "first": None}, {"second"}),
    ],
)
def test_quantize_dynamic(spec: Any, layers: set[str]) -> None:
    model, tokens = Text().eval(), torch.randint(9, (4, 7))
    made = compat.quantize_dynamic(model, spec, torch.qint8, example_inputs=(tokens,))
    assert integers(made) == layers
    assert sqnr_db(model(tokens), made(tokens)) > 25


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "(?s)no example_inputs.*add example_inputs"),
        ({"dtype": torch.float16, "example_inputs": (torch.ones(1, 1).long(),)}, "dtype=torch.float16"),
        ({"inplace": True}, "inplace"),
        ({"mapping": {}}, "mapping"),
        ({"qconfig_spec": {"frist"}, "example_inputs": (torch.ones(1, 1).long(),)}, "(?s)'frist'.*'first'"),
    ],
)
def test_quantize_dynamic_refuses(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compat.quantize_dynamic(Text().eval(), **given)


def test_quantize_qat() -> None:
    model, data = Net().train(), batches()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    model.fc.qconfig = None  # type: ignore[assignment]

    def train(prepared: nn.Module, rate: float) -> None:
        optimizer = torch.optim.SGD(prepared.parameters(), rate)
        for x in data:
            optimizer.zero_grad()
            prepared(x).square().sum().backward()
            optimizer.step()

    made = compat.quantize_qat(model, train, (1e-3,), example_inputs=(data[0],))
    assert "conv" in integers(made) and "fc" not in integers(made)
    del model.qconfig, model.fc.qconfig
    assert "fc" in integers(compat.quantize_qat(model, train, [1e-3], example_inputs=(data[0],)))
    with pytest.raises(ConfigError, match="no example_inputs"):
        compat.quantize_qat(model, train, ())
    with pytest.raises(ConfigError, match="inplace"):
        compat.quantize_qat(model, train, (), True)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "custom",
    [
        {"non_traceable_module_name": ["conv"], "preserved_attributes": ["labels"]},
        {"non_traceable_module_class": [nn.Conv2d]},
        PrepareCustomConfig().set_non_traceable_module_names(["conv"]).set_preserved_attributes(["labels"]),
        PrepareCustomConfig().set_non_traceable_module_classes([nn.Conv2d]),
    ],
)
def test_what_could_not_be_traced_stays_float(custom: Any) -> None:
    data = batches()
    prepared = prepare_fx(Net().eval(), DEFAULT, (data[0],), custom)
    prepared(data[0])
    made = convert_fx(prepared, {"preserved_attributes": ["labels"]})
    assert "conv" not in integers(made) and "fc" in integers(made)
    assert made.labels == ("a", "b")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend_config": get_native_backend_config()}, "backend_config"),
        ({"_equalization_config": QConfigMapping()}, "_equalization_config"),
        ({"prepare_custom_config": {"standalone_module_name": [("conv", None, None, None, None)]}},
         "standalone_module_name"),
        ({"prepare_custom_config": PrepareCustomConfig().set_standalone_module_class(nn.Conv2d, None, (), None, None)},
         "standalone_module_classes"),
        ({"prepare_custom_config": {"float_to_observed_custom_module_class": {"static": {Net: Net}}}},
         "float_to_observed_custom_module_class"),
        ({"prepare_custom_config": PrepareCustomConfig().set_input_quantized_indexes([0])}, "input_quantized_indexes"),
        ({"prepare_custom_config": {"output_quantized_idxs": [0]}}, "output_quantized_idxs"),
        ({"prepare_custom_config": {"non_traceable_module_names": []}}, "did you mean 'non_traceable_module_name'"),
        ({"prepare_custom_config": {"non_traceable_module_name": ["cnov"]}}, "(?s)'cnov'.*'conv'"),
    ],
)  # fmt: skip
def test_prepare_refuses(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        prepare_fx(Net().eval(), DEFAULT, (batches()[0],), **given)
    assert caught.value.hint
    if "_equalization_config" not in given:
        with pytest.raises(ConfigError, match=says):
            prepare_qat_fx(Net().train(), QAT, (batches()[0],), **given)


@pytest.mark.parametrize(
    "given",
    [
        {"keep_original_weights": True},
        {"qconfig_mapping": DEFAULT},
        {"backend_config": get_native_backend_config()},
        {"_remove_qconfig": False},
        {"convert_custom_config": {"observed_to_quantized_custom_module_class": {"static": {Net: Net}}}},
        {
            "convert_custom_config": ConvertCustomConfig().set_observed_to_quantized_mapping(
                Net, Net, tq.QuantType.STATIC
            )
        },
    ],
    ids=lambda given: next(iter(given)),
)
def test_convert_refuses(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(ConfigError, match=f"no counterpart of {name}") as caught:
        convert_fx(Net(), **given)
    assert caught.value.hint


def test_the_benchmark() -> None:
    pytest.importorskip("expecttest", reason="torch's test models import it")
    figures = list(compat_sqnr(Options(), names=("LinearReluModel", "DenseTopMLP")))
    assert [f.verdict for f in figures[:2]] == ["met", "skipped"]
    assert figures[0].bar is not None and "FX mode reaches" in figures[0].note
    assert figures[-1].what == "models that miss" and figures[-1].value == 0


def test_a_qconfig_of_qfx() -> None:
    data = batches()
    mapping = QConfigMapping().set_global(QConfig(None, Recipe.w8a16().default.weight))
    prepared = prepare_fx(Net().eval(), mapping, (data[0],))
    made = convert_fx(prepared)  # which observes nothing
    assert integers(made) == {"fc"}
