"""Saving and loading: what comes back, what is refused, and that a file cannot do harm."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.artifact_file import SCHEMA
from qfx.calling import FAMILY
from qfx.errors import ArtifactError, CaptureError, ConfigError, UnsupportedError
from qfx.graph_module import CapturedModule
from qfx.meta import graph_info, value
from qfx.models import MODELS_SMALL
from qfx.portable import portable
from qfx.structure import ClassMissingWarning

from .artifact_edits import Parts, SmallNet, mutated, node, sealed

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

MIXED = qfx.Recipe.int8().set("linear", weight=4)


def _leaves(result: Any) -> list[Tensor]:
    values = list(result.values()) if isinstance(result, dict) else [result]
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _call(model: nn.Module, example: Any) -> list[Tensor]:
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    with torch.no_grad():
        return _leaves(model(*args, **(example if isinstance(example, dict) else {})))


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small(x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return qfx.quantize(SmallNet().eval(), x, recipe=MIXED, verbose=False)


@pytest.fixture(scope="module")
def file(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    qfx.save(small, path)
    return path


@pytest.fixture
def refused(file: Path, tmp_path: Path) -> Callable[..., ArtifactError]:
    """The error that loading an edited file raises."""

    def load(edit: Callable[[dict[str, Any]], object] | None = None, content: bytes = b"") -> ArtifactError:
        path = tmp_path / "edited.safetensors"
        path.write_bytes(Parts.of(file).edited(edit) if edit is not None else content)
        with pytest.raises(ArtifactError) as caught:
            qfx.load(path)
        assert caught.value.source == str(path)
        return caught.value

    return load


# --- there and back ---------------------------------------------------------------------------------------------------

FAST = {
    *(("resnet20", "int8"), ("bert_small", "int8"), ("vit_s16", "w4a4_lsq")),
    *(("llama", "int8_dynamic"), ("llama", "w4a16")),
}
CASES = [
    pytest.param(name, recipe, marks=() if (name, recipe) in FAST else pytest.mark.slow)
    for name in MODELS_SMALL
    for recipe in ("int8", "int8_dynamic", "w8a16", "w4a16", "w4a4_lsq")
]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_same_numbers_report_and_bytes_come_back(name: str, recipe: str, tmp_path: Path) -> None:
    model, example = MODELS_SMALL[name](seed=0)
    qmodel = qfx.quantize(model, example, recipe=recipe, verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    loaded = qfx.load(tmp_path / "a")
    assert _same(_call(qmodel, example), _call(loaded, example))
    assert dataclasses.replace(qfx.report(qmodel), allocation=None) == qfx.report(loaded)
    assert set(qmodel.state_dict()) == set(loaded.state_dict())
    qfx.save(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_widths_from_two_to_six_bits_come_back(x: Tensor, tmp_path: Path) -> None:
    convs = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))).eval()
    recipe = qfx.Recipe.int8()
    for i, (weight, activation) in enumerate([(2, 8), (3, 6), (4, 4), (6, 3)]):
        recipe = recipe.set(str(i), weight=weight, activation=activation)
    qmodel = qfx.quantize(convs, x, recipe=recipe, verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    loaded = qfx.load(tmp_path / "a")
    assert _same(_call(qmodel, x), _call(loaded, x))
    assert [row.weight_bits for row in qfx.report(loaded).rows] == [2, 3, 4, 6]
    assert graph_info(loaded).asked == recipe


HALF = qfx.Recipe.w4a16(32, scale_dtype=torch.float16)


def _scales(qmodel: nn.Module) -> list[Tensor]:
    """Those of the weights in groups."""
    found = {n: t for n, t in portable(qmodel).named_buffers() if n.endswith("_scale") and t.ndim == 2}
    assert found
    return list(found.values())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """An Llama-style model whose scales are float16 values, and its file."""
    model, example = MODELS_SMALL["llama"](seed=0)
    qmodel, file = qfx.quantize(model, example, recipe=HALF, verbose=False), tmp_path_factory.mktemp("half") / "a"
    qfx.save(qmodel, file)
    return qmodel, file


def test_float16_scales_are_stored_in_two_bytes(half: tuple[nn.Module, Path], tmp_path: Path) -> None:
    (qmodel, file), (model, example) = half, MODELS_SMALL["llama"](seed=0)
    loaded = qfx.load(file)
    assert _same(_call(qmodel, example), _call(loaded, example))
    assert graph_info(loaded).asked == HALF
    for scale in (*_scales(qmodel), *_scales(loaded)):
        assert scale.dtype is torch.float32 and torch.equal(scale.half().float(), scale)
    stored = [line for line in Parts.of(file).document["tensors"].values() if "stored" in line]
    assert len(stored) == len(_scales(qmodel))
    assert all(line["dtype"] == "float32" and line["stored"] == "float16" for line in stored)
    for name, again in (("loaded", loaded), ("pickled", pickle.loads(pickle.dumps(qmodel)))):
        qfx.save(again, tmp_path / name)
        assert (tmp_path / name).read_bytes() == file.read_bytes()
    wide = qfx.quantize(model, example, recipe=qfx.Recipe.w4a16(32), verbose=False)
    qfx.save(wide, tmp_path / "wide")
    assert not any("stored" in line for line in Parts.of(tmp_path / "wide").document["tensors"].values())
    saved, count = os.path.getsize(tmp_path / "wide") - os.path.getsize(file), sum(t.numel() for t in _scales(wide))
    assert count < saved <= 2 * count, "two bytes a scale, less the words that say so"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stored": "float32"}, "is torch.float16, not float32"),
        ({"dtype": "float16", "stored": "float16"}, "its scale is"),
        ({"dtype": "float64"}, "cannot be 'float64' that is stored as 'float16'"),
        ({"stored": "bfloat16"}, "cannot be 'float32' that is stored as 'bfloat16'"),
        ({"stored": "quint8"}, "cannot be 'float32' that is stored as 'quint8'"),
        ({"stored": 2}, "should be a string"),
    ],
    ids=str,
)
def test_only_float16_may_stand_for_float32(
    half: tuple[nn.Module, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parts = Parts.of(half[1])
    name = next(name for name, line in parts.document["tensors"].items() if "stored" in line)
    (tmp_path / "edited").write_bytes(parts.edited(_tensor(name, **changes)))
    with pytest.raises(ArtifactError, match=message):
        qfx.load(tmp_path / "edited")


def test_it_is_lowered_for_the_target_that_is_asked_for(small: nn.Module, file: Path, x: Tensor) -> None:
    reference = qfx.load(file, target="reference")
    assert qfx.report(reference).target == "reference"
    assert {row.kernel for row in qfx.report(reference).rows} != {row.kernel for row in qfx.report(small).rows}
    for a, b in zip(_call(reference, x), _call(small, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    with pytest.raises(ConfigError, match="no target"):
        qfx.load(file, target="abacus")
    with pytest.raises(ConfigError, match="no device"):
        qfx.load(file, device="cuda:77")


def test_two_models_are_saved_as_the_same_bytes(x: Tensor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(0)
        qfx.save(qfx.quantize(SmallNet().eval(), x, recipe=MIXED, verbose=False), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_copies_and_pickles_are_saved_as_the_same_bytes(small: nn.Module, file: Path, tmp_path: Path) -> None:
    others = [copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.deepcopy(qfx.load(file))]
    for other in others:
        qfx.save(other, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_it_is_called_like_the_model_and_refuses_what_that_refuses(file: Path, x: Tensor) -> None:
    loaded = qfx.load(file)
    assert not loaded.training and isinstance(loaded, CapturedModule) and type(loaded).__name__ == "SmallNet"
    assert set(loaded(x[:2], scale=1.0)) == {"out", "parts"}
    for wrong, message in ((x.double(), "float32"), (x[0], "capture again"), (x[:, :2], r"\[any, 3, 6, 6\]")):
        with pytest.raises(CaptureError, match=message):
            loaded(wrong)
    with pytest.raises(CaptureError, match="part of the captured graph"):
        loaded(x, scale=2.0)
    with pytest.raises(UnsupportedError, match="no gradient"):
        loaded(x.clone().requires_grad_())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_model_of_floats_and_integers_lets_gradients_through_as_before(tmp_path: Path) -> None:
    qmodel = qfx.quantize(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8), recipe="w8a16", verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    x = torch.randn(2, 8, requires_grad=True)
    qfx.load(tmp_path / "a")(x).sum().backward()
    assert x.grad is not None


def test_a_graph_that_was_not_lowered_is_lowered_when_it_is_loaded(x: Tensor, tmp_path: Path) -> None:
    pipeline = qfx.Pipeline.default().without("lower").without("reuse-memory")
    qmodel = qfx.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), x, pipeline=pipeline, verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    assert qfx.report(qfx.load(tmp_path / "a")).quantized == 1


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32)
            self.out = nn.Linear(32, 50, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    recipe = qfx.Recipe.int8().skip("out").skip("table")
    qmodel = qfx.quantize(Tied().eval(), torch.randint(0, 50, (2, 4)), recipe=recipe, verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    loaded = qfx.load(tmp_path / "a")
    names = dict(loaded.named_parameters(remove_duplicate=False))
    assert names["table.weight"] is names["out.weight"]
    assert set(loaded.state_dict()) == set(qmodel.state_dict())
    assert os.path.getsize(tmp_path / "a") < 2 * 50 * 32 * 4


def test_tensors_keep_their_strides(tmp_path: Path) -> None:
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    recipe = qfx.Recipe.int8().skip("0")
    images = torch.randn(2, 8, 6, 6)
    qmodel = qfx.quantize(nn.Sequential(conv, nn.Conv2d(8, 4, 3)).eval(), images, recipe=recipe, verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    loaded = qfx.load(tmp_path / "a")
    assert loaded.state_dict()["0.weight"].stride() == conv.weight.stride()
    assert _same(_call(loaded, images), _call(qmodel, images))


def test_plain_attributes_of_the_model_come_along(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8)).eval()
    net.num_labels, net.kept = 7, {"a": (1, None)}
    qfx.save(qfx.quantize(net, torch.randn(2, 8), verbose=False), tmp_path / "a")
    assert qfx.load(tmp_path / "a").num_labels == 7


def test_the_loaded_graphs_hold_no_tensors_without_data(file: Path) -> None:
    loaded = qfx.load(file)
    assert all(value(n) is None for gm in (loaded, portable(loaded)) for n in gm.graph.nodes)


def test_weights_are_mapped_and_writing_to_them_leaves_the_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(file.read_bytes())
    loaded = qfx.load(path)
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in _maps() if str(path) in line]
    weight = loaded.state_dict()["conv.weight"]
    assert any(low <= weight.data_ptr() < high for low, high in spans)
    weight.zero_()
    assert path.read_bytes() == file.read_bytes()


def _maps() -> list[str]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("reads /proc, which Linux has")
    return maps.read_text().splitlines()


# --- where the model's code is missing --------------------------------------------------------------------------------


def test_a_process_without_the_models_class_loads_it(file: Path, small: nn.Module, x: Tensor, tmp_path: Path) -> None:
    torch.save(x, tmp_path / "x")
    program = f"""
        import sys, torch, qfx
        model = qfx.load({str(file)!r})
        with torch.no_grad():
            result = model(torch.load({str(tmp_path / "x")!r}))
        assert {SmallNet.__module__!r} not in sys.modules and "SmallNet" in str(qfx.report(model).model)
        torch.save((result["out"], result["parts"][0]), {str(tmp_path / "y")!r})
        qfx.save(model, {str(tmp_path / "again")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _same(list(torch.load(tmp_path / "y")), _call(small, x))
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


@dataclasses.dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of Hugging Face: a dict and a dataclass."""

    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)


@dataclasses.dataclass
class Plain:
    logits: Tensor
    other: Tensor


class _Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


@pytest.mark.parametrize("kind", [Output, Plain])
def test_results_come_back_as_their_class_where_its_module_is_imported_else_as_a_dict(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = _Returns(lambda y: kind(y, y + 1)).eval()
    qmodel = qfx.quantize(net, torch.randn(2, 8), verbose=False)
    qfx.save(qmodel, tmp_path / "a")
    x = torch.randn(2, 8)
    result = qfx.load(tmp_path / "a")(x)
    assert type(result) is kind and torch.equal(result.logits, qmodel(x).logits)
    monkeypatch.delitem(sys.modules, kind.__module__)
    with pytest.warns(ClassMissingWarning, match="not imported"):
        loaded = qfx.load(tmp_path / "a")
    assert type(loaded(x)) is dict and torch.equal(loaded(x)["logits"], result.logits)
    assert kind.__module__ not in sys.modules
    qfx.save(loaded, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["subprocess:Popen", "os:system", "pathlib:Path", "qfx.spec:IntType"])
@pytest.mark.parametrize("kind", list(FAMILY))
def test_a_class_that_a_file_names_is_not_built(
    name: str, kind: str, file: Path, tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("a class of the file was built"))

    def edit(document: dict[str, Any]) -> None:
        document["call"]["result"] |= {"class": name, "kind": kind}

    (tmp_path / "a").write_bytes(Parts.of(file).edited(edit))
    assert type(qfx.load(tmp_path / "a")(x)) in (dict, tuple, list)


# --- what cannot be saved ---------------------------------------------------------------------------------------------


def test_what_was_not_quantized_is_refused(tmp_path: Path) -> None:
    for model in (SmallNet(), qfx.prepare(SmallNet().eval(), torch.randn(2, 3, 6, 6))):
        with pytest.raises(ArtifactError, match="no quantized model"):
            qfx.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_captured_in_parts_is_refused(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y if y.sum() > 0 else -y

    qmodel = qfx.quantize(Branches().eval(), torch.randn(2, 8), verbose=False)
    with pytest.raises(ArtifactError, match="not one graph") as caught:
        qfx.save(qmodel, tmp_path / "a")
    assert "test_artifact.py" in caught.value.what


def test_buffers_that_were_changed_since_are_noticed(small: nn.Module, tmp_path: Path) -> None:
    changed = copy.deepcopy(small)
    state = {k: v + 1 if v.dtype is torch.float32 else v for k, v in changed.state_dict().items()}
    changed.load_state_dict(state)
    with pytest.raises(ArtifactError, match="load_state_dict") as caught:
        qfx.save(changed, tmp_path / "a")
    assert "quantize" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_its_own_state_is_no_change(small: nn.Module, tmp_path: Path) -> None:
    same = copy.deepcopy(small)
    same.load_state_dict(small.state_dict())
    qfx.save(same, tmp_path / "a")


def test_an_operator_outside_the_list_is_named_with_its_layer(tmp_path: Path) -> None:
    library = torch.library.Library("artifact_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    net = _Returns(torch.ops.artifact_test.twice).eval()
    qmodel = qfx.quantize(nn.Sequential(OrderedDict(inner=net)), torch.randn(2, 8), verbose=False)
    with pytest.raises(ArtifactError, match="node twice: the operator artifact_test") as caught:
        qfx.save(qmodel, tmp_path / "a")
    assert caught.value.where == "inner"


def test_an_object_among_the_arguments_is_named(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, how: Any = None) -> Tensor:
            return self.linear(x)

    qmodel = qfx.quantize(Takes().eval(), (torch.randn(2, 8), Path), verbose=False)
    with pytest.raises(ArtifactError, match=r"\['how'\].*Path"):
        qfx.save(qmodel, tmp_path / "a")


def test_a_save_that_fails_or_is_killed_leaves_the_old_file(
    small: nn.Module, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    for where in ("qfx.artifact_file.save_file", "qfx.artifact_file._digest", "os.replace", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(where, _fail)
            with pytest.raises(KeyboardInterrupt):
                qfx.save(small, path)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    qfx.save(small, path)
    assert path.read_bytes() == file.read_bytes()


def _fail(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_paths_that_cannot_be_written_or_read_say_so(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        qfx.save(small, tmp_path / "nowhere" / "model")
    with pytest.raises(FileNotFoundError, match="absent"):
        qfx.load(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="no file"):
        qfx.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="no file"):
        qfx.load(tmp_path / "pipe")


# --- files that are not as they should be -----------------------------------------------------------------------------


def test_damage_is_noticed_wherever_it_is(file: Path, refused: Callable[..., ArtifactError]) -> None:
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 1
        refused(content=bytes(damaged))
    for end in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        assert "safetensors" in refused(content=content[:end]).what
    refused(content=content + b"\0")


def test_other_files_are_no_artifacts(refused: Callable[..., ArtifactError], tmp_path: Path) -> None:
    from safetensors.torch import save

    assert "holds no qfx model" in refused(content=save({"a": torch.ones(2)})).what
    torch.save({"a": 1}, tmp_path / "pickle")
    assert "safetensors" in refused(content=(tmp_path / "pickle").read_bytes()).what
    refused(content=(2**63).to_bytes(8, "little") + b"{}")


def test_newer_and_older_schemas_are_told(refused: Callable[..., ArtifactError]) -> None:
    assert "newer qfx" in refused(lambda d: d.update(schema=SCHEMA + 1)).hint
    assert "save the model again" in refused(lambda d: d.update(schema=0)).hint


TEXTS = ["[" * 100_000, '{"schema":1e999}', '{"schema":NaN}', '{"schema":1,"schema":1}', "7", '"']


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_document_is_refused(text: str, file: Path, refused: Callable[..., ArtifactError]) -> None:
    refused(content=Parts.of(file).written(text=text))


def _tensor(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["tensors"][name].update(changes)


def _node(which: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: node(d, which).update(changes)


def _argument(name: str, position: int, to: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: node(d, name)["args"].__setitem__(position, to)


INJECTION = '"];import os;os._exit(3)#'
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown operator": (_node("conv2d", target="aten::from_file"), "not one that a file may name"),
    "an operator that writes": (_node("relu", target="aten::set_.source_Tensor"), "not one that a file may name"),
    "an operator of Python": (_node("relu", target="builtins::eval"), "not one that a file may name"),
    "a node with code in its name": (_node("relu", name="relu=1;import os#"), "identifiers"),
    "a node called like what code uses": (_node("relu", name="_bind_call"), "identifiers"),
    "an input with code in its name": (_node("x", target="x:__import__('os')"), "identifiers"),
    "a tensor with code in its path": (_node("conv_weight_1", target=f"conv{INJECTION}"), "paths are words"),
    "a tensor that is an attribute": (_node("conv_weight_1", target="conv.__class__"), "paths are words"),
    "a layer with code in its path": (_node("conv2d", origin=f"conv{INJECTION}"), "paths are words"),
    "a keyword with code in it": (_node("relu", kwargs={"a=1);print(": 1}), "no argument"),
    "a size with code in it": (
        lambda d: d["call"]["tensors"][0]["sizes"].__setitem__(0, "__import__('os')"), "a size cannot be"
    ),
    "a size that takes forever": (lambda d: d["call"]["tensors"][0]["sizes"].__setitem__(0, "9**9**9"), "a size"),
    "a parameter with code in its name": (lambda d: d["call"]["parameters"][0].update(name="x=f()"), "parameter"),
    "a model with code in its name": (lambda d: d["report"].update(model="A():pass"), "identifiers"),
    "an attribute of every module": (lambda d: d["attributes"].update(forward=1), "attribute"),
    "an argument of another type": (_argument("flatten", 1, {"dtype": "int8"}), "is a dtype, not int"),
    "an argument too many": (lambda d: node(d, "relu")["args"].append(1), "refuses its arguments"),
    "a stride that is none": (_node("conv2d", kwargs={"stride": [0, 0]}), "refuses its arguments"),
    "an axis that is none": (_argument("x_quantize", 3, 7), "axis 7"),
    "a range that is none": (_argument("x_quantize", 5, 300), "range"),
    "another type of integers": (_argument("x_quantize", 7, {"dtype": "int64"}), "quantizes to"),
    "a scale that is no scale": (_argument("relu_quantize", 1, {"node": "conv_weight_1"}), "its scale is"),
    "bits that are none": (_argument("unpack_default", 1, 9), "unpacks"),
    "more integers than there are": (_argument("unpack_default", 3, 70), "do not fill"),
    "a node that comes later": (_argument("relu", 0, {"node": "output"}), "no node before"),
    "a missing tensor": (lambda d: d["tensors"].pop("conv.weight"), "does not name"),
    "another dtype": (_tensor("conv.weight", dtype="float32"), "not float32"),
    "a dtype that is none": (_tensor("conv.weight", dtype="quint8"), "not quint8"),
    "a tensor without end": (_tensor("x_zero_point", fill=0, shape=[2**40]), "far more"),
    "a zero point out of range": (lambda d: d["tensors"]["conv_weight_zero_point"].update(fill=1000), "zero point"),
    "a tensor that is tied to itself": (lambda d: d["tensors"].update({"conv.weight": {"of": "conv.weight"}}), "same"),
    "an example without end": (
        lambda d: d["call"]["examples"].update(dict.fromkeys(d["call"]["examples"], 2**62)), "absurd"
    ),
    "a deep argument": (_argument("relu", 0, json.loads("[" * 500 + "]" * 500)), "nested"),
    "a deep result": (
        lambda d: d["call"].update(result=json.loads('{"kind":"list","class":"","children":[' * 50 + "]}" * 50)),
        "nested",
    ),
    "a recipe that is none": (lambda d: d.update(recipe="version = 1"), "recipe cannot be read"),
    "rows of two lengths": (lambda d: d["report"]["rows"]["name"].pop(), "several lengths"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_saved_model_says_is_refused(what: str, refused: Callable[..., ArtifactError]) -> None:
    edit, message = HOSTILE[what]
    error = refused(edit)
    assert re.search(message, str(error)), str(error)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_positive_and_finite(scale: float, file: Path, refused: Callable[..., ArtifactError]) -> None:
    parts = Parts.of(file)
    start, end = parts.table["x_scale"]["data_offsets"]
    bits = torch.tensor([scale]).numpy().tobytes()
    tensors = parts.tensors[:start] + bits + parts.tensors[end:]
    assert "positive and finite" in refused(content=Parts(parts.document, parts.table, tensors).written()).what


def _chain(count: int, target: str, make: Callable[[str], list[Any]], start: str) -> Callable[[dict[str, Any]], object]:
    """Put ``count`` calls behind the node ``start``, one behind the other."""

    def edit(document: dict[str, Any]) -> None:
        place = document["nodes"].index(node(document, start)) + 1
        names = [start, *(f"more_{i}" for i in range(count))]
        document["nodes"][place:place] = [
            {"op": "call_function", "name": new, "target": target, "args": make(old)}
            for old, new in pairwise(names)
        ]
        reader = next(n for n in document["nodes"] if n["name"].endswith("x_quantize"))
        if start == "x_scale":
            reader["args"][1] = {"node": names[-1]}

    return edit


def test_a_constant_that_takes_forever_is_refused(refused: Callable[..., ArtifactError]) -> None:
    error = refused(_chain(60, "aten::add.Tensor", lambda n: [{"node": n}, {"node": n}], "x_scale"))
    assert "too many operators" in error.what


def test_a_constant_that_grows_without_end_is_refused(refused: Callable[..., ArtifactError]) -> None:
    error = refused(_chain(1, "aten::expand", lambda n: [{"node": n}, [2**30]], "x_scale"))
    assert "far more than the file holds" in error.what


def test_an_operator_with_endless_results_is_refused(refused: Callable[..., ArtifactError]) -> None:
    def edit(document: dict[str, Any]) -> None:
        _chain(1, "aten::expand", lambda n: [{"node": n}, [2**30, 4, 3, 6, 6]], "x")(document)
        place = document["nodes"].index(node(document, "more_0")) + 1
        call = {"op": "call_function", "name": "rows", "target": "aten::unbind.int", "args": [{"node": "more_0"}]}
        document["nodes"].insert(place, call)

    assert "would make" in refused(edit).what


def test_parts_that_come_together_many_times_take_no_longer(file: Path, tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        calls, last = [], "flatten"
        for i in range(40):
            both, half = f"both_{i}", f"half_{i}"
            twice, part = [[{"node": last}] * 2, 1], [{"node": both}, 1, 0, 64]
            more = (both, "aten::cat", twice), (half, "aten::slice.Tensor", part)
            calls += [{"op": "call_function", "name": n, "target": t, "args": args} for n, t, args in more]
            last = half
        place = document["nodes"].index(node(document, "flatten")) + 1
        document["nodes"][place:place] = calls
        node(document, "flatten_quantize")["args"][0] = {"node": last}

    (tmp_path / "a").write_bytes(Parts.of(file).edited(edit))
    qfx.load(tmp_path / "a")


# --- at random --------------------------------------------------------------------------------------------------------


def _survives(file: Path, folder: Path, x: Tensor, seeds: range) -> tuple[int, int]:
    """Load mutants of the file; returns how many were loaded and refused."""
    content, parts = file.read_bytes(), Parts.of(file)
    assert sealed(content) == content
    loaded = refused = 0
    for seed in seeds:
        path = folder / f"{seed}"
        path.write_bytes(mutated(content, parts, seed))
        try:
            model = qfx.load(path)
        except ArtifactError:
            refused += 1
        else:
            loaded += 1
            with suppress(CaptureError, RuntimeError, IndexError):  # another model, and one that x does not fit
                model(x)
        path.unlink()
    return loaded, refused


def test_mutants_load_or_are_refused(file: Path, tmp_path: Path, x: Tensor) -> None:
    loaded, refused = _survives(file, tmp_path, x, range(60))
    assert loaded > 3 and refused > 30


@pytest.mark.slow
def test_500_mutants_load_or_are_refused(file: Path, tmp_path: Path, x: Tensor) -> None:
    loaded, refused = _survives(file, tmp_path, x, range(1000, 1500))
    assert loaded > 25 and refused > 250
