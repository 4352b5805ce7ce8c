"""The CIFAR case from the command line to the table, on images of one colour and a small ResNet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qfx.models import CifarResNet
from qfx.tools import qat_cifar, qat_images
from qfx.tools.qat_results import Result, read

pytestmark = [pytest.mark.filterwarnings("ignore::qfx.QfxWarning"), pytest.mark.usefixtures("unmeasured")]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_byte_images: None) -> Path:
    """Images whose brightness is their class, and the weights of an untrained network."""
    monkeypatch.setitem(qat_cifar.MODELS, "resnet20", (lambda: CifarResNet(1, width=4), "small.pt"))  # type: ignore[arg-type]
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 48), ("test", 20)):
        label = np.arange(count) % 10
        np.savez(
            folder / f"cifar10_jpeg_{part}.npz",
            jpeg=(25 * label).astype(np.uint8),
            offset=np.arange(count + 1),
            label=label,
        )
    torch.save(CifarResNet(1, width=4).state_dict(), folder / "small.pt")
    return folder


def run(data: Path, *more: str) -> int:
    fixed = ["--batch", "8", "--epochs", "2", "--calibration-images", "16", "--target", "reference"]
    return qat_cifar.main(["--data", str(data), *fixed, "--threads", str(torch.get_num_threads()), *more])


def test_from_data_to_table(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run(data, "--bits", "8,4", "--json", str(file), "--distill", "0.5", "--freeze-batch-norm", "0.5") == 0
    text = capsys.readouterr().out
    rows = {(row.method, row.bits): row for row in read([file])}
    assert set(rows) == {("float", ""), *((m, b) for m in ("PTQ", "QAT") for b in ("W8A8", "W4A4"))}
    assert "CIFAR-10, resnet20, 20 examples" in text
    assert all(f"{method} {bits}" in text for method, bits in rows if bits)
    qat: Result = rows["QAT", "W4A4"]
    assert qat.epochs == 2 and qat.seed == 0 and qat.note == "distilled" and len(qat.curve) == 2
    assert qat.reference == rows["float", ""].value and qat.count == 20
    assert rows["PTQ", "W4A4"].note in ("MinMax", "Histogram", "Mse")
    sizes = [row.bytes for row in (rows["float", ""], rows["QAT", "W8A8"], qat)]
    assert all(size is not None and size > 0 for size in sizes) and sizes == sorted(sizes, reverse=True)  # type: ignore[type-var]


def states(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.pt")
    held: dict[str, Any] = torch.load(file, weights_only=True)
    return held["state"]  # type: ignore[no-any-return]


def test_an_interrupted_run_goes_on_bit_for_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--phases", "qat", "--bits", "4", "--save-every", "0")
    assert run(data, *options, "--checkpoint", str(tmp_path / "straight")) == 0
    calls = 0
    true = qat_images.augmented

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(qat_images, "augmented", interrupted)
        assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 130
    assert "goes on from the last saved point" in capsys.readouterr().err
    assert states(tmp_path / "stopped")["step"] == 8
    torch.manual_seed(99)
    assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 0
    one, other = states(tmp_path / "straight"), states(tmp_path / "stopped")
    assert one["model"].keys() == other["model"].keys() and other["step"] == 12
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert one["curve"] == other["curve"]


def test_a_checkpoint_of_another_run_is_refused(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--phases", "qat", "--bits", "4", "--checkpoint", str(tmp_path / "runs"))
    assert run(data, *options) == 0
    assert run(data, *options, "--lr", "0.5") == 2
    assert "with other settings: lr 0.01 where this run has 0.5" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_in_words(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--phases", "qat", "--bits", "4", "--lr", "1e30") == 2
    assert "error: " in (text := capsys.readouterr().err) and "step" in text


def test_missing_files_are_named(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "small.pt").unlink()
    assert run(data) == 2
    assert capsys.readouterr().err.strip() == "error: --data has no small.pt"
    assert run(data / "nothing") == 2
    torch.save(CifarResNet(1, width=4).state_dict(), data / "small.pt")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert run(data) == 2
    assert "PIL.Image cannot be imported" in capsys.readouterr().err


def test_a_model_without_weights_is_trained_first(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(qat_cifar.MODELS, "resnet18", (lambda: CifarResNet(1, width=4), None))  # type: ignore[arg-type]
    runs = tmp_path / "runs"
    options = ["--model", "resnet18", "--phases", "float", "--float-epochs", "3", "--checkpoint", str(runs)]
    values = []
    for _ in range(2):  # the second time from the checkpoint
        file = tmp_path / f"{len(values)}.json"
        assert run(data, *options, "--json", str(file)) == 0
        (row,) = read([file])
        values.append(row.value)
    assert values[0] == values[1] and [file.name for file in runs.iterdir()] == ["resnet18_float.pt"]


def test_resnet18_keeps_the_resolution_of_small_images() -> None:
    model = qat_cifar.resnet18().eval()
    shapes = []
    model.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        assert list(model(torch.zeros(1, 3, 32, 32)).shape) == [1, 10]
    assert shapes == [(1, 64, 32, 32)]


def test_phases_and_bits_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in ((["--phases", "test"], "float, ptq, qat"), (["--bits", "12"], "between 2 and 8")):
        with pytest.raises(SystemExit):
            qat_cifar.arguments(["--data", "d", *options])
        assert words in capsys.readouterr().err
    assert qat_cifar.arguments(["--data", "d"]).phases == ("float", "PTQ", "QAT")
