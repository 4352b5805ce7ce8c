"""``qfx-dump``: what its arguments mean, what it writes where, and what it refuses."""

from __future__ import annotations

import gc
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qfx
from qfx.artifact import save
from qfx.models import MODELS_SMALL
from qfx.tools.dump import ROWS, calibration_of, example_of, main, recipe_of, subject


class Tiny(nn.Linear):
    """A linear layer, called with one tensor."""

    def __init__(self) -> None:
        super().__init__(4, 3)


def with_example() -> tuple[nn.Module, torch.Tensor]:
    return Tiny().eval(), torch.randn(2, 4)


def without_example() -> nn.Module:
    return Tiny().eval()


def fails() -> nn.Module:
    raise RuntimeError("no weights here")


def no_model() -> int:
    return 3


ready = Tiny().eval()
number = 3


@pytest.fixture(autouse=True)
def _this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factories above under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "factories", sys.modules[__name__])


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main([*argv, "--target", "reference"])
    return status, *capsys.readouterr()


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_reference_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "resnet20", "--small")
    assert status == 0 and out.startswith("operator ") and "multiply-accumulates in integer  100.0%" in out
    told = err.splitlines()
    assert told[0].startswith("warning: target reference: ") and told[1].startswith("warning: ranges come from 1 ")


def test_everything_about_a_model_of_mine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    status, out, err = run(
        capsys, "factories:with_example", "--format", "json", "--stages", "fused,lowered", "--diff", "fused..lowered",
        "--why", "linear", "--pass-by-pass", "--bisect", "10", "--calibration", "32", "--output", str(path),
    )  # fmt: skip
    assert (status, out, err.count("warning: ")) == (0, "", 1), "the target's only: there are data enough"
    made = json.loads(path.read_text())
    assert [s["stage"] for s in made["stages"]] == ["fused", "lowered"] and made["model"] == "Tiny"
    assert made["why"][0]["name"] == "linear" and made["diff"][0]["hunks"] and made["bisection"]["bound"] == 10.0
    assert made["measured"] is True and list(tmp_path.iterdir()) == [path]


def test_a_saved_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, example = with_example()
    path = tmp_path / "tiny.qfx"
    save(qfx.quantize(model, example, target="reference", verbose=False), path)
    status, out, _ = run(capsys, str(path), "--format", "text", "--stages", "converted", "--no-measure")
    assert status == 0 and "%linear: f32[*, 3] = linear(%input_1_dequantize, " in out
    status, _, err = run(capsys, str(path), "--stages", "fused")
    assert status == 2 and err.startswith("error: this model has no stage 'fused'") and "Traceback" not in err
    status, _, err = run(capsys, str(path), "--recipe", "w8a16")
    assert status == 2 and "is quantized already: it takes no recipe" in err


def test_a_file_is_whole_or_as_it_was(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    assert run(capsys, "factories:with_example", "--why", "nothing", "--output", str(path))[0] == 2
    assert path.read_text() == "old"
    status, _, err = run(capsys, "factories:with_example", "--output", str(tmp_path / "no" / "out.txt"))
    assert status == 2 and err.startswith("error: ") and "No such file" in err


def test_the_script_is_declared() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("pyproject.toml is not here")
    assert tomllib.loads(project.read_text())["project"]["scripts"]["qfx-dump"] == "qfx.tools.dump:main"


# --- what arguments mean ----------------------------------------------------------------------------------------------


def test_subjects() -> None:
    model, example = subject("bert_base", [], small=True)
    assert isinstance(model, nn.Module) and list(example) == list(MODELS_SMALL["bert_base"]()[1])
    model, example = subject("factories:without_example", ["f32[5,4]"])
    assert isinstance(model, Tiny) and example[0].shape == (5, 4)
    assert subject("factories:ready", ["f32[5,4]"])[0] is ready
    assert subject("factories:with_example", ["f32[7,4]"])[1][0].shape == (7, 4), "--input goes before the factory's"
    assert subject("some.qfx", []) == (Path("some.qfx"), None)


def test_inputs() -> None:
    assert example_of([]) is None
    found = example_of(["f32[2, 3]", "i64[4]<10", "bool[2]", "bf16[]"])
    assert isinstance(found, tuple)
    assert [(t.dtype, tuple(t.shape)) for t in found] == [
        (torch.float32, (2, 3)),
        (torch.int64, (4,)),
        (torch.bool, (2,)),
        (torch.bfloat16, ()),
    ]
    assert int(found[1].max()) < 10
    again = example_of(["f32[2,3]"])
    assert again is not None and torch.equal(again[0], found[0])  # type: ignore[index]
    named = example_of(["ids=i64[1,4]<9", "mask=i64[1,4]"])
    assert isinstance(named, dict) and list(named) == ["ids", "mask"]


def test_random_calibration_keeps_tokens_and_masks() -> None:
    example = {"ids": torch.tensor([[3, 9, 4]]), "x": torch.zeros(1, 2), "mask": torch.tensor([[True, True, True]])}
    batches = calibration_of("3", example)
    assert len(batches) == 3 and all(b["mask"].all() for b in batches)
    assert {int(i) for b in batches for i in b["ids"].flatten()} <= {3, 9, 4}
    assert not torch.equal(batches[0]["x"], batches[1]["x"])
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(batches, calibration_of("3", example), strict=True))


