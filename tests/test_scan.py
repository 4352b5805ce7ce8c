"""The scan: scores against the outputs themselves, and only what is new is computed, whatever ended it before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx
from qfx import api, fisher, replay, score_cache
from qfx import scan as scan_module
from qfx.divergence import Kl, Score, Sqnr, Task
from qfx.errors import ConfigError, QfxWarning
from qfx.layers import Layer, layers_of
from qfx.measure import Measurement, measure_sensitivity
from qfx.meta import kept_calls
from qfx.metrics import sqnr_db
from qfx.recipe import Recipe
from qfx.replay import Replay
from qfx.samples import samples_of
from qfx.scan import changes_of, scan, scan_fisher, together
from qfx.score_cache import ScoreCache
from qfx.targets import Reference
from qfx.widths import Rounders, Trial

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in parts of 8 rows, so that a few rows are several."""
    monkeypatch.setattr("qfx.samples._MOST_ROWS", 8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(score_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())
    return tmp_path


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> tuple[fx.GraphModule, tuple[Layer, ...], Rounders]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model, X, target="reference")
        api.calibrate(made, [X])
    gm = api.graphs(made)[""]
    return gm, layers_of(gm), Rounders(gm)


def trials_of(layers: tuple[Layer, ...], *bits: int) -> list[Trial]:
    return [Trial(layer.key, part, b) for layer in layers for part in ("weight", "activation") for b in bits]


def loss(output: Tensor, item: Any) -> Tensor:
    return F.cross_entropy(output, item[1])


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["only", "all_but"])
@pytest.mark.parametrize("score", [Sqnr(), Kl(), Task(loss)], ids=lambda s: s.name)
def test_scores_of_all_samples_are_those_of_one(graph: Any, model: nn.Module, score: Score, mode: Any) -> None:
    gm, layers, rounders = graph
    trials = trials_of(layers, 3)
    splits = not isinstance(score, Task)
    parts = samples_of(gm, [((X,), (X, Y))], rows=12, split=splits)
    assert len(parts) == (2 if splits else 1)
    found = scan(gm, layers, trials, parts, score, mode=mode, rounders=rounders)
    with torch.no_grad():
        wanted = model(X)
    for trial in trials:
        same_part = [t for t in trials if t.part == trial.part]
        chosen = [trial] if mode == "only" else [t for t in same_part if t != trial]
        (got,) = Replay(gm, (X,)).run(together(changes_of(layers, t, rounders) for t in chosen))
        assert not torch.equal(wanted, got)
        expected = {
            "sqnr": lambda got=got: sqnr_db(wanted, got),
            "kl": lambda got=got: float(
                F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
            ),
            "task": lambda got=got: float(loss(got, (X, Y)) - loss(wanted, (X, Y))),
        }[score.name]()
        assert found[trial] == pytest.approx(expected, rel=1e-4, abs=1e-7), trial


def test_sqnr_is_that_of_the_worst_output() -> None:
    quiet, loud = torch.tensor([1.0, 0.0]), torch.tensor([10.0, 0.0])
    counts = torch.tensor([1, 2])
    sums = Sqnr().compare((quiet, loud, counts), (quiet + 0.1, loud + 0.1, counts), None)
    assert Sqnr().value(sums) == pytest.approx(sqnr_db(quiet, quiet + 0.1))
    assert Sqnr().value((1.0, 0.0)) == math.inf and Sqnr().damage(math.inf) == 0.0
    assert Sqnr().damage(20.0) == pytest.approx(0.01)
    assert Kl().damage(-1e-12) == Task(loss).damage(-0.5) == 0.0


