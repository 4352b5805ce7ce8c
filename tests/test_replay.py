"""Suffix replay: the same bits as a whole run of the user's model, for less."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from qfx import api
from qfx.errors import QfxWarning
from qfx.layers import Layer, layers_of
from qfx.operators import mutates
from qfx.replay import Replay
from qfx.scan import _without, changes_of, together
from qfx.structure import flatten
from qfx.widths import Rounders, Trial

WIDTHS = (2, 4, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.left(x) + self.right(x)).mean((2, 3)))


class Branches(nn.Module):
    """Two branches that meet in a cat, and a dict of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(3, 2, 1), nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        both = torch.cat([self.a(x), self.b(x).relu()], 1)
        return {"logits": self.c(both), "more": (both.amax(1), self.a(x.flip(2)))}


class Tied(nn.Module):
    """A module that is used twice, another with the same weight, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(self.a(x).relu()).relu()
        return self.head(self.b(y)), y


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (Residual, torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))),
    "branches": (Branches, torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))),
    "tied": (Tied, torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(3))),
}


class Case:
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.gm = calibrated(model, x)
        self.layers = layers_of(self.gm)
        self.rounders = Rounders(self.gm)

    def changes(self, *trials: Trial) -> Any:
        return together(changes_of(self.layers, trial, self.rounders) for trial in trials)

    def layer(self, key: str) -> Layer:
        return next(layer for layer in self.layers if layer.key == key)

    def expected(self, *trials: Trial) -> list[Tensor]:
        """The outputs of the user's own module, its weights replaced and its layers' inputs rounded by hooks."""
        with rounded(self, trials) as model, torch.no_grad():
            return flatten(model(self.x))[0]

    def trials(self) -> list[Trial]:
        return [Trial(x.key, part, b) for x in self.layers for part in ("weight", "activation") for b in WIDTHS]


def calibrated(model: nn.Module, x: Tensor) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model, x, target="reference")
        api.calibrate(made, [x])
    return api.graphs(made)[""]


@contextmanager
def rounded(case: Case, trials: tuple[Trial, ...]) -> Iterator[nn.Module]:
    model = copy.deepcopy(case.model)
    for trial in trials:
        layer = case.layer(trial.key)
        module = model.get_submodule(layer.path)
        if trial.part == "weight":
            module.weight = nn.Parameter(case.rounders.weight(layer, trial.bits))
            continue
        calls = iter(layer.calls)

        def round_it(_: Any, args: Any, calls: Any = calls, bits: int = trial.bits) -> Any:
            return (case.rounders.data(next(calls), 0, bits)(args[0]),)

        module.register_forward_pre_hook(round_it)
    yield model


@pytest.fixture(scope="module", params=list(NETS))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    make, x = NETS[request.param]
    return Case(make().eval(), x)


def same(found: Any, expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_trial_is_a_whole_run_bit_for_bit(case: Case) -> None:
    replay = Replay(case.gm, (case.x,))
    float_outputs = case.expected()
    assert same(replay.outputs, float_outputs)
    for trial in case.trials():
        found = replay.run(case.changes(trial))
        assert same(found, case.expected(trial)), trial
        if trial.bits == 2:
            assert not same(found, float_outputs), trial
    assert same(replay.run({}), float_outputs)  # what was kept is unharmed


@pytest.mark.parametrize("part", ["weight", "activation"])
def test_all_but_one(case: Case, part: str) -> None:
    trials = [Trial(layer.key, part, 3) for layer in case.layers]
    base = case.changes(*trials)
    replay = Replay(case.gm, (case.x,), base)
    assert same(replay.outputs, case.expected(*trials))
    for trial in trials:
        others = tuple(t for t in trials if t != trial)
        assert same(replay.run(_without(base, case.changes(trial))), case.expected(*others)), trial


def test_only_what_follows_is_computed_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[fx.Node] = []
    whole = Replay._call
    monkeypatch.setattr(Replay, "_call", lambda self, n, *rest: (called.append(n), whole(self, n, *rest))[1])
    replay = Replay(case.gm, (case.x,))
    assert len(called) == len(set(called)) == sum(n.op != "placeholder" for n in case.gm.graph.nodes)
    after = nx.DiGraph((n, user) for n in case.gm.graph.nodes for user in n.users)
    for layer in case.layers:
        called.clear()
        replay.run(case.changes(Trial(layer.key, "weight", 4)))
        behind = {n for call in layer.calls for n in (call, *nx.descendants(after, call))}
        assert set(called) == behind and len(called) == len(behind)


@settings(max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(WIDTHS), st.booleans()), max_size=6))
def test_any_changes_in_any_order(drawn: list[tuple[int, int, bool]]) -> None:
    case, replay = _residual()
    picked = {(i % len(case.layers), w): b for i, b, w in drawn}
    trials = [Trial(case.layers[i].key, "weight" if w else "activation", b) for (i, w), b in picked.items()]
    assert same(replay.run(case.changes(*trials)), case.expected(*trials))


_KEPT: list[tuple[Case, Replay]] = []


def _residual() -> tuple[Case, Replay]:
    if not _KEPT:
        make, x = NETS["residual"]
        case = Case(make().eval(), x)
        _KEPT.append((case, Replay(case.gm, (x,))))
    return _KEPT[0]


# --- graphs that write in place ---------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Writes to a layer's result through a view of it, and to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x[:, 0].mul_(2.0)
        y = self.a(x)
        y[:, :2].add_(1.0)
        return self.d(self.c(self.b(y).relu()).relu()), y


def test_graphs_that_write_in_place_are_run_as_a_whole() -> None:
    x = torch.randn(5, 6)
    given_x = x.clone()
    model = Writing().eval()
    gm = calibrated(model, x.clone())
    assert any(mutates(n) for n in gm.graph.nodes)  # else this tests nothing
    layers, rounders = layers_of(gm), Rounders(gm)
    replay = Replay(gm, (x,))
    assert torch.equal(x, given_x)
    wanted = [t.clone() for t in replay.outputs]
    assert len(layers) >= 2
    for layer in layers:
        twin = copy.deepcopy(model)
        twin.get_submodule(layer.path).weight = nn.Parameter(rounders.weight(layer, 2))
        with torch.no_grad():
            expected = list(twin(x.clone()))
        for _ in range(2):
            assert same(replay.run(changes_of(layers, Trial(layer.key, "weight", 2), rounders)), expected)
        assert not same(replay.outputs, expected)
    assert torch.equal(x, given_x) and same(replay.outputs, wanted)
