"""ONNX files: what stands in them, and that engines compute from them what ``reference`` computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import onnx_export, optional
from qfx.errors import ConfigError, UnsupportedError
from qfx.interchange import own_copy
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL
from qfx.onnx_graph import Form, Int4, to_onnx_form
from qfx.recipe import Recipe
from qfx.structure import flatten
from qfx.tools.engines import DEFAULT, OnnxRuntime, OpenVino

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    """Convolutions with few channels, a residual sum, pooling, and linear layers on matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(96, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image).relu()
        x = self.third((self.second(x) + x).relu())
        y: Tensor = self.head(self.hidden(self.pool(x).flatten(1)).relu())
        return y


class Pair(nn.Module):
    """A convolution and a linear layer: what one engine is given differently from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.conv(image).relu()
        return {"logits": self.fc(hidden.mean((2, 3))), "hidden": hidden}


class Tokens(nn.Module):
    """An embedding and linear layers on ``[batch, tokens, features]``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, features)
        self.norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, 64)
        self.down = nn.Linear(64, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(self.norm(self.embed(ids)))))
        return y


Made = tuple[nn.Module, Tensor]


def net(recipe: str | Recipe, kind: type[nn.Module] = Net, **options: Any) -> Made:
    torch.manual_seed(0)
    batches = [torch.randn(32, 3, 8, 8)]
    model = qfx.quantize(
        kind().eval(), batches[0][:1], calibration=batches, recipe=recipe, target="reference", verbose=False, **options
    )
    return model, torch.randn(7, 3, 8, 8)


def tokens(recipe: str | Recipe, features: int = 96, dtype: torch.dtype = torch.float32) -> Made:
    torch.manual_seed(0)
    model = Tokens(features).eval().to(dtype)
    ids = torch.randint(0, 50, (1, 12))
    return qfx.quantize(model, ids, recipe=recipe, target="reference", verbose=False), torch.randint(0, 50, (3, 9))


def ragged(recipe: str | Recipe) -> Made:
    return tokens(recipe, features=100)


def widths(**bits: int) -> Recipe:
    recipe = Recipe.int8()
    for layer, width in bits.items():
        recipe = recipe.set(layer, weight=width)
    return recipe


CASES: dict[str, tuple[Any, str | Recipe]] = {
    "int8": (net, "int8"),
    "few bits": (net, replace(widths(first=8, second=6, third=4, hidden=3, head=2), reduce_range=True)),
    "int8_dynamic": (tokens, "int8_dynamic"),
    "w4a16": (ragged, Recipe.w4a16(32).with_embedding_storage(8)),
}


def lsb(wanted: Tensor) -> float:
    """The step of 8 bits around zero over the range of an output."""
    return float(wanted.abs().max()) / 127


def assert_within_one(found: list[Tensor], wanted: Any) -> None:
    for got, want in zip(found, flatten(wanted)[0], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= lsb(want)


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tensor]:
    make, recipe = CASES[request.param]
    model, x = make(recipe)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    qfx.export_onnx(model, path)
    return path, model(x), x


def test_onnx_runtime(exported: tuple[Path, Any, Tensor]) -> None:
    pytest.importorskip("onnxruntime")
    path, wanted, x = exported
    assert_within_one(OnnxRuntime(path)([x]), wanted)


def test_openvino(exported: tuple[Path, Any, Tensor], request: Any) -> None:
    pytest.importorskip("openvino")
    path, wanted, x = exported
    if "w4a16" in request.node.callspec.id:
        pytest.skip("OpenVINO takes no ragged groups: the consumer openvino refuses them")
    assert_within_one(OpenVino(path)([x]), wanted)


def test_the_file_is_valid(exported: tuple[Path, Any, Tensor]) -> None:
    path, _, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if not o.domain] == [21]
    assert {n.domain for n in model.graph.node} == {""}
    assert str(Path(qfx.__file__).parent).encode() not in path.read_bytes()


# --- for one engine ---------------------------------------------------------------------------------------------------


def kinds(path: Path) -> dict[str, set[int]]:
    """Element types of what DequantizeLinear nodes read from initializers, by role."""
    graph = onnx.load(path).graph
    types = {i.name: i.data_type for i in graph.initializer}
    found: dict[str, set[int]] = {"weights": set(), "biases": set()}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in types:
            kind = types[node.input[0]]
            found["biases" if kind == onnx.TensorProto.INT32 else "weights"].add(kind)
    return found


def test_seven_bit_weights_need_no_setting(tmp_path: Path) -> None:
    """On CPUs without VNNI too: two products of uint8 and 7-bit integers fit into int16."""
    pytest.importorskip("onnxruntime")
    model, x = net("openvino", Pair)
    qfx.export_onnx(model, tmp_path / "model.onnx", consumer="openvino")
    assert_within_one(OnnxRuntime(tmp_path / "model.onnx", DEFAULT)([x]), model(x))
    pytest.importorskip("openvino")
    assert_within_one(OpenVino(tmp_path / "model.onnx", DEFAULT)([x]), model(x))