# --- only what is new -------------------------------------------------------------------------------------------------


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that every replay of a trial adds to."""
    made: list[Any] = []
    run = replay.Replay.run
    monkeypatch.setattr(replay.Replay, "run", lambda self, changes: (made.append(changes), run(self, changes))[1])
    return made


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """A list that every trial that fisher estimates on a sample is added to."""
    made: list[Trial] = []

    def spy(gm: Any, layers: Any, trials: Any, *rest: Any) -> Any:
        made.extend(trials)
        return fisher.estimate(gm, layers, trials, *rest)

    monkeypatch.setattr(scan_module, "estimate", spy)
    return made


def test_more_widths_compute_only_the_new_ones(graph: Any, replays: list[Any], estimated: list[Trial]) -> None:
    gm, layers, rounders = graph
    parts = samples_of(gm, [((X,), None)], rows=12, split=True)
    cache, whole = ScoreCache(), ScoreCache()
    few, many = trials_of(layers, 4), trials_of(layers, 2, 4)
    scan(gm, layers, few, parts, Kl(), cache=cache, rounders=rounders)
    assert len(replays) == len(few) * 2
    again = scan(gm, layers, many, parts, Kl(), cache=cache, rounders=rounders)
    assert len(replays) == len(many) * 2
    assert again == scan(gm, layers, many, parts, Kl(), cache=whole)
    scan_fisher(gm, layers, few, parts, cache=(cheap := ScoreCache()), rounders=rounders)
    scan_fisher(gm, layers, many, parts, cache=cheap, rounders=rounders)
    assert sorted(estimated) == sorted(2 * many)
    assert scan_fisher(gm, layers, many, parts, cache=cheap) == scan_fisher(gm, layers, many, parts)


def test_modes_share_nothing(graph: Any, replays: list[Any]) -> None:
    gm, layers, rounders = graph
    parts = samples_of(gm, [((X,), None)], rows=8, split=True)
    cache, trials = ScoreCache(), trials_of(layers, 2)
    only = scan(gm, layers, trials, parts, Kl(), cache=cache, rounders=rounders)
    all_but = scan(gm, layers, trials, parts, Kl(), mode="all_but", cache=cache, rounders=rounders)
    assert len(replays) == 2 * len(trials)
    assert only.keys() == all_but.keys() and only != all_but


# --- whatever ends it early -------------------------------------------------------------------------------------------


class Interrupting:
    """A loss that is interrupted, or fails, at one of its calls, once."""

    def __init__(self, at: int, how: BaseException | float) -> None:
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, output: Tensor, item: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            if isinstance(self.how, BaseException):
                raise self.how
            return self.how
        return loss(output, item)


DATA = [(X[:6], Y[:6]), (X[6:], Y[6:])]


def on_data(model: nn.Module, data: Any) -> fx.GraphModule:
    """The graph, calibrated on ``data``, which it keeps."""
    made = api.prepare(model, X[:2], target="reference")
    api.keep_rows(made, 12)
    api.calibrate(made, data)
    return api.graphs(made)[""]


@pytest.fixture(scope="module")
def ready(model: nn.Module) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return on_data(model, DATA)


def measured(gm: fx.GraphModule, score: Any, check: int = 4) -> qfx.Sensitivity:
    wanted = Measurement((2, 4), (4,), score, rows=12, check=check)
    parts = samples_of(gm, kept_calls(gm), rows=12, split=wanted.splits)
    return measure_sensitivity(gm, parts, wanted, recipe=Recipe.int8(), target=Reference(), model="Net")


@pytest.mark.parametrize(
    ("how", "error", "what"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (RuntimeError("no such label"), ConfigError, "failed: RuntimeError: no such label"),
        (math.nan, ConfigError, "gave nan"),
        ("good", ConfigError, "failed: ValueError"),
        (torch.zeros(2), ConfigError, "only one element tensors|2 elements"),
    ],
    ids=repr,
)
def test_scores_until_then_are_kept(ready: fx.GraphModule, replays: list[Any], how: Any, error: Any, what: str) -> None:
    judge = Interrupting(2 * 7, how)
    with pytest.raises(error, match=what):
        measured(ready, judge)
    assert len(replays) == 7
    finished = measured(ready, judge)
    assert len(replays) == 7 + (2 * 9 - 6)  # the seventh is made again, nothing else
    assert finished.scores == measured(ready, loss).scores


@pytest.mark.parametrize("score", ["kl", "sqnr", "fisher"])
def test_ctrl_c_and_a_new_process(
    ready: fx.GraphModule, replays: list[Any], monkeypatch: pytest.MonkeyPatch, score: str, folder: Path
) -> None:
    uninterrupted = measured(ready, score)
    total = len(replays)
    for file in (folder / "scores").iterdir():
        file.unlink()
    score_cache._KEPT.clear()
    replays.clear()
    stop_at = 10 if score != "fisher" else 3
    run = replay.Replay.run

    def stopping(self: Any, changes: Any) -> Any:
        if len(replays) == stop_at:
            raise KeyboardInterrupt
        return run(self, changes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(replay.Replay, "run", stopping)
        measured(ready, score)
    score_cache._KEPT.clear()  # a new process
    finished = measured(ready, score)
    assert len(replays) == total
    assert finished.scores == uninterrupted.scores and finished.agreement == uninterrupted.agreement


def test_a_torn_file_is_measured_again(ready: fx.GraphModule, replays: list[Any], folder: Path) -> None:
    first = measured(ready, "kl")
    (file,) = (folder / "scores").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    score_cache._KEPT.clear()
    again = measured(ready, "kl")
    assert len(replays) == 2 * 18 and again.scores == first.scores


def test_other_labels_weights_data_and_losses_share_nothing(model: nn.Module, ready: fx.GraphModule) -> None:
    relabelled = [(x, (y + 1) % 3) for x, y in DATA]
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    found = [
        measured(ready, loss),
        measured(on_data(model, relabelled), loss),
        measured(ready, lambda output, item: 2.0 * loss(output, item)),
        measured(on_data(other, DATA), loss),
        measured(on_data(model, DATA[:1]), loss),
    ]
    assert len({tuple(sorted(table.scores.items())) for table in found}) == len(found)


def test_a_loss_sees_its_own_item(model: nn.Module, ready: fx.GraphModule) -> None:
    """Also of a loader that fills one buffer again and again."""

    def refilled() -> Any:
        x, y = torch.empty(6, 6), torch.empty(6, dtype=torch.long)
        for rows, labels in DATA:
            yield x.copy_(rows), y.copy_(labels)

    seen = []

    def noting(output: Tensor, item: Any) -> Tensor:
        seen.append(item)
        return loss(output, item)

    found = measured(on_data(model, refilled()), noting)
    assert {int(labels[0]) for _, labels in seen} == {int(y[0]) for _, y in DATA}
    assert found.scores == measured(ready, loss).scores


def test_a_loss_with_values_of_its_own(ready: fx.GraphModule, replays: list[Any]) -> None:
    class Weighted:
        __hash__: Callable[..., int] = None  # type: ignore[assignment]

        def __call__(self, output: Tensor, item: Any) -> Tensor:
            return loss(output, item)

    judge = Weighted()
    assert measured(ready, judge).scores == measured(ready, judge).scores
    assert len(replays) == 18
