"""Bad input gets an error of its own: its class, the layer, the user's line and the way out are in the text."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.errors import QfxError
from qfx.spec import INT8, UINT8, IntType, PerAxis, PerGroup, PerTensor, PerToken, QuantSpec, Scheme

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

HERE = Path(__file__).name


class Net(nn.Module):
    """A convolution, two operators that stay float, and a linear layer; a branch that a constant decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(6), nn.Linear(8 * 6 * 6, 4)

    def forward(self, x: Tensor, flag: bool = True) -> Tensor:
        y = self.norm(self.conv(x).relu())
        y = y.softmax(1) if flag else y
        return self.fc(y.flatten(1))


class Nothing(nn.Module):
    """No part of it can be captured."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            return x * 2
        return x


class Explodes(nn.Module):
    """Gives infinity in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(1.0 / (self.first(x) * 0.0))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SYMMETRIC = Scheme.SYMMETRIC
recipe = qfx.Recipe.int8()
per_token = QuantSpec(INT8, SYMMETRIC, PerToken(), dynamic=True)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def qnet(net: Net) -> nn.Module:
    return qfx.quantize(net, X, target="reference", verbose=False)


def check(error: QfxError, where: str = "", source: bool = False) -> None:
    """Every error has a way out; layer and source line are in the text where they are known."""
    text = str(error)
    assert error.hint and f"way out: {error.hint}" in text
    if where:
        assert error.where == where and f"[layer {where}]" in text
    if source:
        assert re.search(rf"at .*{re.escape(HERE)}:\d+", text), text


def line_of(error: QfxError) -> str:
    """The line of this file that the error names."""
    found = re.search(rf"{re.escape(HERE)}:(\d+)", str(error))
    assert found, str(error)
    return Path(__file__).read_text().splitlines()[int(found[1]) - 1]


def consumed() -> Any:
    data = iter([X])
    next(data)
    return data


