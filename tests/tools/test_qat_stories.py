"""The language model's case from the command line to the table, on random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qfx.models import build_llama, load_stories260k
from qfx.tools import bench_accuracy, qat_stories
from qfx.tools.qat_results import read
from qfx.tools.qat_texts import read_texts

pytestmark = [pytest.mark.filterwarnings("ignore::qfx.QfxWarning"), pytest.mark.usefixtures("unmeasured")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "stories260K"
    folder.mkdir()
    state = build_llama().state_dict()
    torch.save({name: t for name, t in state.items() if name != "output.weight"}, folder / "stories260K.pt")
    # What the model itself would say: nobody predicts it better, so that every rounding costs.
    tokens = torch.ones(40, 1, dtype=torch.int64)
    model = load_stories260k(folder)
    with torch.no_grad():
        for _ in range(23):
            tokens = torch.cat([tokens, model(tokens)[:, -1].softmax(-1).multinomial(1)], dim=1)
    offset = np.arange(0, tokens.numel() + 1, tokens.shape[1])
    np.savez(folder / "tinystories_tokens.npz", tokens=tokens.flatten().numpy().astype(np.int16), offset=offset)
    return tmp_path


def run(data: Path, *more: str) -> int:
    fixed = ["--test-stories", "20", "--epochs", "8", "--target", "reference", "--bits", "3/16"]
    return qat_stories.main(["--data", str(data), *fixed, "--threads", str(torch.get_num_threads()), *more])


def test_training_closes_the_gap(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run(data, "--json", str(file)) == 0
    rows = {row.method: row for row in read([file])}
    assert rows["PTQ"].drop > rows["QAT"].drop and rows["PTQ"].note == "rounding"
    text = capsys.readouterr().out
    assert "TinyStories, stories260K, 20 examples" in text


def test_perplexity_is_that_of_the_benchmark(data: Path) -> None:
    folder = data / "stories260K"
    model = load_stories260k(folder)
    texts = read_texts(folder / "tinystories_tokens.npz")[:20]
    want = bench_accuracy._perplexity(model, [text.unsqueeze(0) for text in texts])
    with torch.no_grad():
        found = qat_stories.perplexity(model, qat_stories.by_length(texts))
    assert found == pytest.approx(want, rel=1e-5)


def test_an_interrupted_run_goes_on_bit_for_bit(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--phases", "qat", "--save-every", "0", "--epochs", "3")
    assert run(data, *options, "--checkpoint", str(tmp_path / "straight")) == 0
    true = torch.optim.AdamW.step
    steps = 0

    def step(self: torch.optim.AdamW) -> object:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return true(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 130
    assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 0
    one, other = (
        torch.load(tmp_path / folder / "stories260K_W3A16_seed0.pt", weights_only=True)["state"]
        for folder in ("straight", "stopped")
    )
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key


def test_what_cannot_be_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--bits", "8") == 2
    assert "no recipe of weights only has W8A8" in capsys.readouterr().err
    assert run(data, "--test-stories", "40") == 2
    assert "leave none of 40 for training" in capsys.readouterr().err
    (data / "stories260K" / "stories260K.pt").unlink()
    assert run(data) == 2
    assert capsys.readouterr().err.strip() == "error: --data has no stories260K.pt"
