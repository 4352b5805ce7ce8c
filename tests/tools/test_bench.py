"""The benchmarks on tiny inputs: that they measure what they say. No test asserts a time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.models import MODELS_SMALL, build_llama, load_stories260k
from qfx.tools import bench, bench_accuracy, bench_child, bench_coverage
from qfx.tools.bench_backend import backend
from qfx.tools.bench_calls import call, mismatch, resized, token_length, worst_sqnr_db
from qfx.tools.bench_cost import _medians, _memory_figures
from qfx.tools.bench_data import cifar_images, file_of
from qfx.tools.bench_figures import Bar, Figure, Options, Skip, at_least, at_most, need, table
from qfx.tools.bench_fx_mode import engine, quantize_fx
from qfx.tools.bench_parity import parity
from qfx.tools.bench_timing import Candidate, Times, take_turns
from qfx.tools.latency_figures import Case, latency
from qfx.tools.latency_result import Result, Row

REFERENCE = Options(target="reference")

# A smoke test quantizes from few samples, for a target that is slow on purpose.
pytestmark = [pytest.mark.filterwarnings("ignore::qfx.QfxWarning")]

# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bar", "verdict"),
    [
        (1.0, at_least(1.0), "met"),
        (0.99, at_least(1.0), "MISSED"),
        (1.0, at_most(1.0), "met"),
        (1.01, at_most(1.0), "MISSED"),
        (float("nan"), at_most(1.0), "MISSED"),
        (5.0, None, ""),
        (None, at_most(1.0), "skipped"),
    ],
)
def test_verdict(value: float | None, bar: Bar | None, verdict: str) -> None:
    figure = Figure("it", value, bar=bar)
    assert figure.verdict == verdict
    assert figure.good == (verdict != "MISSED")


def test_a_failure_is_not_good() -> None:
    figure = Figure.fail("it", "ValueError: no")
    assert figure.verdict == "FAILED" and not figure.good


def test_table_shows_value_bar_and_note() -> None:
    text = table([Figure("speed", 1.23456, "x", at_least(1), "of two"), Figure.skip("other", "not installed")])
    speed, other = text.splitlines()[2:]
    assert re.split(r"\s{2,}", speed) == ["speed", "1.235 x", "≥ 1", "met", "of two"]
    assert re.split(r"\s{2,}", other) == ["other", "skipped", "not installed"]


def test_need_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("json") is json
    with pytest.raises(Skip, match="no_such_package cannot be imported"):
        need("no_such_package")


def test_need_takes_a_package_that_breaks_for_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator broken::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Skip, match="operator broken::nms does not exist"):
        need("broken_package")


# --- timing ---------------------------------------------------------------------------------------


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = [Candidate(name, lambda name=name: order.append(name)) for name in "abc"]  # type: ignore[misc]
    times = take_turns(candidates, rounds=3, seconds=0.0, warm_ups=1)
    assert "".join(order) == "".join(4 * name for name in "abc" "bca" "cab")
    assert {name: len(rounds) for name, rounds in times.rounds.items()} == {"a": 3, "b": 3, "c": 3}


def test_speedup_is_the_median_of_the_rounds_own_ratios() -> None:
    times = Times({"fast": (1.0, 10.0, 2.0), "slow": (2.0, 30.0, 2.0)})
    assert times.speedup("fast", "slow") == 2.0
    assert times.ms("fast") == 2.0


# --- calls ----------------------------------------------------------------------------------------


def test_resized_keeps_kind_and_values() -> None:
    example = {"ids": torch.tensor([[3, 5, 5]]), "mask": torch.ones(1, 3, dtype=torch.bool), "x": torch.zeros(1, 2, 4)}
    made = resized(example, 4, length=7)
    assert {name: list(t.shape) for name, t in made.items()} == {"ids": [4, 7], "mask": [4, 7], "x": [4, 2, 4]}
    assert set(made["ids"].flatten().tolist()) == {3, 5} and bool(made["mask"].all())
    assert [t.dtype for t in made.values()] == [t.dtype for t in example.values()]
    assert token_length(example) == 3 and token_length((example["x"],)) is None
    assert torch.equal(resized(example["x"], 2), resized(example["x"], 2))


def test_mismatch_names_the_difference() -> None:
    x = torch.zeros(2, 3)
    assert mismatch({"a": x}, {"a": x + 1}) == ""
    assert "in place of" in mismatch({"a": x}, (x,))
    assert "output 0 is torch.float32 [2, 2]" in mismatch(x, x[:, :2])
    assert "torch.float64" in mismatch(x, x.double())
    assert "not finite" in mismatch(x, x / 0)


def test_worst_sqnr_is_over_all_outputs() -> None:
    x = torch.ones(4)
    assert worst_sqnr_db((x, x, torch.arange(4)), (x * 1.1, x * 1.01, torch.arange(4))) == pytest.approx(20, abs=1e-3)


# --- benchmarks -----------------------------------------------------------------------------------


def small(name: str) -> bench_coverage.Case:
    return bench_coverage.Case(name, MODELS_SMALL[name], 0.98)


def test_coverage_counts_who_ran() -> None:
    bad = bench_coverage.Case("broken", lambda: (nn.Linear(2, 2), (torch.zeros(1, 3),)), 0.98)
    rows = list(bench_coverage.coverage(REFERENCE, cases=[small("resnet20"), small("llama"), bad]))
    assert [row.verdict for row in rows] == ["met", "met", "FAILED", "MISSED"]
    assert rows[0].value == pytest.approx(100) and "3 calls" in rows[0].note
    assert "5 calls" in rows[1].note, "token models run at two other lengths too"
    assert rows[3].value == 2 and rows[3].unit == "of 3"


def test_coverage_sees_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tuple(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.inner(x),)

    true = qfx.quantize
    monkeypatch.setattr(qfx, "quantize", lambda *args, **kwargs: Tuple(true(*args, **kwargs)))
    (row, total) = bench_coverage.coverage(REFERENCE, cases=[small("resnet20")])
    assert row.verdict == "FAILED" and "OutputError" in row.note
    assert total.verdict == "MISSED"


def test_every_reference_model_is_a_case() -> None:
    names = [case.name for case in bench_coverage.own_cases()]
    assert {name for name in names if not name.endswith("(small)")} == set(MODELS_SMALL)
    assert len(names) == 2 * len(MODELS_SMALL)


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers"])
def test_peers_that_are_missing_are_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python takes for a package that is not there
    (figure,) = bench.measure(name, bench.BENCHMARKS[name], REFERENCE)
    assert figure.verdict == "skipped" and f"{name} cannot be imported" in figure.note


def test_sqnr_beside_fx_mode() -> None:
    model, _ = MODELS_SMALL["resnet18"]()
    rows = list(bench_accuracy.sqnr(REFERENCE, model=model, image_size=64, batches=2, batch_size=4))
    assert rows[0].value is not None and rows[0].value > 10
    assert [row.what for row in rows[1:]] == ["above FX mode onednn", "above FX mode x86"]
    assert all(row.value is not None and abs(row.value) < 20 for row in rows[1:] if row.verdict != "skipped")


def test_fx_mode_leaves_the_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    name = torch.backends.quantized.supported_engines[-1]
    model, example = MODELS_SMALL["resnet20"]()
    assert isinstance(example, tuple)
    peer = quantize_fx(model, [example[0]], name)
    with engine(name):
        assert torch.backends.quantized.engine == name
        assert mismatch(call(model, example), call(peer, example)) == ""
    assert torch.backends.quantized.engine == before
    with pytest.raises(Skip, match="no quantized engine 'steam'"), engine("steam"):
        pass


def test_parity_of_a_target_with_itself_is_skipped() -> None:
    with pytest.raises(Skip, match="reference itself"):
        next(parity(REFERENCE))


def test_parity_figures() -> None:
    if "x86" not in bench.TARGETS or bench.TARGETS["x86"].unavailable():
        pytest.skip("this machine has no fast target")
    models = {name: MODELS_SMALL[name] for name in ("resnet20", "llama")}
    rows = list(parity(Options(target="x86"), models=models, recipes=["int8"]))
    assert {row.what for row in rows} >= {"resnet20, int8, integers", "llama, int8, floats"}
    assert all(row.verdict == "met" for row in rows), table(rows)


def test_the_backend_gives_the_numbers_of_quantize() -> None:
    (figure,) = backend(REFERENCE, models={"llama": MODELS_SMALL["llama"]})
    assert figure.verdict == "met" and "2 compiled, quantized" in figure.note, figure


def test_latency_compares_with_every_candidate() -> None:
    asked = []

    def measure(model: str, batch: int, names: list[str], *, threads: int) -> Result:
        asked.append((model, batch, names, threads))
        times = {"qfx reference": 2.0, "fp32 eager": 3.0, "torch_fx onednn": 1.0}
        rows = tuple(Row(name, name.startswith("qfx"), "", 30.0, ((ms,),)) for name, ms in times.items())
        return Result(model, batch, rows, {"torch_fx x86": "no quantized engine"})

    cases = [Case("resnet20", {"torch_fx onednn": at_least(1.0)})]
    rows = list(latency(REFERENCE, cases=cases, measure=measure))
    names = ["qfx reference", "fp32 eager", "torch_fx onednn", "torch_fx x86"]
    assert asked == [("resnet20", 1, names, torch.get_num_threads())]
    found = {row.what: row for row in rows}
    assert found["resnet20 over fp32 eager"].value == 1.5
    assert "qfx reference 2 ms" in found["resnet20 over fp32 eager"].note
    assert found["resnet20 over torch_fx onednn"].verdict == "MISSED"
    assert found["resnet20 over torch_fx x86"] == Figure.skip("resnet20 over torch_fx x86", "no quantized engine")


def test_latency_fails_where_qfx_does() -> None:
    found = Result("resnet20", 1, (), {"qfx reference": "no luck"})
    with pytest.raises(RuntimeError, match="resnet20 on qfx reference: no luck"):
        next(latency(REFERENCE, cases=[Case("resnet20", {})], measure=lambda *_, **__: found))


# --- real data, in miniature ----------------------------------------------------------------------


def test_accuracy_needs_data(tmp_path: Path) -> None:
    for name in ("cifar10", "perplexity"):
        (figure,) = bench.measure(name, bench.BENCHMARKS[name], REFERENCE)
        assert figure.verdict == "skipped" and "--data" in figure.note
    with pytest.raises(Skip, match=r"--data has no resnet\.pt"):
        file_of(tmp_path, "resnet.pt")


@pytest.fixture
def cifar(tmp_path: Path, one_byte_images: None) -> Path:
    for part, count in (("train", 512), ("test", 20)):
        np.savez(
            tmp_path / f"cifar10_jpeg_{part}.npz",
            jpeg=(np.arange(count) % 256).astype(np.uint8),
            offset=np.arange(count + 1),
            label=np.arange(count) % 10,
        )
    torch.save(MODELS_SMALL["resnet20"]()[0].state_dict(), tmp_path / "resnet20_cifar10_jpeg.pt")
    return tmp_path


def test_cifar_images_are_normalised(cifar: Path) -> None:
    x, labels = cifar_images(cifar / "cifar10_jpeg_test.npz", 12)
    assert list(x.shape) == [12, 3, 32, 32] and labels.tolist() == [*range(10), 0, 1]
    assert x[5, 1, 0, 0].item() == pytest.approx((5 / 255 - 0.456) / 0.224)


def test_cifar10_figures(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_accuracy, "load_resnet20", lambda path: MODELS_SMALL["resnet20"]()[0])
    monkeypatch.setattr(bench_accuracy, "FX_ENGINES", ("onednn",))
    rows = list(bench_accuracy.cifar10(Options(target="reference", data=cifar)))
    assert [row.what for row in rows] == ["ResNet-20 float top-1", "top-1 drop", "top-1 drop of FX mode onednn"]
    assert rows[0].note == "20 test images" and rows[1].bar == at_most(0.1)


@pytest.fixture
def story_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "stories260K"
    folder.mkdir()
    state = build_llama().state_dict()
    torch.save({name: t for name, t in state.items() if name != "output.weight"}, folder / "stories260K.pt")
    tokens = np.random.default_rng(0).integers(0, 512, 1040 * 8).astype(np.int16)
    np.savez(folder / "tinystories_tokens.npz", tokens=tokens, offset=np.arange(0, len(tokens) + 1, 8))
    return tmp_path


def test_perplexity_figures(story_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Options(target="reference", data=story_folder)
    rows = list(bench_accuracy.perplexity(data, count=2))
    assert [row.what for row in rows] == ["float", "int8_dynamic", "w8a16", "w4a16, groups of 32"]
    assert rows[0].note == "2 stories, 14 tokens"
    model = load_stories260k(story_folder / "stories260K")
    stories = bench_accuracy.stories(story_folder / "stories260K" / "tinystories_tokens.npz", 0, 2)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(s)[0, :-1], s[0, 1:]) for s in stories]
    assert rows[0].value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


# --- a process of its own -------------------------------------------------------------------------


def test_memory_figures_take_the_forward_pass_off() -> None:
    mib = 2**20
    runs = {
        "forward": {"before": 100, "loaded": 300, "peak": 350, "after": 300, "weights": 200},
        "quantize": {"before": 110, "loaded": 310, "peak": 460, "after": 360, "weights": 200},
        "inplace": {"before": 120, "loaded": 320, "peak": 380, "after": 170, "weights": 200},
    }
    medians = {k: _medians([{n: v * mib for n, v in run.items()}]) for k, run in runs.items()}
    rise, inplace = _memory_figures("m", medians)
    assert rise.value == pytest.approx((150 - 50) / 200) and "rise 150.0" in rise.note
    assert inplace.value == pytest.approx(260 / 200)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_sees_what_is_allocated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    megabytes = 64

    def act(model: nn.Module, example: object, target: str) -> object:
        torch.ones(megabytes << 20, dtype=torch.uint8)  # is gone at the end, and yet the peak
        return torch.ones((megabytes // 2) << 20, dtype=torch.uint8)

    monkeypatch.setitem(bench_child.ACTIONS, "forward", act)
    torch.save(MODELS_SMALL["resnet20"](), tmp_path / "model.pt")
    seen = bench_child.memory(str(tmp_path / "model.pt"), "resnet20", "forward", "reference")
    assert 0.95 * megabytes < (seen["peak"] - seen["loaded"]) / 2**20 < 1.25 * megabytes
    assert (seen["after"] - seen["loaded"]) / 2**20 == pytest.approx(megabytes / 2, rel=0.25)


def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no-such-measurement'"):
        bench_child.fresh("no-such-measurement")


# --- the program ----------------------------------------------------------------------------------


def figures(options: Options) -> Iterator[Figure]:
    yield Figure("one", 2.0, "x", at_least(1))
    yield Figure("two", None, note=options.target)


def broken(options: Options) -> Iterator[Figure]:
    yield Figure("half", 1.0)
    raise ValueError("no more")


def test_main_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"figures": figures, "broken": broken})
    threads = str(torch.get_num_threads())
    file = tmp_path / "figures.json"
    assert bench.main(["figures", "--target", "reference", "--threads", threads, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "features" in text and re.search(r"one +2 x +≥ 1 +met", text)
    written = json.loads(file.read_text())
    assert written["machine"]["target"] == "reference"
    assert [f["verdict"] for f in written["figures"]["figures"]] == ["met", "skipped"]
    assert bench.main(["--target", "reference", "--threads", threads]) == 1
    assert "ValueError: no more" in capsys.readouterr().out


def test_main_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["latencies"])
    assert "no benchmark latencies; there are coverage" in capsys.readouterr().err
