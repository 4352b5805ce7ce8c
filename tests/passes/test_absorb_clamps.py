"""FakeQuantize does the relu before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.fake_quant import FakeQuantize
from qfx.training_modules import Absorbed

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1)


def absorbed(gm: fx.GraphModule) -> dict[str, Any]:
    """What each FakeQuantize call clamps, by the name of its node."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    return {n.name: dict(n.kwargs) for n in calls if isinstance(gm.get_submodule(n.target), FakeQuantize) and n.kwargs}


@pytest.mark.parametrize(
    ("activation", "name", "bounds"),
    [
        (F.relu, "relu", {"clamp_min": 0.0}),
        (F.relu6, "relu6", {"clamp_min": 0.0, "clamp_max": 6.0}),
        (F.hardtanh, "hardtanh", {"clamp_min": -1.0, "clamp_max": 1.0}),
        (lambda x: x.clamp(max=0.5), "clamp", {"clamp_max": 0.5}),
    ],
    ids=["relu", "relu6", "hardtanh", "clamp"],
)
def test_every_clamp(net, trained, activation: Any, name: str, bounds: dict[str, float]) -> None:
    model = net(lambda self, x: self.b(activation(self.a(x))), a=conv(), b=conv())
    before, after = trained(model, X, until="follow-training"), trained(model, X)
    assert absorbed(after) == {f"{name}_fake_quant": bounds}
    assert sum(isinstance(m, Absorbed) for m in after.modules()) == 1
    for gm in (before, after):  # the first batch sets the ranges; the second is rounded with them
        gm(X)
    grads = []
    for gm in (before, after):
        x = X.clone().requires_grad_()
        gm(x).square().sum().backward()
        grads.append((gm(X).detach(), x.grad, dict(gm.named_parameters())["a.weight"].grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_relu_with_a_second_reader_stays(net, trained) -> None:
    model = net(lambda self, x: self.b(y := self.a(x).relu()) * y.exp(), a=conv(), b=conv())
    gm = trained(model, X)
    relu = next(n for n in gm.graph.nodes if n.name == "relu")
    assert (relu.op == "call_module") is (len(relu.users) == 1)


def test_a_computed_bound_stays(net, trained) -> None:
    model = net(lambda self, x: self.b(torch.clamp(self.a(x), max=x.amax())), a=conv(), b=conv())
    assert absorbed(trained(model, X)) == {}


def test_a_relu_that_nobody_rounds_stays(net, trained) -> None:
    gm = trained(net(lambda self, x: self.a(x).relu(), a=conv()), X)
    assert absorbed(gm) == {} and any(n.name == "relu" and n.op == "call_function" for n in gm.graph.nodes)
