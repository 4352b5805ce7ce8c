"""One spelling for one operation."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.meta import graph_info, info
from qfx.operators import name_of
from qfx.passes import Canonicalize
from qfx.printer import show
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def check(net, forward, *, example=X, **parts):
    """Run the pass, compare numbers, return the graph."""
    model = net(forward, **parts)
    gm = run_passes(model, example, Canonicalize())
    assert_same_numerics(model, gm, example, tolerance=1e-6)
    return gm


def test_dropout_goes(net) -> None:
    gm = check(net, lambda self, x: F.dropout(x, 0.5, self.training).relu())
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %relu: f32[*, 4] = relu(%x)
        return (%relu)
    """)


def test_copies_that_change_nothing_go(net) -> None:
    gm = check(net, lambda self, x: x.to(torch.float32).detach().relu())
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %relu: f32[*, 4] = relu(%x)
        return (%relu)
    """)


def test_whole_slices_go_and_parts_stay(net) -> None:
    gm = check(net, lambda self, x: x[:, 1:3].relu() + x[:, ::2])
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %slice_2: f32[*, 2] = slice.Tensor(%x, 1, 1, 3)
        %relu: f32[*, 2] = relu(%slice_2)
        %slice_4: f32[*, 2] = slice.Tensor(%x, 1, 0, 9223372036854775807, 2)
        %add: f32[*, 2] = add.Tensor(%relu, %slice_4)
        return (%add)
    """)


def test_padding_by_nothing_goes(net) -> None:
    gm = check(net, lambda self, x: F.pad(F.pad(x, (0, 0, 0, 0)).relu(), (0, 1)).sigmoid())
    assert [name_of(n) for n in gm.graph.nodes if n.op == "call_function"] == ["relu", "pad", "sigmoid"]


def test_addmm_is_linear(net) -> None:
    gm = check(net, lambda self, x: torch.addmm(self.b, x, self.w.t()), w=weight(5, 4), b=weight(5))
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %w: f32[5, 4] = @w
        %b: f32[5] = @b
        %addmm_1: f32[*, 5] = linear(%x, %w, %b)
        return (%addmm_1)
    """)


@pytest.mark.parametrize("shape", [(1,), (1, 5), ()])
def test_addmm_with_a_broadcast_term_is_linear_and_add(net, shape: tuple[int, ...]) -> None:
    gm = check(net, lambda self, x: torch.addmm(self.b, x, self.w), w=weight(4, 5), b=weight(*shape))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.t.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.add.Tensor,
    ]


def test_addmm_with_a_computed_term_is_linear_and_add(net) -> None:
    gm = check(net, lambda self, x: torch.addmm(x.relu(), x, self.w.t()), w=weight(4, 4))
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %relu: f32[*, 4] = relu(%x)
        %w: f32[4, 4] = @w
        %addmm_linear: f32[*, 4] = linear(%x, %w, None)
        %addmm_1: f32[*, 4] = add.Tensor(%addmm_linear, %relu)
        return (%addmm_1)
    """)


@pytest.mark.parametrize("times", [torch.mm, torch.matmul])
def test_product_with_a_parameter_is_linear(net, times) -> None:
    gm = check(net, lambda self, x: times(x, self.w), w=weight(4, 5))
    assert_graph(gm, f"""
        %x: f32[*, 4] = input
        %w: f32[4, 5] = @w
        %t_default: f32[5, 4] = t(%w)
        %{times.__name__}_1: f32[*, 5] = linear(%x, %t_default, None)
        return (%{times.__name__}_1)
    """)


