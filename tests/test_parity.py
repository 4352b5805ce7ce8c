"""Lockstep: a target that is wrong in one leaf is seen there and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx.calling import flat_inputs
from qfx.parity import converted, lockstep
from qfx.patterns import NoMatch
from qfx.targets import AnchorRegion, Leaf, PointRegion, Target
from qfx.targets.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


class Off(Leaf):
    """A leaf whose result is ``by`` too large, and which writes to its inputs as some kernels do."""

    def __init__(self, leaf: Leaf, by: float) -> None:
        super().__init__()
        self.leaf, self.by, self.kernel = leaf, by, "off"

    def forward(self, *inputs: Tensor) -> Tensor:
        y: Tensor = self.leaf(*inputs)
        for x in inputs:
            x.zero_()
        return (y.double() + self.by).to(y.dtype)


@dataclass(frozen=True)
class Wrong(Reference):
    """The reference, but convolutions are off by ``integer`` levels and linear layers by ``real``."""

    integer: float = 2.0
    real: float = 0.0
    name: ClassVar[str] = "wrong"

    def lower_anchor(self, region: AnchorRegion) -> Any:
        leaf = super().lower_anchor(region)
        assert not isinstance(leaf, NoMatch)
        return Off(leaf, self.real if region.op.name == "linear" else self.integer)


@dataclass(frozen=True)
class Nothing(Reference):
    """Declines everything."""

    def lower_anchor(self, region: AnchorRegion) -> Any:
        return NoMatch("not today")

    def lower_point(self, region: PointRegion) -> Any:
        return NoMatch("not today")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def graph() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    x = torch.randn(2, 3, 8, 8)
    gm = converted(net(), (x,), target="reference")
    assert isinstance(gm, fx.GraphModule)
    return gm, flat_inputs(gm, (x,), {})


def test_reference_equals_itself(graph: tuple[fx.GraphModule, tuple[Tensor, ...]]) -> None:
    found = lockstep(*graph, "reference")
    assert [(d.layer, d.lsb, d.relative) for d in found] == [("0", 0, None), ("2", 0, None), ("4", None, 0.0)]


def test_differences_are_not_carried_along(graph: tuple[fx.GraphModule, tuple[Tensor, ...]]) -> None:
    target: Target = Wrong(integer=2.0, real=0.5)
    first, second, last = lockstep(*graph, target)
    assert [first.kernel, first.lsb, second.lsb] == ["off", 2, 2], "the second is fed what the first made, and adds 2"
    assert last.lsb is None and last.relative is not None and last.relative > 0.01


def test_the_graph_stays_as_it_is(graph: tuple[fx.GraphModule, tuple[Tensor, ...]]) -> None:
    gm, inputs = graph
    before, weights = str(gm.graph), {name: t.clone() for name, t in gm.state_dict().items()}
    lockstep(gm, inputs, "reference")
    assert str(gm.graph) == before
    assert all(torch.equal(t, weights[name]) for name, t in gm.state_dict().items())


def test_a_leaf_without_counterpart_is_an_error(graph: tuple[fx.GraphModule, tuple[Tensor, ...]]) -> None:
    with pytest.raises(qfx.VerifyError, match="no counterpart in the reference"):
        lockstep(*graph, "reference", reference=Nothing())
    assert lockstep(*graph, Nothing()) == (), "what the target declines is not compared"


def test_a_lowered_graph_is_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    gm = qfx.quantize(net(), (x,), target="reference", verbose=False)
    assert isinstance(gm, fx.GraphModule)
    with pytest.raises(qfx.VerifyError, match="this one is LOWERED"):
        lockstep(gm, (x,), "reference")