# --- quantize -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[type[QfxError], str, dict[str, Any]]] = {
    # arguments
    "no model": (qfx.CaptureError, "the model is a NoneType", {"model": None}),
    "a function": (qfx.CaptureError, "the model is a function", {"model": lambda x: x}),
    "meta model": (qfx.CaptureError, r"conv\.weight is on the meta device", {"model": Net().to("meta")}),
    "too many arguments": (
        qfx.CaptureError,
        r"3 positional arguments[\s\S]*Net\(x, flag=True\)",
        {"example_inputs": (X, True, X)},
    ),
    "too few arguments": (qfx.CaptureError, r"'x' is missing[\s\S]*Net\(x, flag=True\)", {"example_inputs": ()}),
    "unknown argument": (
        qfx.CaptureError,
        "no argument 'flog'; did you mean 'flag'",
        {"example_inputs": {"x": X, "flog": True}},
    ),
    "example of no kind": (qfx.CaptureError, "example_inputs is a NoneType", {"example_inputs": None}),
    "meta example": (qfx.CaptureError, "example input x has no values", {"example_inputs": X.to("meta")}),
    "recipe name": (qfx.ConfigError, "did you mean 'int8'", {"recipe": "int9"}),
    "recipe type": (qfx.ConfigError, "recipe is a int", {"recipe": 8}),
    "target name": (qfx.ConfigError, "did you mean 'reference'", {"target": "refrence"}),
    "target type": (qfx.ConfigError, "target is a int", {"target": 8}),
    "pipeline type": (qfx.ConfigError, "pipeline is a list", {"pipeline": []}),
    # calibration
    "no calibration": (qfx.CalibrationError, "empty", {"calibration": []}),
    "exhausted": (qfx.CalibrationError, r"empty[\s\S]*generator is exhausted", {"calibration": consumed()}),
    "one tensor": (qfx.CalibrationError, "one Tensor", {"calibration": X}),
    "one dict": (qfx.CalibrationError, "one dict", {"calibration": {"x": X}}),
    "no iterable": (qfx.CalibrationError, "one int", {"calibration": 3}),
    "other structure": (qfx.CalibrationError, "item 1 is a mapping", {"calibration": [X, {"x": X}]}),
    "no tensors": (qfx.CalibrationError, "item 0 is a str", {"calibration": ["x"]}),
    "empty item": (qfx.CalibrationError, "item 0 has 0 entries", {"calibration": [()]}),
    "other dtype": (
        qfx.CalibrationError,
        r"item 1.* dtype torch\.float64, the example has torch\.float32",
        {"calibration": [X, X.double()]},
    ),
    "other device": (qfx.CalibrationError, "item 0.* device meta", {"calibration": [X.to("meta")]}),
    "other rank": (qfx.CalibrationError, "item 0.* number of dimensions 3", {"calibration": [X[0]]}),
    "other size": (QfxError, r"float32\[any, 3, 8, 8\]", {"calibration": [X[..., :7]]}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(net: Net, case: str) -> None:
    kind, text, options = BAD[case]
    with pytest.raises(kind, match=text) as caught:
        qfx.quantize(**{"model": net, "example_inputs": X, "target": "reference", "verbose": False, **options})
    if case != "empty item":  # its text says all
        check(caught.value)


RECIPES: dict[str, tuple[type[QfxError], str, str, Callable[[], qfx.Recipe]]] = {
    "no such layer": (qfx.ConfigError, "", r"matches nothing[\s\S]*'conv'", lambda: recipe.skip("con")),
    "no such op": (qfx.ConfigError, "", r"matches nothing[\s\S]*'linear'", lambda: recipe.skip(op="liner")),
    "no such class": (qfx.ConfigError, "", r"matches nothing[\s\S]*'Conv2d'", lambda: recipe.skip(nn.Conv1d)),
    "layer norm": (qfx.ConfigError, "norm", "LayerNorm stays float", lambda: recipe.set("norm", weight=8)),
    "layer norm by class": (qfx.ConfigError, "norm", "LayerNorm", lambda: recipe.set(nn.LayerNorm, weight=8)),
    "softmax": (qfx.ConfigError, "", "Softmax stays float", lambda: recipe.set(op="softmax", activation=8)),
    "token scales of a convolution": (
        qfx.UnsupportedError,
        "conv",
        "conv2d takes no activations per token",
        lambda: recipe.set("conv", activation=per_token),
    ),
    "groups of a convolution": (
        qfx.UnsupportedError,
        "conv",
        "conv2d takes no weights per group",
        lambda: recipe.set("conv", weight=QuantSpec(INT8, SYMMETRIC, PerGroup(32))),
    ),
    "weight scales along inputs": (
        qfx.UnsupportedError,
        "fc",
        "output channels only",
        lambda: recipe.set("fc", weight=QuantSpec(INT8, SYMMETRIC, PerAxis(1))),
    ),
    "activations per channel": (
        qfx.UnsupportedError,
        "fc",
        "no activations per axis 1",
        lambda: recipe.set("fc", activation=QuantSpec(UINT8, granularity=PerAxis(1))),
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_cannot_be_meant(net: Net, case: str) -> None:
    kind, where, text, make = RECIPES[case]
    with pytest.raises(kind, match=text) as caught:
        qfx.quantize(net, X, recipe=make(), target="reference", verbose=False)
    check(caught.value, where)
    if where:
        assert f"self.{where}(" in line_of(caught.value)
    if case == "softmax":
        assert "y.softmax(1)" in line_of(caught.value)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 32])
def test_bits_out_of_range(bits: int) -> None:
    for make in (
        lambda: IntType(bits, True),
        lambda: recipe.set("fc", weight=bits),
        lambda: recipe.set("fc", activation=bits),
    ):
        with pytest.raises(qfx.ConfigError, match="2 to 8 bits") as caught:
            make()
        check(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: recipe.set("fc", weight="int4"),
        lambda: recipe.set("fc", weight=4.0),
        lambda: recipe.set(weight=4),
        lambda: recipe.skip(),
        lambda: qfx.Recipe.w4a16(0),
        lambda: qfx.Recipe.w8a16().set("fc", activation=8),
        lambda: QuantSpec(INT8, SYMMETRIC, PerToken()),
        lambda: qfx.Recipe.preset("int3"),
    ],
)
def test_recipes_that_cannot_be_written(make: Callable[[], Any]) -> None:
    with pytest.raises(qfx.ConfigError):
        make()


def test_a_model_of_which_nothing_can_be_captured() -> None:
    with pytest.raises(qfx.CaptureError) as caught:
        qfx.quantize(Nothing(), torch.ones(2, 4), verbose=False)
    check(caught.value, source=True)
    assert "if float(x.sum()) > 0" in line_of(caught.value)