@pytest.mark.parametrize(
    "turn",
    [
        lambda w: w.t(),
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.transpose(0, 1),
        lambda w: w.transpose(1, 0),
        lambda w: w.transpose(-1, -2),
        lambda w: w.transpose(-2, -1),
        lambda w: w.permute(1, 0),
    ],
)
def test_a_transposed_parameter_is_read_as_it_is(net, turn) -> None:
    gm = check(net, lambda self, x: x @ turn(self.w), w=weight(5, 4))
    (linear,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert linear.args[1].op == "get_attr"


def test_a_permute_that_turns_nothing_is_no_transpose(net) -> None:
    gm = check(net, lambda self, x: x @ self.w.permute(0, 1), w=weight(4, 5))
    assert "t(%permute)" in show(gm)


def test_relu6_is_hardtanh(net) -> None:
    gm = check(net, lambda self, x: F.relu6(x * 9))
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %mul: f32[*, 4] = mul.Tensor(%x, 9)
        %relu6: f32[*, 4] = hardtanh(%mul, 0.0, 6.0)
        return (%relu6)
    """)


def test_padding_by_name_is_a_number(net) -> None:
    gm = check(
        net,
        lambda self, x: self.valid(self.same(x)),
        example=IMAGE,
        same=nn.Conv2d(3, 2, (3, 5), padding="same", dilation=(2, 1), bias=False),
        valid=nn.Conv2d(2, 2, 2, padding="valid", stride=2),
    )
    assert_graph(gm, """
        %x: f32[*, 3, 6, 6] = input
        %same_weight: f32[2, 3, 3, 5] = @same.weight  {layer same}
        %conv2d_2: f32[*, 2, 6, 6] = conv2d(%x, %same_weight, None, [1, 1], [2, 2], [2, 1], 1)  {layer same}
        %valid_weight: f32[2, 2, 2, 2] = @valid.weight  {layer valid}
        %valid_bias: f32[2] = @valid.bias  {layer valid}
        %conv2d_3: f32[*, 2, 3, 3] = conv2d(%conv2d_2, %valid_weight, %valid_bias, [2, 2], [0, 0], [1, 1], 1)  {layer valid}
        return (%conv2d_3)
    """)


def test_records_where_nodes_come_from(net) -> None:
    gm = check(net, lambda self, x: self.fc(x).relu(), fc=nn.Linear(4, 4))
    assert {n.name: info(n).origin for n in gm.graph.nodes if n.op == "call_function"} == {"linear": "fc", "relu": ""}


def one_term(self, x):
    return torch.addmm(self.b, x, self.w, alpha=2.0)


def product_of_inputs(self, x):
    return x.t() @ x


def product_of_matrices(self, x):
    return x @ self.stack


def active_dropout(self, x):
    return F.dropout(x, 0.0001, True)


def other_dtype(self, x):
    return x.to(torch.float64)


def written_copy(self, x):
    return x.to(torch.float32, copy=True).add_(1.0)


def written_slice(self, x):
    return x.exp()[:].add_(1.0)


def other_memory_format(self, x):
    return x.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (one_term, "addmm: addmm: alpha or beta scales its terms"),
        (product_of_inputs, "mm: matmul: its right operand is computed from inputs"),
        (product_of_matrices, "mm: matmul: its right operand has not two dimensions"),
        (active_dropout, "dropout: dropout: the model drops out in eval mode too"),
        (other_dtype, "no-op: to: it changes dtype or device"),
        (written_copy, "no-op: to: an operator writes to it or to what it copies"),
        (written_slice, "whole-slice: slice_1: an operator writes to it"),
        (other_memory_format, "no-op: to: it changes the memory format"),
    ],
)
def test_declines(net, forward, note: str) -> None:
    model = net(forward, w=weight(4, 5), b=weight(5), stack=weight(2, 4, 5))
    before = X.clone()
    gm = run_passes(model, X, Canonicalize())
    assert ("not canonicalized", note) in graph_info(gm).notes
    gm(X)
    assert torch.equal(X, before)


def test_declines_padding_that_is_not_the_same_on_both_sides(net) -> None:
    gm = check(net, lambda self, x: self.conv(x), example=IMAGE, conv=nn.Conv2d(3, 2, 2, padding="same"))
    assert graph_info(gm).notes == (
        ("not canonicalized", "padding: conv2d: padding 'same' is not the same on both sides"),
    )
