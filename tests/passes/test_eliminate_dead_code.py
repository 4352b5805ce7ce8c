"""What nobody reads goes, with its tensors."""

from __future__ import annotations

import torch
from torch import fx, nn

from qfx.passes import Canonicalize, EliminateDeadCode
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def unread(self, x):
    y = self.a(x).sin().cos()  # noqa: F841  the unread value is the point
    return self.b(x)


def test_golden(net) -> None:
    model = net(unread, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    gm = run_passes(model, X, Canonicalize(), EliminateDeadCode())
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %b_weight: f32[4, 4] = @b.weight  {layer b}
        %b_bias: f32[4] = @b.bias  {layer b}
        %linear_1: f32[*, 4] = linear(%x, %b_weight, %b_bias)  {layer b}
        return (%linear_1)
    """)
    assert sorted(name for name, _ in gm.named_parameters()) == ["b.bias", "b.weight"]
    assert not hasattr(gm, "a")
    assert_same_numerics(model, gm, X)


def test_nothing_to_do(net) -> None:
    gm = run_passes(net(lambda self, x: self.a(x), a=nn.Linear(4, 4)), X, EliminateDeadCode())
    assert EliminateDeadCode().run(gm) == 0


def test_keeps_inputs_that_nobody_reads(net) -> None:
    gm = run_passes(net(lambda self, x, y: x.relu()), (X, X), EliminateDeadCode())
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "y"]


def test_keeps_writes(net) -> None:
    def forward(self, x):
        self.state.fill_(0.25)
        return x.relu()

    gm = run_passes(net(forward, state=nn.Parameter(torch.ones(4), requires_grad=False)), X, EliminateDeadCode())
    gm(X)
    assert torch.equal(gm.state, torch.full((4,), 0.25))


def test_keeps_everything_below_a_called_module() -> None:
    root = nn.Module()
    root.leaf = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    root.spare = nn.Sequential(nn.Linear(4, 4))
    graph = fx.Graph()
    graph.output(graph.call_module("leaf", (graph.placeholder("x"),)))
    gm = fx.GraphModule(root, graph)
    gm.add_module("spare", root.spare)
    assert EliminateDeadCode().run(gm) > 0
    assert {name.partition(".")[0] for name in gm.state_dict()} == {"leaf"}
