"""What is known of operators: names, inputs, constants, views, writes, costs."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.capture import capture
from qfx.operators import (
    OPS,
    Kind,
    activations,
    argument,
    is_constant,
    is_floating,
    is_view,
    is_written,
    lookup,
    macs,
    mutates,
    name_of,
    tensor_inputs,
)

aten = torch.ops.aten


def named(graph: fx.Graph) -> dict[str, fx.Node]:
    return {n.name: n for n in graph.nodes}


@pytest.fixture
def g() -> fx.Graph:
    graph = fx.Graph()
    graph.placeholder("x")
    graph.get_attr("w")
    return graph


def call(g: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return g.call_function(target, args, kwargs)


def test_rows_name_operators_that_exist() -> None:
    known = {row for row in OPS if row != "getitem"}
    assert [name for name in sorted(known) if not hasattr(aten, name)] == []


def test_float_rows_have_reasons() -> None:
    assert all(bool(row.reason) == (row.kind is Kind.FLOAT) for row in OPS.values())


def test_names(g: fx.Graph) -> None:
    x = named(g)["x"]
    assert name_of(call(g, aten.add.Tensor, x, 1)) == "add"
    assert name_of(call(g, operator.getitem, x, 0)) == "getitem"
    assert name_of(call(g, torch.ops.qfx.unpack.default, x, 4, True, 8)) == ""
    assert name_of(call(g, operator.mul, x, 2)) == "" and name_of(x) == ""
    assert lookup(x) is None and lookup(call(g, aten.conv2d.default, x, x)) is OPS["conv2d"]


def test_tensor_inputs_are_in_order_with_repetitions(g: fx.Graph) -> None:
    x, w = named(g)["x"], named(g)["w"]
    cat = call(g, aten.cat.default, [w, x, w], 1)
    clamp = call(g, aten.clamp.Tensor, x, max=w)
    assert tensor_inputs(cat) == (w, x, w) and tensor_inputs(clamp) == (x, w)


def test_argument(g: fx.Graph) -> None:
    x = named(g)["x"]
    relu = call(g, aten.dropout.default, x, 0.5, train=False)
    assert [argument(relu, i, name, 7) for i, name in enumerate(("input", "p", "train", "more"))] == [x, 0.5, False, 7]


def test_activations(g: fx.Graph) -> None:
    x, w = named(g)["x"], named(g)["w"]
    index = g.placeholder("index")
    x.meta["val"], w.meta["val"] = torch.zeros(1, 2, 3, 3), torch.zeros(4, 2, 1, 1)
    index.meta["val"] = torch.zeros(2, dtype=torch.long)
    assert activations(call(g, aten.conv2d.default, x, w, w)) == (0,)
    assert activations(call(g, aten.cat.default, [x, w])) == (0, 1)
    assert activations(call(g, aten.index_select.default, x, 1, index)) == (0,)
    split = call(g, aten.split.Tensor, x, 1, 1)
    split.meta["val"] = (torch.zeros(1), torch.zeros(1))
    assert activations(call(g, operator.getitem, split, 0)) == (0,)
    assert is_floating(x) and not is_floating(index) and is_floating(split)


def test_constants(g: fx.Graph) -> None:
    x, w = named(g)["x"], named(g)["w"]
    turned = call(g, aten.t.default, w)
    assert is_constant(w) and is_constant(turned) and is_constant(call(g, aten.mul.Tensor, turned, w))
    assert not is_constant(x) and not is_constant(call(g, aten.mul.Tensor, turned, x))
    assert not is_constant(call(g, aten.zeros.default, [2]))
    assert not is_constant(call(g, aten.rand_like.default, w))


def test_a_model_deeper_than_the_stack(g: fx.Graph) -> None:
    data, constant = named(g)["x"], named(g)["w"]
    for _ in range(2000):
        data, constant = call(g, aten.relu.default, data), call(g, aten.relu.default, constant)
    assert is_constant(constant) and not is_constant(data)


@pytest.mark.parametrize("through", [None, aten.view.default, aten.select.int])
def test_a_tensor_that_is_written_to_is_no_constant(g: fx.Graph, through: Any) -> None:
    w = named(g)["w"]
    double = call(g, aten.mul.Tensor, w, 2)
    assert is_constant(double)
    target = w if through is None else call(g, through, w, *((-1,) if through is aten.view.default else (0, 0)))
    written = call(g, aten.add_.Tensor, target, 1)
    assert is_written(w) and not is_constant(w) and not is_constant(double) and not is_constant(written)


def test_what_a_write_reads_stays_constant(g: fx.Graph) -> None:
    x, w = named(g)["x"], named(g)["w"]
    call(g, aten.add_.Tensor, x, w)
    assert is_constant(w) and is_written(x)


def test_views_and_writes(g: fx.Graph) -> None:
    x = named(g)["x"]
    split = call(g, aten.split.Tensor, x, 1)
    assert is_view(call(g, operator.getitem, split, 0))
    assert not is_view(call(g, operator.getitem, call(g, aten.max.dim, x, 0), 0))
    shaped = [call(g, target, x, [1]) for target in (aten.view.default, aten.reshape.default)]
    for node in (*shaped, call(g, aten.dropout.default, x, 0.5, False)):
        assert is_view(node) and not mutates(node)
    relu_ = call(g, aten.relu_.default, x)
    assert is_view(relu_) and mutates(relu_)
    assert not is_view(call(g, aten.relu.default, x)) and not is_view(x) and not mutates(x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(self.up(self.conv(x)))
        return F.relu(y @ y.transpose(-1, -2))


def test_multiply_accumulates() -> None:
    """Of the example's sizes; the export of a dynamic batch has the batch of the example as its hint."""
    gm = capture(Layers().eval(), torch.randn(2, 4, 6, 6))
    found = {n.name: macs(n) for n in gm.graph.nodes if n.op == "call_function"}
    assert found["conv2d"] == 2 * 6 * 4 * 4 * (2 * 9)
    assert found["conv_transpose2d"] == 2 * 6 * 4 * 4 * (4 * 4)
    assert found["linear"] == 2 * 4 * 8 * 5 * 8
    assert found["matmul"] == 2 * 4 * 8 * 8 * 5
    assert found["relu"] == found["transpose"] == 0
