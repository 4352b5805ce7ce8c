"""Scores on disk: kept whole or not at all, rebuilt where they are torn, and never those of other content."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from qfx import api, score_cache
from qfx.divergence import Kl, Sqnr
from qfx.errors import QfxWarning
from qfx.jit import cache_dir
from qfx.observers import MinMax
from qfx.recipe import Recipe
from qfx.score_cache import ScoreCache, cache_for, content_of

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())
    return tmp_path


def calibrated(model: nn.Module, x: Any = X, recipe: Recipe | None = None) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model, x, recipe=recipe or Recipe.int8(), target="reference")
        api.calibrate(made, [x])
    return api.graphs(made)[""]


def another_process() -> None:
    score_cache._KEPT.clear()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_found_again(folder: Path) -> None:
    file = folder / "deep" / "scores.json"
    cache = ScoreCache(file)
    cache["0 only a weight 4"] = (1.5, 2.0)
    cache["1 only a weight 4"] = (math.inf, 0.1 + 0.2)
    assert not file.exists()
    cache.save()
    again = ScoreCache(file)
    assert again["0 only a weight 4"] == (1.5, 2.0) and again["1 only a weight 4"] == (math.inf, 0.1 + 0.2)
    assert "0 only a weight 2" not in again
    assert [p.name for p in file.parent.iterdir()] == ["scores.json"]  # no parts are left


def test_what_another_process_saved_meanwhile_stays(folder: Path) -> None:
    file = folder / "scores.json"
    mine, other = ScoreCache(file), ScoreCache(file)
    other["b"] = (2.0,)
    other.save()
    mine["a"] = (1.0,)
    mine.save()
    assert ScoreCache(file)["a"] == (1.0,) and ScoreCache(file)["b"] == (2.0,)


def test_nothing_new_writes_nothing(folder: Path) -> None:
    file = folder / "scores.json"
    cache = ScoreCache(file)
    cache.save()
    assert not file.exists()
    cache["a"] = (1.0,)
    cache.save()
    file.unlink()
    cache.save()
    assert not file.exists()


@pytest.mark.parametrize("text", ['{"a": [1.0', "", "[1, 2]", '{"a": 3}', '{"a": ["x"]}', "\x00\xff", "null"])
def test_torn_files_are_made_anew(folder: Path, text: str) -> None:
    file = folder / "scores.json"
    file.write_bytes(text.encode("latin-1"))
    cache = ScoreCache(file)
    assert "a" not in cache
    cache["b"] = (1.0,)
    cache.save()
    assert json.loads(file.read_text()) == {"b": [1.0]}


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    (folder / "file").write_text("")
    cache = ScoreCache(folder / "file" / "scores.json")
    cache["a"] = (1.0,)
    cache.save()
    assert cache["a"] == (1.0,)


# --- by content -------------------------------------------------------------------------------------------------------


def test_one_cache_for_one_content_and_judge(folder: Path) -> None:
    cache = cache_for("content", Kl(), on_disk=True)
    cache["a"] = (1.0,)
    assert cache_for("content", Kl(), on_disk=True) is cache
    for content, judge in (("content", Sqnr()), ("content", "fisher"), ("other", Kl())):
        assert "a" not in cache_for(content, judge, on_disk=True)
    cache.save()
    another_process()
    assert cache_for("content", Kl(), on_disk=True)["a"] == (1.0,)
    assert cache_dir() == folder and len(list((folder / "scores").glob("*.json"))) == 1


def test_in_memory_only() -> None:
    cache = cache_for("content", Kl(), on_disk=False)
    assert cache.file is None
    cache["a"] = (1.0,)
    cache.save()
    another_process()
    assert "a" not in cache_for("content", Kl(), on_disk=False)


def test_memory_holds_the_latest_contents() -> None:
    first = cache_for("0", Kl(), on_disk=False)
    for i in range(1, score_cache._MOST):
        cache_for(str(i), Kl(), on_disk=False)
    assert cache_for("0", Kl(), on_disk=False) is first
    cache_for("one too many", Kl(), on_disk=False)
    assert len(score_cache._KEPT) == score_cache._MOST
    assert cache_for("0", Kl(), on_disk=False) is first  # it was used last but one


def test_the_content_is_graph_weights_ranges_and_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    gm = calibrated(model)
    same = content_of(gm, [X])
    assert content_of(calibrated(copy.deepcopy(model)), [X.clone()]) == same
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight[0, 0] *= 1 + 1e-6
    other = nn.Sequential(model[0], nn.GELU(), model[2])
    default = Recipe.int8().default
    assert default.activation is not None
    observed = replace(default, activation=replace(default.activation, observer=MinMax))
    contents = {
        "data": content_of(gm, [X.flip(0)]),
        "less data": content_of(gm, [X[:8]]),
        "split data": content_of(gm, [X[:8], X[8:]]),
        "weights": content_of(calibrated(twin), [X]),
        "graph": content_of(calibrated(other), [X]),
        "ranges": content_of(calibrated(model, X * 2), [X]),
        "observers": content_of(calibrated(model, X, Recipe("mine", observed)), [X]),
        "specs": content_of(calibrated(model, X, Recipe.int8().set("0", weight=4)), [X]),
    }
    assert len({same, *contents.values()}) == len(contents) + 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(4, 3).t(),
        torch.randn(3).bfloat16(),
        torch.arange(3),
    ],
    ids=["scalar", "empty", "bool", "transposed", "bfloat16", "int64"],
)
def test_tensors_of_any_kind_have_content(tensor: torch.Tensor) -> None:
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    assert content_of(gm, [tensor]) == content_of(gm, [tensor.clone()]) != content_of(gm, [])