def test_the_models_own_error_names_its_line(net: Net) -> None:
    with pytest.raises(qfx.CaptureError, match="Net itself fails on example_inputs") as caught:
        qfx.quantize(net, X[..., :5], verbose=False)
    check(caught.value, source=True)
    assert "self.norm(" in line_of(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("bad", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
def test_bad_values_in_calibration_data_name_where_they_are(net: Net, bad: float, name: str) -> None:
    data = X.clone()
    data[2, 1, 3, 3] = bad
    with pytest.raises(qfx.CalibrationError, match=name) as caught:
        qfx.quantize(net, X, calibration=[X, data], target="reference", verbose=False)
    check(caught.value, "x")


def test_infinity_inside_the_model_names_the_layer() -> None:
    with pytest.raises(qfx.CalibrationError, match="infinity") as caught:
        qfx.quantize(Explodes().eval(), torch.randn(4, 8), target="reference", verbose=False)
    check(caught.value)
    assert caught.value.where, "the layer is named"


# --- the order of the verbs -----------------------------------------------------------------------------------------


def test_a_model_already_quantized(net: Net, qnet: nn.Module) -> None:
    for model, where in ((qnet, ""), (nn.Sequential(nn.Identity(), qnet), "1"), (qfx.prepare(net, X), "")):
        with pytest.raises(qfx.CaptureError, match="already captured or quantized") as caught:
            qfx.quantize(model, X, verbose=False)
        check(caught.value, where)


def test_verbs_out_of_order(net: Net, qnet: nn.Module) -> None:
    with pytest.raises(qfx.CalibrationError, match="PREPARED, not CALIBRATED") as caught:
        qfx.convert(qfx.prepare(net, X, target="reference"))
    check(caught.value)
    for call in (lambda: qfx.calibrate(net, [X]), lambda: qfx.convert(net)):
        with pytest.raises(qfx.ConfigError, match=r"no model that qfx\.prepare returned") as config:
            call()
        check(config.value)
    for call in (lambda: qfx.calibrate(qnet, [X]), lambda: qfx.convert(qnet)):
        with pytest.raises(qfx.ConfigError, match="quantized already") as config:
            call()
        check(config.value)
    for model in (net, qfx.prepare(net, X, target="reference")):
        with pytest.raises(qfx.ConfigError, match="no model that qfx quantized") as config:
            qfx.report(model)
        check(config.value)


@pytest.mark.parametrize("name", ["annotate", "insert-observers", "convert"])
def test_a_pipeline_without_a_stage(name: str) -> None:
    with pytest.raises(qfx.ConfigError, match="needs a graph at stage") as caught:
        qfx.Pipeline.default().without(name)
    check(caught.value)


def test_a_pipeline_without_the_pass() -> None:
    with pytest.raises(qfx.ConfigError, match="no pass 'fuse-conv'") as caught:
        qfx.Pipeline.default().without("fuse-conv")
    assert "fuse-conv-bn" in caught.value.hint


# --- calls of the quantized model -----------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "rank": (r"x should be float32\[any, 3, 8, 8\]; it is float32\[3, 8, 8\]", lambda q: q(X[0])),
    "dtype": (r"float64\[4, 3, 8, 8\][\s\S]*\.to\(torch\.float32\)", lambda q: q(X.double())),
    "image size": (r"float32\[4, 3, 8, 7\][\s\S]*dynamic_shapes=\{'x': \{3:", lambda q: q(X[..., :7])),
    "channels": (r"float32\[4, 1, 8, 8\]", lambda q: q(X[:, :1])),
    "changed constant": ("should be True, which is part of the captured graph; it is False", lambda q: q(X, False)),
    "type of constant": ("flag should be True", lambda q: q(X, flag=1)),
    "nothing": (r"'x' is missing[\s\S]*Net\(x, flag=True\)", lambda q: q()),
    "too much": ("3 positional arguments", lambda q: q(X, True, True)),
    "twice": ("'x' is given twice", lambda q: q(X, x=X)),
    "unknown": ("no argument 'flog'; did you mean 'flag'", lambda q: q(X, flog=True)),
    "no tensor": ("it is a list", lambda q: q([X])),
    "numpy": ("it is a ndarray", lambda q: q(X.numpy())),
    "none": ("it is None", lambda q: q(None)),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_the_graph_was_not_captured_for(qnet: nn.Module, case: str) -> None:
    text, call = CALLS[case]
    with pytest.raises(qfx.CaptureError, match=text) as caught:
        call(qnet)
    check(caught.value)
    assert "Net" in str(caught.value)
    qnet(X)  # and the model is as it was


def test_inputs_that_must_have_one_batch_size() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b)

    qmodel = qfx.quantize(Sum().eval(), (torch.randn(4, 8), torch.randn(4, 8)), target="reference", verbose=False)
    assert qmodel(torch.randn(3, 8), torch.randn(3, 8)).shape == (3, 4)
    with pytest.raises(qfx.CaptureError, match=r"b should be 3 in dimension 0, as a\.shape\[0\]"):
        qmodel(torch.randn(3, 8), torch.randn(2, 8))


# --- errors as values -----------------------------------------------------------------------------------------------


def test_errors_copy_and_pickle_with_their_parts() -> None:
    for kind in (qfx.ConfigError, qfx.CaptureError, qfx.CalibrationError, qfx.PassError, qfx.UnsupportedError):
        error = kind("what", where="layer1.0", source="model.py:3", hint="do that")
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is kind and str(twin) == str(error)
            assert (twin.what, twin.where, twin.source, twin.hint) == ("what", "layer1.0", "model.py:3", "do that")
    assert str(error) == "what [layer layer1.0]\n  at model.py:3\n  way out: do that"


def test_every_error_is_a_qfx_error_and_some_are_pythons() -> None:
    named = [getattr(qfx, name) for name in qfx.__all__ if name.endswith("Error")]
    assert len(named) == 10 and all(issubclass(kind, qfx.QfxError) for kind in named)
    assert issubclass(qfx.ConfigError, ValueError) and issubclass(qfx.CalibrationError, ValueError)
    assert PerTensor() == PerTensor()
