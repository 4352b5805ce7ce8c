"""ExportedPrograms: in torch's quantize and dequantize operators, and of quantized models as they are."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qfx
from qfx import pt2_export
from qfx.errors import ConfigError, UnsupportedError
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL
from qfx.portable import portable
from qfx.recipe import Recipe
from qfx.spec import INT8, UINT8, PerAxis, PerTensor, QConfig, QuantSpec, Scheme
from qfx.structure import flatten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(128, 5)

    def forward(self, image: Tensor, scale: float = 1.0, *, offset: Tensor | None = None) -> dict[str, Tensor]:
        x = self.conv(image).relu().flatten(1)
        return {"logits": self.fc(x) * scale, "hidden": x if offset is None else x + offset}


def net(recipe: str | Recipe, target: str = "reference", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    example = {"image": torch.randn(16, 3, 6, 6), **more}
    return qfx.quantize(Net().eval(), example, recipe=recipe, target=target, verbose=False)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


DYNAMIC = QConfig(
    QuantSpec(UINT8, Scheme.AFFINE, PerTensor(), dynamic=True), QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0))
)
CASES: dict[str, tuple[str | Recipe, set[str]]] = {
    "int8": ("int8", {"quantize_per_tensor.default", "dequantize_per_tensor.default"}),
    "xnnpack": ("xnnpack", {"quantize_per_tensor.default", "dequantize_per_tensor.default"}),
    "few bits": (Recipe.w4a4_lsq(), {"quantize_per_tensor.default", "dequantize_per_tensor.default"}),
    "weights only": ("w8a16", set()),
    "dynamic": (
        Recipe("dynamic", DYNAMIC),
        {"choose_qparams.tensor", "quantize_per_tensor.tensor", "dequantize_per_tensor.tensor"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dialect_computes_the_same(case: str) -> None:
    recipe, expected = CASES[case]
    model = net(recipe)
    program = qfx.export_pt2(model)
    found = operators(program)
    assert not any("qfx" in name for name in found)
    ours = {name.removeprefix("quantized_decomposed.") for name in found if "quantize" in name or "qparams" in name}
    assert ours == {"dequantize_per_channel.default", *expected}
    image = torch.randn(5, 3, 6, 6)  # another batch
    got, want = program.module()(image), portable(model)(image)
    assert got.keys() == want.keys()
    for name in want:
        assert sqnr_db(want[name], got[name]) > (60 if case == "dynamic" else 120)


def test_it_is_called_like_the_model() -> None:
    model = net("int8", offset=torch.randn(128))
    program = qfx.export_pt2(model)
    image, offset = torch.randn(3, 3, 6, 6), torch.randn(128)
    got = program.module()(image, offset=offset)
    assert torch.equal(got["hidden"], portable(model)(image=image, offset=offset)["hidden"])


def test_the_model_is_untouched_and_the_file_loads(tmp_path: Path) -> None:
    model = net("int8", target="x86")
    image = torch.randn(4, 3, 6, 6)
    before = model(image)
    graph = str(portable(model).graph)
    program = qfx.export_pt2(model, tmp_path / "model.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert torch.equal(model(image)["logits"], before["logits"]) and str(portable(model).graph) == graph
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(loaded.module()(image)["logits"], program.module()(image)["logits"])


@pytest.mark.parametrize(
    ("recipe", "what"),
    [(Recipe.w4a16(32), "weights per group of 32"), ("int8_dynamic", "activations per token")],
)
def test_what_has_no_counterpart_is_refused(recipe: str | Recipe, what: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"no words for {what}") as caught:
        qfx.export_pt2(net(recipe), tmp_path / "model.pt2")
    assert caught.value.where == "fc"
    assert not list(tmp_path.iterdir())


def test_a_torch_without_these_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2_export, "REGISTERED_BY", "torch.removed")
    with pytest.raises(ConfigError, match=r"has no torch\.removed, which registers quantized_decomposed"):
        qfx.export_pt2(net("int8"))


def test_float_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="no converted graph"):
        qfx.export_pt2(Net())


def test_qfx_alone_imports_neither_these_nor_onnx() -> None:
    lazy = {pt2_export.REGISTERED_BY, "onnx", "onnxscript", "onnx_ir", "onnxruntime"}
    program = f"import sys, qfx; print({lazy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- torch.export of the quantized model itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "target"), [("int8", "reference"), ("int8", "x86"), ("int8_dynamic", "x86"), ("w4a16", "reference")]
)
def test_torch_export_takes_lowered_models(recipe: str, target: str) -> None:
    model = net(recipe, target)
    image = torch.randn(4, 3, 6, 6)
    program = torch.export.export(model, (image,), dynamic_shapes={"image": {0: Dim.DYNAMIC}})
    content = io.BytesIO()
    torch.export.save(program, content)
    content.seek(0)
    loaded = torch.export.load(content).module()
    image = torch.randn(7, 3, 6, 6)
    for got, want in zip(flatten(loaded(image))[0], flatten(model(image))[0], strict=True):
        assert sqnr_db(want, got) > 35


@pytest.mark.slow
@pytest.mark.parametrize("target", ["reference", "x86"])
@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic", "w4a16"])
@pytest.mark.parametrize("name", MODELS_SMALL)
def test_torch_export_takes_models(name: str, recipe: str, target: str) -> None:
    float_model, example = MODELS_SMALL[name]()
    model = qfx.quantize(float_model, example, recipe=recipe, target=target, verbose=False)
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    args, kwargs = tuple(torch.cat([x, x]) for x in args), {k: torch.cat([x, x]) for k, x in kwargs.items()}
    shapes: Any = {k: {0: Dim.DYNAMIC} for k in kwargs} or tuple({0: Dim.DYNAMIC} for _ in args)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    found, wanted = program.module()(*args, **kwargs), model(*args, **kwargs)
    for got, want in zip(flatten(found)[0], flatten(wanted)[0], strict=True):
        assert sqnr_db(want, got) > 35


@pytest.mark.slow
def test_aot_inductor_compiles_the_reference(tmp_path: Path) -> None:
    model = net("int8")
    image = torch.randn(4, 3, 6, 6)
    program = torch.export.export(model, (image,), dynamic_shapes={"image": {0: Dim.DYNAMIC}})
    inductor: Any = importlib.import_module("torch._inductor")
    package = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    runner = inductor.aoti_load_package(package)
    image = torch.randn(9, 3, 6, 6)
    for got, want in zip(flatten(runner(image))[0], flatten(model(image))[0], strict=True):
        assert sqnr_db(want, got) > 35


@pytest.mark.slow
def test_inductor_finds_integer_kernels_in_the_dialect() -> None:
    """Its patterns take the quantized convolution and linear layer for oneDNN's; freezing is what it needs for that.

    With 7-bit weights, since oneDNN's sums saturate on CPUs without VNNI.
    """
    model = net("openvino")
    image = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    module = qfx.export_pt2(model).module()
    config: Any = importlib.import_module("torch._inductor.config")
    counters: Any = importlib.import_module("torch._dynamo.utils").counters
    counters.clear()
    with config.patch(freezing=True), torch.no_grad():
        got = torch.compile(module)(image)
    assert counters["inductor"]["qconv_weight_prepack_matcher_count"] == 1
    assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] == 1
    assert sqnr_db(portable(model)(image)["logits"], got["logits"]) > 35
