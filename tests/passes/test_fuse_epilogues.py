"""Who runs inside whose kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.meta import graph_info, info
from qfx.operators import name_of
from qfx.passes import Canonicalize, Functionalize, FuseEpilogues
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
PASSES = (Functionalize(), Canonicalize(), FuseEpilogues())


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


def groups(gm: Any) -> set[tuple[str, ...]]:
    return {info(n).fused for n in gm.graph.nodes} - {()}


def residual(self, x):
    return torch.relu(self.a(x) + x)


def test_golden(net) -> None:
    gm = run_passes(net(residual, a=conv()), X, *PASSES)
    assert_graph(gm, """
        %x: f32[*, 4, 5, 5] = input
        %a_weight: f32[4, 4, 1, 1] = @a.weight  {layer a}
        %a_bias: f32[4] = @a.bias  {layer a}
        %conv2d: f32[*, 4, 5, 5] = conv2d(%x, %a_weight, %a_bias)  {layer a; fused conv2d+add+relu}
        %add: f32[*, 4, 5, 5] = add.Tensor(%conv2d, %x)  {fused conv2d+add+relu}
        %relu: f32[*, 4, 5, 5] = relu(%add)  {fused conv2d+add+relu}
        return (%relu)
    """)


ACTIVATIONS = {
    "relu": F.relu,
    "hardtanh": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(-1.0, 1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(net, name: str) -> None:
    model = net(lambda self, x: ACTIVATIONS[name](self.a(x)), a=conv())
    gm = run_passes(model, X, *PASSES)
    (group,) = groups(gm)
    assert [name_of(n) for n in gm.graph.nodes if n.name in group] == ["conv2d", name]
    assert_same_numerics(model, gm, X)


@pytest.mark.parametrize(
    ("forward", "group"),
    [
        (lambda self, x: self.a(x) + x, ("conv2d", "add")),
        (lambda self, x: x + self.a(x), ("conv2d", "add")),
        (lambda self, x: F.relu(x + self.a(x)), ("conv2d", "add", "relu")),
        (lambda self, x: self.a(x).add_(x).relu_(), ("conv2d", "add_", "relu_")),
        (lambda self, x: F.conv_transpose2d(x, self.a.weight).relu(), ("conv_transpose2d", "relu")),
        (lambda self, x: F.relu(F.linear(x.flatten(1), self.w)), ("linear", "relu")),
    ],
)
def test_groups(net, forward: Any, group: tuple[str, ...]) -> None:
    model = net(forward, a=conv(), w=nn.Parameter(torch.randn(3, 100)))
    gm = run_passes(model, X, *PASSES)
    assert groups(gm) == {group}
    assert_same_numerics(model, gm, X)


def test_the_later_of_two_convolutions_takes_the_add(net) -> None:
    """Its kernel has both operands; the earlier one's would run before the other exists."""
    for forward in (lambda self, x: self.a(x) + self.b(x), lambda self, x: self.b(x).add(self.a(x))):
        gm = run_passes(net(forward, a=conv(), b=conv()), X, *PASSES)
        assert groups(gm) == {("conv2d_1", "add")}


def test_a_second_run_changes_nothing(net) -> None:
    gm = run_passes(net(residual, a=conv()), X, *PASSES, FuseEpilogues())
    assert groups(gm) == {("conv2d", "add", "relu")}


def two_readers(self, x):
    y = self.a(x)
    return F.relu(y) * y


def scaled_add(self, x):
    return torch.add(self.a(x), x, alpha=2)


def other_shape(self, x):
    return self.a(x) + x.mean()


def adds_a_number(self, x):
    return self.a(x) + 1.0


def doubled(self, x):
    y = self.a(x)
    return y + y


def computed_bounds(self, x):
    return torch.clamp(self.a(x), x.amin(), x.amax())


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (two_readers, "activation: conv2d: it has a second user, mul"),
        (scaled_add, "add: add: alpha scales the second operand"),
        (other_shape, "add: add: its operands have different shapes"),
        (adds_a_number, "add: add: it adds a number"),
        (doubled, "add: add: it adds the tensor to itself"),
        (computed_bounds, "activation: clamp: its bounds are computed"),
    ],
)
def test_declines(net, forward: Any, note: str) -> None:
    gm = run_passes(net(forward, a=conv()), X, *PASSES)
    assert ("not fused", note) in graph_info(gm).notes
    assert groups(gm) == set()


def test_a_relu_that_stays_in_place_is_not_fused(net) -> None:
    def forward(self, x):
        y = self.a(x)
        y.view(-1).relu_()
        return y

    assert groups(run_passes(net(forward, a=conv()), X, *PASSES)) == set()
