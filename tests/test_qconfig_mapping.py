"""Mappings of qconfigs as recipes: torch's own and qfx's, their precedence, and what has no counterpart."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx.compat import QConfigMapping
from qfx.errors import ConfigError
from qfx.foreign_observer import Foreign, ForeignObserver
from qfx.observers import Histogram, MinMax, MovingAverageMinMax, Percentile
from qfx.qconfig_mapping import operator_of, translate
from qfx.qconfig_spec import qconfig_of
from qfx.recipe import Recipe, Subject
from qfx.spec import INT8, UINT8, IntType, PerAxis, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.training import MOVING, Learned, Moving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as tq
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
    from torch.ao.quantization.observer import FixedQParamsObserver, NoopObserver, RecordingObserver

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

INT8_RECIPE = Recipe.int8().default
WIDE = QConfig(None, None)
A, B, C, D = (QConfig(QuantSpec(IntType(bits, False)), INT8_RECIPE.weight) for bits in (4, 5, 6, 7))


def activation(given: Any, *, training: bool = False) -> QuantSpec | None:
    return qconfig_of(tq.QConfig(given, nn.Identity), "here", training=training)[0].activation


def weight(given: Any) -> QuantSpec | None:
    return qconfig_of(tq.QConfig(nn.Identity, given), "here")[0].weight


# --- observers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (tq.HistogramObserver, QuantSpec(UINT8, observer=Histogram)),
        (tq.HistogramObserver.with_args(reduce_range=True), QuantSpec(UINT8, observer=Histogram)),
        (tq.HistogramObserver.with_args(bins=512), QuantSpec(UINT8, observer=Histogram.with_options(bins=512))),
        (tq.MinMaxObserver.with_args(dtype=torch.qint8), QuantSpec(INT8, observer=MinMax)),
        (tq.MinMaxObserver.with_args(quant_max=255).with_args(quant_min=0, quant_max=127),
         QuantSpec(IntType(7, False), observer=MinMax)),
        (functools.partial(tq.MinMaxObserver, torch.int8, qscheme=torch.per_tensor_symmetric),
         QuantSpec(INT8, Scheme.SYMMETRIC, observer=MinMax)),
        (tq.MovingAverageMinMaxObserver, QuantSpec(UINT8, observer=MovingAverageMinMax)),
        (tq.MovingAverageMinMaxObserver.with_args(averaging_constant=0.1),
         QuantSpec(UINT8, observer=MovingAverageMinMax.with_options(averaging_constant=0.1))),
        (tq.default_dynamic_quant_observer, QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)),
        (tq.PlaceholderObserver, None),
        (NoopObserver, None),
        (nn.Identity, None),
        (None, None),
        (tq.FakeQuantize.with_args(observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=15),
         QuantSpec(IntType(4, False), observer=MovingAverageMinMax)),
        (tq.FakeQuantize.with_args(observer=tq.MinMaxObserver.with_args(dtype=torch.qint8), quant_min=-128,
                                   quant_max=127), QuantSpec(INT8, observer=MinMax)),
        (tq.FusedMovingAvgObsFakeQuantize.with_args(averaging_constant=0.5),
         QuantSpec(UINT8, observer=MovingAverageMinMax.with_options(averaging_constant=0.5), ranges=Moving(0.5))),
        (_LearnableFakeQuantize.with_args(observer=tq.MinMaxObserver, scale=0.1, zero_point=0.0),
         QuantSpec(UINT8, observer=MinMax, ranges=Learned())),
        (Percentile, QuantSpec(UINT8, observer=Percentile)),
        (Percentile.with_options(bins=64), QuantSpec(UINT8, observer=Percentile.with_options(bins=64))),
        (QuantSpec(INT8), QuantSpec(INT8)),
    ],
)  # fmt: skip
def test_activations(given: Any, wanted: QuantSpec | None) -> None:
    assert activation(given) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (tq.default_weight_observer, QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor(), MinMax)),
        (tq.default_per_channel_weight_observer, INT8_RECIPE.weight),
        (tq.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, ch_axis=1),
         QuantSpec(INT8, Scheme.AFFINE, PerAxis(1), MinMax)),
        (tq.weight_observer_range_neg_127_to_127,
         QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor(), MinMax, narrow_range=True)),
        (tq.default_per_channel_weight_fake_quant, INT8_RECIPE.weight),
        (tq.default_fused_per_channel_wt_fake_quant, INT8_RECIPE.weight),
        (MinMax, INT8_RECIPE.weight),
    ],
)  # fmt: skip
def test_weights(given: Any, wanted: QuantSpec) -> None:
    assert weight(given) == wanted


@given(bits=st.integers(2, 8), signed=st.booleans(), narrow=st.booleans())
def test_ranges_of_integers(bits: int, signed: bool, narrow: bool) -> None:
    spec = QuantSpec(IntType(bits, signed), observer=MinMax, narrow_range=narrow)
    dtype = torch.int8 if signed else torch.uint8
    found = activation(
        tq.MinMaxObserver.with_args(dtype=dtype, quant_min=spec.quant_min, quant_max=spec.quant_max)
    )
    assert found is not None and (found.quant_min, found.quant_max) == (spec.quant_min, spec.quant_max)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (tq.MinMaxObserver.with_args(dtype=torch.quint4x2), "dtype=quint4x2 .*\n.*with_embedding_storage"),
        (tq.MinMaxObserver.with_args(dtype=torch.qint32), "dtype=qint32 .*\n.*qint8 or quint8"),
        (tq.PlaceholderObserver.with_args(dtype=torch.float16), r"dtype=float16 .*\n.*model\.half\(\)"),
        (tq.PlaceholderObserver.with_args(dtype=torch.quint8), "observes nothing"),
        (tq.default_float_qparams_observer, "float_qparams .*\n.*with_embedding_storage"),
        (tq.MinMaxObserver.with_args(quant_min=3, quant_max=9), "quant_min=3, quant_max=9"),
        (tq.PerChannelMinMaxObserver, "qscheme=per_channel_affine.*\n.*per_tensor_affine"),
        (FixedQParamsObserver.with_args(scale=0.1, zero_point=0), "FixedQParamsObserver has no counterpart"),
        (RecordingObserver, "RecordingObserver .*\n.*qfx.dump"),
        (RecordingObserver.with_args(colour="red"), "cannot be made"),
        (nn.Linear, "cannot be made"),
        (functools.partial(nn.Linear, 2, 2), "gives a Linear, which is no observer"),
        (nn.ReLU, "gives a ReLU, which is no observer"),
        (8, "int is no observer"),
    ],
)
def test_no_counterpart(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        activation(given)
    assert "activation of here" in str(caught.value) and caught.value.hint


def test_an_observer_that_is_made_already() -> None:
    with pytest.raises(ConfigError, match=r"(?s)weight of here: a MinMaxObserver that is made.*with_args"):
        qconfig_of(QConfig(None, tq.MinMaxObserver()), "here")  # type: ignore[arg-type]


def test_what_observes_only_cannot_train() -> None:
    for plain in (tq.HistogramObserver, Half):
        with pytest.raises(ConfigError, match=r"(?s)only observes.*FakeQuantize\.with_args"):
            activation(plain, training=True)
    found = activation(tq.FakeQuantize.with_args(observer=tq.MinMaxObserver), training=True)
    assert found is not None and found.ranges == MOVING


def test_what_is_not_needed_is_told() -> None:
    _, notes = qconfig_of(tq.get_default_qconfig("fbgemm"), "here")
    assert len(notes) == 1 and "reduce_range" in notes[0]
    assert qconfig_of(tq.get_default_qconfig("qnnpack"), "here")[1] == ()
    assert any("eps" in note for note in qconfig_of(tq.default_symmetric_qnnpack_qconfig, "here")[1])


# --- observers of the user's ------------------------------------------------------------------------------------------


class Half(nn.Module):
    """Half of the largest magnitude."""

    dtype, qscheme = torch.qint8, torch.per_tensor_symmetric

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor, self.top = factor, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.top = torch.maximum(self.top, x.abs().max())
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return (self.factor * self.top / 127).reshape(1), torch.zeros(1, dtype=torch.int64)


class Rows(Half):
    """As many scales as there are rows."""

    qscheme, ch_axis = torch.per_channel_symmetric, 0

    def forward(self, x: Tensor) -> Tensor:
        self.top = x.abs().flatten(1).amax(1)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.top / 127, torch.zeros_like(self.top)


@pytest.mark.parametrize("factory", [Half, functools.partial(Half, 0.5), lambda: Half()])
def test_an_observer_of_the_users(factory: Any) -> None:
    spec = activation(factory)
    assert spec == QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor(), Foreign(factory))
    observer = spec.observer(spec)  # type: ignore[union-attr, misc]
    observer(torch.tensor([1.0, -4.0]))
    scale, zero_point = observer.qparams()
    assert scale.shape == () and scale.dtype is torch.float32 and zero_point.dtype is torch.int32
    assert float(scale) == pytest.approx(2 / 127) and int(zero_point) == 0


def test_one_scale_a_row() -> None:
    spec = weight(Rows)
    assert spec is not None and spec.granularity == PerAxis(0) and spec.observer is not None
    observer = spec.observer(spec)
    observer(torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.5, 0.5]]))
    assert torch.allclose(observer.qparams()[0], torch.tensor([2.0, 3.0, 0.5]) / 127)


@given(
    scale=st.floats(1e-3, 1e3),
    zero_point=st.integers(0, 255),
)
def test_its_range_gives_its_scale(scale: float, zero_point: int) -> None:
    """Training starts with the range, conversion takes scale and zero point: they are the same."""
    from qfx.affine import choose_qparams

    class Given(Half):
        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return torch.tensor(scale), torch.tensor(zero_point)

    observer = ForeignObserver(QuantSpec(UINT8), Given())
    observer(torch.ones(2))
    low, high = observer.range()
    found = choose_qparams(low, high, symmetric=False, quant_min=0, quant_max=255)
    assert float(found[0]) == pytest.approx(scale, rel=1e-5) and int(found[1]) == zero_point


@pytest.mark.parametrize(
    ("scale", "zero_point", "says"),
    [
        ([1.0, 1.0], [0, 0], "2 scales"),
        ([0.0], [0], "not above zero"),
        ([float("nan")], [0], "not above zero"),
        ([1.0], [300], "outside of -128 to 127"),
        ([1.0], [3], "its zero point is not 0"),
    ],
)
def test_no_scale_of_the_spec(scale: list[float], zero_point: list[int], says: str) -> None:
    class Given(Half):
        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return torch.tensor(scale), torch.tensor(zero_point)

    observer = ForeignObserver(QuantSpec(INT8, Scheme.SYMMETRIC), Given())
    observer.layer = "fc"
    observer(torch.ones(2))
    with pytest.raises(ConfigError, match=f"{says}.*layer fc"):
        observer.qparams()
    with pytest.raises(ConfigError, match="needs the data again"):
        observer.with_spec(QuantSpec(IntType(4, True)))


def test_an_observer_without_dtype() -> None:
    class Unsaid(nn.Module):
        def calculate_qparams(self) -> None: ...

    with pytest.raises(ConfigError, match="has no dtype"):
        activation(Unsaid)


# --- mappings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onednn", "x86"])
@pytest.mark.parametrize("training", [False, True])
def test_the_defaults_of_torch(backend: str, training: bool) -> None:
    get = tq.get_default_qat_qconfig_mapping if training else tq.get_default_qconfig_mapping
    recipe = translate(get(backend), training=training).recipe
    own = qfx.compat.get_default_qconfig(backend)
    assert recipe.default.weight == own.weight
    assert recipe.default.activation is not None and own.activation is not None
    assert recipe.default.activation.element == own.activation.element
    assert recipe.unmatched([]) == ()  # the types that a model lacks are no error
    assert recipe.resolve(Subject("sigmoid", "act", ("M", "Sigmoid")))[0] == recipe.default


def test_a_plain_mapping_is_a_plain_recipe() -> None:
    recipe = Recipe.from_qconfig_mapping(qfx.compat.get_default_qconfig_mapping())
    assert recipe.default == INT8_RECIPE and recipe.rules == ()
    named = Recipe.from_qconfig_mapping(QConfigMapping().set_global(INT8_RECIPE).set_module_name("fc", None))
    assert qfx.recipe_file.from_toml(qfx.recipe_file.to_toml(named)) == named


def test_precedence() -> None:
    mapping = (
        QConfigMapping()
        .set_global(INT8_RECIPE)
        .set_object_type(F.linear, A)
        .set_object_type(nn.Linear, B)
        .set_module_name_regex("enc.*fc", C)
        .set_module_name_regex("enc", None)
        .set_module_name("encoder.deep", A)
        .set_module_name("encoder.deep.fc2", D)
    )
    recipe = Recipe.from_qconfig_mapping(mapping)

    def decided(path: str, *modules: str, op: str = "linear") -> QConfig | None:
        return recipe.resolve(Subject(op, path, modules))[0]

    assert decided("head", "M", "Linear") == B
    assert decided("head", "M", "Head") == A  # a function of a module of the user's
    assert decided("head", "M", "Conv2d", op="conv2d") == INT8_RECIPE
    assert decided("encoder.fc", "M", "Linear") == C
    assert decided("encoder.conv", "M", "Conv2d", op="conv2d") is None
    assert decided("encoder.deep.fc", "M", "Linear") == A
    assert decided("encoder.deep.fc2", "M", "Linear") == D
    assert decided("encoder.deep.fc2.part", "M", "Linear") == D
    assert decided("head.encoder", "M", "Linear") == B  # a regular expression begins at the beginning


def test_no_global_qconfig_means_float() -> None:
    recipe = Recipe.from_qconfig_mapping(QConfigMapping().set_object_type(nn.Linear, A))
    assert recipe.resolve(Subject("conv2d", "c", ("M", "Conv2d")))[0] is None
    assert recipe.resolve(Subject("linear", "fc", ("M", "Linear")))[0] == A


def test_classes_of_the_users_mean_what_they_compute_themselves() -> None:
    class Block(nn.Module): ...

    recipe = Recipe.from_qconfig_mapping(QConfigMapping().set_global(A).set_object_type(Block, None))
    assert recipe.resolve(Subject("add", "block", ("M", "Block")))[0] is None
    assert recipe.resolve(Subject("linear", "block.fc", ("M", "Block", "Linear")))[0] == A


@pytest.mark.parametrize("qconfig", [tq.default_dynamic_qconfig, tq.default_weight_only_qconfig])
def test_dynamic_and_weight_only_mean_linear_layers(qconfig: Any) -> None:
    for mapping in (QConfigMapping().set_global(qconfig), QConfigMapping().set_object_type(nn.Conv2d, qconfig)):
        found, why = Recipe.from_qconfig_mapping(mapping).resolve(Subject("conv2d", "c", ("M", "Conv2d")))
        assert found is None and "linear layers only" in why
    recipe = Recipe.from_qconfig_mapping(QConfigMapping().set_global(qconfig))
    found, _ = recipe.resolve(Subject("linear", "fc", ("M", "Linear")))
    assert found is not None and found.weight is not None and found.weight.bits == 8


def test_as_a_dict() -> None:
    mapping = (
        QConfigMapping()
        .set_global(A)
        .set_object_type("reshape", None)
        .set_module_name_regex("a", B)
        .set_module_name("a.b", None)
        .set_module_name_object_type_order("a", nn.Linear, 1, C)
    )
    assert QConfigMapping.from_dict(mapping.to_dict()) == mapping
    assert translate(mapping.to_dict()) == translate(mapping)
    assert tq.QConfigMapping.from_dict(mapping.to_dict()).to_dict() == mapping.to_dict()
    assert translate(tq.QConfigMapping.from_dict(mapping.to_dict())) == translate(mapping)
    with pytest.raises(ConfigError, match=r"no key 'object_types'(?s:.)*'object_type'"):
        QConfigMapping.from_dict({"object_types": []})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.linear, "linear"), (torch.add, "add"), (operator.add, "add"), (operator.iadd, "add"), ("add_", "add"),
        (torch.conv2d, "conv2d"), (F.relu, "relu"), (F.relu_, "relu"), (F.max_pool2d, "max_pool2d"), ("view", "view"),
        (F.interpolate, "upsample_*"), (torch.cat, "cat"), (torch.matmul, "matmul"), (F.adaptive_avg_pool2d,
        "adaptive_avg_pool2d"), (operator.getitem, "getitem"), (torch.flatten, "flatten"), (F.gelu, "gelu"),
    ],
)  # fmt: skip
def test_operators(function: Any, name: str) -> None:
    assert operator_of(function) == name


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        (QConfigMapping().set_global(8), "qconfig of the global qconfig is a int"),
        (QConfigMapping().set_global(tq.float16_dynamic_qconfig), "global qconfig: dtype=float16"),
        (QConfigMapping().set_module_name("", A), "set_global"),
        (QConfigMapping().set_module_name_regex("(", A), "no regular expression"),
        (QConfigMapping().set_object_type(lambda x: x, A), "is no operator"),
        (QConfigMapping().set_object_type("swim", A), "'swim' is no operator"),
        (
            QConfigMapping().set_object_type(nn.Embedding, tq.float_qparams_weight_only_qconfig_4bit),
            "weight of object_type Embedding: dtype=quint4x2",
        ),
        (8, "a int is no QConfigMapping"),
        (Recipe.int8(), "(?s)a Recipe is no QConfigMapping.*qfx.prepare"),
    ],
)
def test_mappings_that_cannot_be_meant(mapping: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Recipe.from_qconfig_mapping(mapping)


# --- in a graph -------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.one(self.two(self.one(x))), self.weight), self.weight)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Twice()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "nth", "floats"),
    [(nn.Linear, 0, [0]), (nn.Linear, 1, [1]), (nn.Linear, 2, [2]), (F.linear, 0, [3]), (F.linear, 1, [4])],
)
def test_calls_are_counted(kind: Any, nth: int, floats: list[int]) -> None:
    mapping = QConfigMapping().set_global(INT8_RECIPE).set_module_name_object_type_order("inner", kind, nth, None)
    prepared = qfx.prepare(Outer().eval(), torch.randn(4, 4), recipe=Recipe.from_qconfig_mapping(mapping))
    rows = [n for n in prepared.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]  # type: ignore[union-attr]
    assert [i for i, n in enumerate(rows) if not qfx.meta.info(n).quantized] == floats


@pytest.mark.parametrize(
    "mapping",
    [
        QConfigMapping().set_global(INT8_RECIPE).set_module_name_object_type_order("inner", nn.Linear, 3, None),
        QConfigMapping().set_global(INT8_RECIPE).set_module_name_object_type_order("", nn.Linear, 0, None),
        QConfigMapping().set_global(INT8_RECIPE).set_module_name("iner", None),
        QConfigMapping().set_global(INT8_RECIPE).set_module_name_regex("outer", None),
    ],
)
def test_a_name_that_matches_nothing(mapping: QConfigMapping) -> None:
    with pytest.raises(ConfigError, match="matches nothing"):
        qfx.prepare(Outer().eval(), torch.randn(4, 4), recipe=Recipe.from_qconfig_mapping(mapping))