def test_calibration_from_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "data.npz")
    np.savez(path, x=np.ones((ROWS + 4, 4), np.float32), labels=np.zeros(ROWS + 4))
    batches = calibration_of(path, torch.zeros(1, 4))
    assert [len(b[0]) for b in batches] == [ROWS, 4] and all(len(b) == 1 for b in batches), "labels are left out"
    assert list(calibration_of(path, {"x": torch.zeros(1, 4)})[0]) == ["x"]
    with pytest.raises(qfx.ConfigError, match=r"has the arrays .* the example has \['y'\]"):
        calibration_of(path, {"y": torch.zeros(1, 4)})
    with pytest.raises(qfx.ConfigError, match="has 2 arrays, the example has 3 inputs"):
        calibration_of(path, (torch.zeros(1),) * 3)
    np.savez(path, x=np.ones((2, 4)), y=np.ones((3, 4)))
    with pytest.raises(qfx.ConfigError, match=r"have \[2, 3\] rows"):
        calibration_of(path, torch.zeros(1, 4))


def test_recipes(tmp_path: Path) -> None:
    assert recipe_of("w8a16") == "w8a16"
    recipe = qfx.Recipe.int8().skip("head")
    recipe.save(tmp_path / "mine.toml")
    assert recipe_of(str(tmp_path / "mine.toml")) == recipe


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resnet19"], "no reference model and no file 'resnet19'"),
        (["resnet19"], "'resnet18'"),
        (["nope", "--small"], "no reference model 'nope'"),
        (["none.qfx"], "No such file"),
        (["no_such_module:f"], "'no_such_module' cannot be imported: ModuleNotFoundError"),
        (["factories:with_exampel"], "'with_example'"),
        (["factories:number"], "factories:number is a int"),
        (["factories:no_model"], "returns a int"),
        (["factories:fails"], "factories:fails failed: RuntimeError: no weights here"),
        (["factories:without_example"], "gives no example inputs"),
        (["factories:without_example", "--input", "f32[2,"], "'f32[2,' describes no input"),
        (["factories:without_example", "--input", "q32[2]"], "'q32[2]' describes no input"),
        (["factories:without_example", "--input", "x=f32[2,4]", "--input", "f32[2]"], "by a name of its own"),
        (["factories:with_example", "--calibration", "none.npz"], "none.npz cannot be read"),
        (["factories:with_example", "--calibration", "0"], "'0' is no calibration"),
        (["factories:with_example", "--recipe", "int9"], "no recipe 'int9'"),
        (["factories:with_example", "--recipe", "none.toml"], "none.toml"),
        (["factories:with_example", "--format", "svg"], "no format 'svg'"),
    ],
)
def test_refusals_are_words(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and err.startswith("error: ") and words in err and "Traceback" not in err


def test_a_file_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.qfx"
    path.write_bytes(b"something else")
    status, _, err = run(capsys, str(path))
    assert status == 2 and err.startswith("error: ") and "bad.qfx" in err


def test_garbage_is_collected_as_before() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    assert main(["no-such-model"]) == 2
    assert (gc.get_threshold(), gc.get_freeze_count()) == before and gc.isenabled()
