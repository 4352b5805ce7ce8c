"""Times of every layer's choices, with the target's own kernels."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx import api
from qfx.errors import QfxWarning
from qfx.layers import layers_of
from qfx.measure import Measurement, facts_of
from qfx.meta import graph_info, update_graph
from qfx.passes import MeasureLatency, measure_latency
from qfx.pipeline import run_pass
from qfx.printer import show
from qfx.recipe import Recipe
from qfx.sensitivity_table import Sensitivity
from qfx.targets import X86, Reference, Target


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x) + self.right(self.right(x)))
        x = self.head(x.flatten(2).transpose(1, 2))
        return torch.matmul(x, x.transpose(1, 2))


X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def measured(target: Target, recipe: Recipe | None = None) -> fx.GraphModule:
    """A calibrated graph with a sensitivity that has no scores yet."""
    recipe = recipe or Recipe.int8()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(Net().eval(), X, recipe=recipe, target=target)
        api.keep_rows(made, 4)
        api.calibrate(made, [X, X])
    gm = api.graphs(made)[""]
    facts = tuple(facts_of(gm, y, Measurement((2, 8), (8,), "kl"), recipe, target) for y in layers_of(gm))
    groups = tuple((i,) for i in range(len(facts)))
    found = Sensitivity("Net", recipe, target.name, "kl", "nats", "only", 4, facts, groups, {}, {})
    update_graph(gm, sensitivity=found)
    return gm


def times(gm: fx.GraphModule) -> dict[str, dict[str, float]]:
    found = graph_info(gm).sensitivity
    assert found is not None
    return {layer.key: {str(choice): t for choice, t in layer.times} for layer in found.layers}


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, dict[str, float]]]:
    """Times that are whole numbers: the i-th operator of a lowered graph takes 2**i milliseconds."""
    seen: list[tuple[fx.GraphModule, dict[str, float]]] = []

    def fake(gm: fx.GraphModule, inputs: Any) -> dict[str, float]:
        seen.append((gm, {n.name: 2.0**i for i, n in enumerate(gm.graph.nodes)}))
        return seen[-1][1]

    monkeypatch.setattr(measure_latency, "_times", fake)
    return seen


@pytest.mark.parametrize("target", [Reference(), X86()], ids=lambda t: t.name)
def test_every_choice_of_every_layer_has_a_time(target: Target) -> None:
    gm = measured(target)
    before, weights = show(gm), copy.deepcopy(gm.state_dict())
    assert run_pass(MeasureLatency(target), gm) == len(layers_of(gm)) >= 4
    found = graph_info(gm).sensitivity
    assert found is not None
    for layer in found.layers:
        assert set(dict(layer.times)) == set(layer.choices)
        assert all(t > 0.0 for _, t in layer.times), layer.key
        assert layer.costs(layer.given)["latency_ms"] == dict(layer.times)[layer.given]
    assert show(gm) == before
    assert all(torch.equal(a, weights[name]) for name, a in gm.state_dict().items())
    assert run_pass(MeasureLatency(target), gm) == 0  # they are there


def test_a_layers_time_is_that_of_what_became_of_it(in_turn: list[tuple[fx.GraphModule, dict[str, float]]]) -> None:
    gm = measured(Reference())
    run_pass(MeasureLatency(Reference()), gm)
    assert len(in_turn) == 4  # 2 and 8 bits, float, and the product's own 8 bits
    found = times(gm)
    assert {key: set(entry) for key, entry in found.items()} == {
        **{f"{name}:conv2d": {"W2A8", "W8A8", "float"} for name in ("stem", "left", "right")},
        "head:linear": {"W2A8", "W8A8", "float"},
        "matmul": {"WFA8", "float"},
    }
    # the module that is called twice counts twice: two bits are set in its sum of powers of two
    assert all(bin(int(t)).count("1") == 2 for t in found["right:conv2d"].values())
    assert all(bin(int(t)).count("1") == 1 for t in found["stem:conv2d"].values())


def test_layers_that_are_fixed_keep_their_bits(in_turn: list[tuple[fx.GraphModule, dict[str, float]]]) -> None:
    gm = measured(Reference(), Recipe.int8().set("left", weight=4))
    run_pass(MeasureLatency(Reference()), gm)
    found = times(gm)["left:conv2d"]
    assert "W4A8" in found


def test_a_larger_layer_takes_longer() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 4096)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(self.small(x).relu())

    x = torch.randn(64, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(Wide().eval(), x, target="reference")
        api.keep_rows(made, 4)
        api.calibrate(made, [x])
    gm = api.graphs(made)[""]
    facts = tuple(facts_of(gm, y, Measurement((8,), (8,)), Recipe.int8(), Reference()) for y in layers_of(gm))
    update_graph(
        gm,
        sensitivity=Sensitivity(
            "Wide", Recipe.int8(), "reference", "kl", "nats", "only", 4, facts, ((0,), (1,)), {}, {}
        ),
    )
    run_pass(MeasureLatency(Reference()), gm)
    found = times(gm)
    assert all(found["large:linear"][choice] > found["small:linear"][choice] for choice in ("W8A8", "float"))

