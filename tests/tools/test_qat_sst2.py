"""The SST-2 case from the command line to the table, on a toy language and a tiny BERT."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qfx.models import BertConfig, build_bert
from qfx.tools import qat_sst2
from qfx.tools.qat_results import read

pytestmark = [pytest.mark.filterwarnings("ignore::qfx.QfxWarning"), pytest.mark.usefixtures("unmeasured")]


TINY = BertConfig(dim=16, layers=1, heads=2, hidden=32)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sentences that are good or bad, of a few words or of many."""
    monkeypatch.setattr(qat_sst2, "BERT_SMALL", TINY)
    (tmp_path / "sst2").mkdir()
    for part, count in (("train", 40), ("dev", 10)):
        rows = [
            (" ".join(["this", "film", "is"] * (1 + 4 * (i % 3 == 0)) + [("bad", "good")[i % 2], f"n{i}"]), i % 2)
            for i in range(count)
        ]
        text = "".join(f"{sentence} \t{label}\n" for sentence, label in rows)
        (tmp_path / "sst2" / f"{part}.tsv").write_text("sentence\tlabel\n" + text)
    return tmp_path


def run(data: Path, *more: str) -> int:
    fixed = ["--batch", "8", "--float-epochs", "2", "--held-out", "4", "--target", "reference"]
    return qat_sst2.main(["--data", str(data), *fixed, "--threads", str(torch.get_num_threads()), *more])


def test_from_data_to_table(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run(data, "--json", str(file)) == 0
    rows = {(row.method, row.bits): row for row in read([file])}
    assert set(rows) == {("float", ""), *((m, b) for m in ("PTQ", "QAT") for b in ("W8A8", "W4A8"))}
    assert "SST-2, bert_small, 10 examples" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_bit_for_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--phases", "qat", "--bits", "8", "--save-every", "0", "--epochs", "2")
    assert run(data, *options, "--checkpoint", str(tmp_path / "straight")) == 0
    # The float model is there already, so that only QAT is interrupted.
    (tmp_path / "stopped").mkdir()
    name = "bert_small_float.pt"
    (tmp_path / "stopped" / name).write_bytes((tmp_path / "straight" / name).read_bytes())
    steps = 0
    true = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        return true(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 130
    assert run(data, *options, "--checkpoint", str(tmp_path / "stopped")) == 0
    one, other = (
        torch.load(tmp_path / folder / "bert_small_W8A8_seed0.pt", weights_only=True)["state"]
        for folder in ("straight", "stopped")
    )
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    assert one["curve"] == other["curve"]


def test_embeddings_are_stored_in_8_bits_where_that_is_asked_for(data: Path, tmp_path: Path) -> None:
    sizes = []
    for more in ((), ("--embedding-storage", "8")):
        file = tmp_path / f"{len(sizes)}.json"
        assert run(data, "--phases", "ptq", "--bits", "8", "--json", str(file), *more) == 0
        sizes.append(read([file])[0].bytes)
    assert sizes[0] is not None and sizes[1] is not None and sizes[1] < sizes[0]


def test_missing_files_are_named(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "sst2" / "dev.tsv").unlink()
    assert run(data) == 2
    assert capsys.readouterr().err.strip() == "error: --data has no sst2/dev.tsv"


def test_a_hugging_face_directory_needs_transformers(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(data, "--model", str(data)) == 2
    assert "error: transformers cannot be imported" in capsys.readouterr().err


def test_a_hugging_face_directory_brings_its_own_tokenizer(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tokenizer:
        pad_token_id = 3

        def __call__(self, texts: Sequence[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
            return {"input_ids": [[4 + len(word) for word in text.split()][:max_length] for text in texts]}

    model = build_bert(BertConfig(vocab_size=32, dim=16, layers=1, heads=2, hidden=32, max_length=32))
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda folder: Tokenizer())  # type: ignore[attr-defined]
    fake.AutoModelForSequenceClassification = types.SimpleNamespace(  # type: ignore[attr-defined]
        from_pretrained=lambda folder: model
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert (
        run(data, "--model", "some/where/tiny-bert", "--float-epochs", "0", "--phases", "float,ptq", "--bits", "8") == 0
    )
    assert "SST-2, tiny-bert, 10 examples" in capsys.readouterr().out
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "it was trained already"


def test_float_training_starts_like_bert() -> None:
    given = qat_sst2.arguments(["--data", "d", "--dropout", "0.2"])
    found = qat_sst2.from_scratch([qat_sst2.Sentence("a b a b", 0)], given)
    weights = found.model.get_parameter("layers.0.intermediate.weight")
    assert float(weights.std()) == pytest.approx(0.02, rel=0.01)
    assert not bool(found.model.get_parameter("layers.0.intermediate.bias").any())
    assert bool((found.model.get_parameter("embeddings.norm.weight") == 1).all())
    assert {m.p for m in found.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
    assert found.name == "bert_small" and found.epochs == 3