def test_tensorrt_reads_no_zero_points_and_no_integer_biases(tmp_path: Path) -> None:
    model, x = net(Recipe.tensorrt().set("fc", weight=4), Pair)
    path = tmp_path / "model.onnx"
    qfx.export_onnx(model, path, consumer="tensorrt")
    assert kinds(path) == {"weights": {onnx.TensorProto.INT8}, "biases": set()}
    graph = onnx.load(path).graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == "int8" and not zero_point.any()
    pytest.importorskip("onnxruntime")
    assert_within_one(OnnxRuntime(path)([x]), model(x))


@pytest.mark.parametrize(("wanted", "narrow"), [(Int4.ALWAYS, True), (Int4.WEIGHT_ONLY, False), (Int4.GROUPS, False)])
def test_four_bits_beside_integer_data(wanted: Int4, narrow: bool) -> None:
    model, _ = net(widths(fc=4), Pair)
    assert to_onnx_form(own_copy(model), Form(int4=wanted)) == ({"fc.weight": True} if narrow else {})


@pytest.mark.parametrize(("wanted", "narrow"), [(Int4.ALWAYS, True), (Int4.WEIGHT_ONLY, True), (Int4.GROUPS, False)])
def test_four_bits_beside_float_data(wanted: Int4, narrow: bool) -> None:
    model, _ = tokens("w4a16")  # one group a row, which is one scale an output
    assert to_onnx_form(own_copy(model), Form(int4=wanted)) == (
        {"up.weight": True, "down.weight": True} if narrow else {}
    )


def test_four_bits_and_names_and_sizes(tmp_path: Path) -> None:
    """In general 4 bits stay 4 bits; names are the user's, sizes free where they are in the graph."""
    free = torch.export.Dim.AUTO
    model, _ = net(widths(fc=4), Pair, dynamic_shapes={"image": {0: free, 2: free}})
    path = tmp_path / "model.onnx"
    qfx.export_onnx(model, path)
    assert kinds(path) == {
        "weights": {onnx.TensorProto.INT8, onnx.TensorProto.INT4},
        "biases": {onnx.TensorProto.INT32},
    }
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["image"]
    assert [o.name for o in graph.output] == ["logits", "hidden"]
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"image": ["batch", 3, "image_2", 8], "logits": ["batch", 5], "hidden": ["batch", 4, "image_2", 8]}


def test_a_consumer_refuses_and_the_old_file_stays(tmp_path: Path) -> None:
    model, _ = net("int8", Pair)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(UnsupportedError, match="tensorrt rejects"):
        qfx.export_onnx(model, path, consumer="tensorrt")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    model, x = tokens(Recipe.w8a16().with_embedding_storage(4))
    qfx.export_onnx(model, tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    pytest.importorskip("onnxruntime")
    assert_within_one(OnnxRuntime(tmp_path / "model.onnx")([x]), model(x))


@pytest.mark.slow
def test_half_precision_is_dequantized_in_float32(tmp_path: Path) -> None:
    model, _ = tokens("w8a16", dtype=torch.bfloat16)
    qfx.export_onnx(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    made = {o: n for n in graph.node for o in n.output}
    product = next(n for n in graph.node if n.op_type == "MatMul")
    cast = made[product.input[1]]
    assert cast.op_type == "Cast"
    assert {a.name: a.i for a in cast.attribute}["to"] == onnx.TensorProto.BFLOAT16
    assert made[cast.input[0]].op_type == "DequantizeLinear"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_old_opsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="opset 20"):
        qfx.export_onnx(Net(), tmp_path / "model.onnx", opset=20)


def test_unknown_consumers_and_float_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no consumer 'onnx'"):
        qfx.export_onnx(Net(), tmp_path / "model.onnx", consumer="onnx")
    with pytest.raises(ConfigError, match="no converted graph"):
        qfx.export_onnx(Net(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match="needs onnxscript, which") as caught:
        qfx.export_onnx(Net(), tmp_path / "model.onnx")
    assert "pip install 'qfx[onnx]'" in caught.value.hint


def test_an_operator_without_a_word_in_onnx(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.fc(x))

    model = qfx.quantize(Odd().eval(), torch.randn(4, 4), verbose=False)
    with pytest.raises(UnsupportedError, match=r"ONNX exporter cannot write .*bessel_j0"):
        qfx.export_onnx(model, tmp_path / "model.onnx")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "openvino", "int8_dynamic", "w8a16", "w4a16"])
@pytest.mark.parametrize("name", MODELS_SMALL)
def test_models(name: str, recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    make, example = MODELS_SMALL[name]()
    model = qfx.quantize(make, example, recipe=recipe, target="reference", verbose=False)
    qfx.export_onnx(model, tmp_path / "model.onnx")
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    args, kwargs = tuple(torch.cat([x, x.flip(-1)]) for x in args), {k: torch.cat([x, x]) for k, x in kwargs.items()}
    found = OnnxRuntime(tmp_path / "model.onnx")([*args, *kwargs.values()])
    for got, want in zip(found, flatten(model(*args, **kwargs))[0], strict=True):
        assert sqnr_db(want, got) > 35
