"""In-place operators become plain ones only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.meta import graph_info
from qfx.operators import mutates
from qfx.passes import Canonicalize, Functionalize
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def add_relu(self, x):
    return (x * 2).add_(1.0).relu_()


def test_rewrites_a_chain_on_a_fresh_tensor(net) -> None:
    gm = run_passes(net(add_relu), X, Functionalize())
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %mul: f32[*, 4] = mul.Tensor(%x, 2)
        %add_: f32[*, 4] = add.Tensor(%mul, 1.0)
        %relu_: f32[*, 4] = relu(%add_)
        return (%relu_)
    """)
    assert graph_info(gm).notes == ()


def test_rewrites_a_write_to_a_fresh_view(net) -> None:
    gm = run_passes(net(lambda self, x: (x * 2).view(-1).relu_()), X, Functionalize())
    assert not any(mutates(n) for n in gm.graph.nodes)
    assert graph_info(gm).notes == ()


def test_keeps_overload_and_keyword_arguments(net) -> None:
    gm = run_passes(net(lambda self, x: (x * 2).add_(x, alpha=3)), X, Functionalize())
    (add,) = [n for n in gm.graph.nodes if n.name == "add_"]
    assert add.target is torch.ops.aten.add.Tensor and add.kwargs == {"alpha": 3}


def test_in_place_dropout_and_what_follows_it_become_integers(net) -> None:
    model = net(
        lambda self, x: self.b(self.dropout(self.a(x).relu_())),
        a=nn.Linear(4, 4),
        dropout=nn.Dropout(0.5, inplace=True),
        b=nn.Linear(4, 2),
    )
    gm = run_passes(model, X, Functionalize(), Canonicalize())
    assert [n.name for n in gm.graph.nodes if n.op == "call_function"] == ["linear", "relu_", "linear_1"]


def view_is_read(self, x):
    y = x * 2
    y.view(-1).relu_()
    return y


def view_was_made(self, x):
    y = x * 2
    view = y.view(-1)
    y.relu_()
    return view


def part_is_read(self, x):
    y = x * 2
    left, _ = y.chunk(2, 1)
    left.relu_()
    return y


def dropout_is_no_copy(self, x):
    y = x * 2
    return y + F.dropout(y, 0.5, self.training).relu_()


def writes_to_input(self, x):
    return x.relu_()


def writes_to_view_of_input(self, x):
    return x[:, :2].relu_()


def writes_to_buffer(self, x):
    self.state.fill_(0.5)
    return x + self.state


def keeps_dtype(self, x):
    return (x.to(torch.bfloat16) * 2).add_(x)


NEGATIVES: list[tuple[Callable[..., torch.Tensor], str]] = [
    (writes_to_input, "relu_: it writes to x, which is not its own"),
    (writes_to_view_of_input, "relu_: it writes to x, which is not its own"),
    (writes_to_buffer, "fill_: it writes to state, which is not its own"),
    (view_is_read, "relu_: output reads mul after it was written to"),
    (view_was_made, "relu_: view is a view of mul"),
    (part_is_read, "relu_: output reads mul after it was written to"),
    (dropout_is_no_copy, "relu_: add reads mul after it was written to"),
    (keeps_dtype, "add_: it keeps torch.bfloat16, its plain twin gives torch.float32"),
]


@pytest.mark.parametrize(("forward", "note"), NEGATIVES, ids=[f.__name__ for f, _ in NEGATIVES])
def test_declines(net, forward: Callable[..., torch.Tensor], note: str) -> None:
    """The operator stays, the note says why, and numbers and the caller's own tensors are as before."""
    parts = {"state": nn.Parameter(torch.ones(4), requires_grad=False)} if "state" in note else {}
    gm = run_passes(net(forward, **parts), X, Functionalize(), Canonicalize())
    assert ("in place", note) in graph_info(gm).notes
    assert any(mutates(n) for n in gm.graph.nodes)
    assert_same_numerics(net(forward, **{k: v.clone() for k, v in parts.items()}), gm, X)


@pytest.mark.parametrize("forward", [add_relu, writes_to_input, view_is_read])
def test_numerics(net, forward: Callable[..., torch.Tensor]) -> None:
    gm = run_passes(net(forward), X, Functionalize())
    mine, theirs = X.clone(), X.clone()
    assert_same_numerics(net(forward), gm, X)
    gm(mine), net(forward)(theirs)
    assert torch.equal(mine, theirs)
