"""What qfx keeps on nodes and graphs: frozen values, never shared between copies in effect."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import fx, nn

from qfx.meta import (
    NODE_INFO_FIELDS,
    GraphInfo,
    NodeInfo,
    add_notes,
    describe,
    graph_info,
    info,
    set_value,
    update,
    update_graph,
    value,
)
from qfx.spec import UINT8, QuantSpec


def graph() -> fx.GraphModule:
    g = fx.Graph()
    g.output(g.call_function(torch.ops.aten.relu.default, (g.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), g)


def relu(gm: fx.GraphModule) -> fx.Node:
    return list(gm.graph.nodes)[1]


def test_empty_where_nobody_wrote() -> None:
    assert info(relu(graph())) == NodeInfo() and not info(relu(graph())).quantized
    assert graph_info(nn.Linear(1, 1)) == graph_info(graph()) == GraphInfo()


def test_update_replaces() -> None:
    node = relu(graph())
    first = update(node, origin="a")
    second = update(node, reason="b")
    assert (first, second) == (NodeInfo(origin="a"), NodeInfo(origin="a", reason="b")) and info(node) is second
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.origin = "c"  # type: ignore[misc]
    with pytest.raises(TypeError):
        update(node, colour="red")
    assert "origin" in NODE_INFO_FIELDS


def test_a_copy_does_not_follow() -> None:
    gm = graph()
    update(relu(gm), origin="a")
    update_graph(gm, stage="FUSED")
    twin = copy.deepcopy(gm)
    update(relu(twin), origin="b")
    update_graph(twin, stage="ANNOTATED")
    assert (info(relu(gm)).origin, graph_info(gm).stage) == ("a", "FUSED")


def test_quantized() -> None:
    spec = QuantSpec(UINT8)
    assert NodeInfo(output=spec).quantized and NodeInfo(inputs=(None, spec)).quantized
    assert not NodeInfo(inputs=(None, None)).quantized


def test_notes_are_kept_once_and_in_order() -> None:
    gm = graph()
    add_notes(gm, "a", ["one", "two", "one"])
    add_notes(gm, "b", ["one"])
    add_notes(gm, "a", ["two", "three"])
    assert graph_info(gm).notes == (("a", "one"), ("a", "two"), ("b", "one"), ("a", "three"))


def test_describe_hands_on_the_origin_and_not_the_decision() -> None:
    node = relu(graph())
    update(node, origin="a", reason="because", group="g", output=QuantSpec(UINT8))
    node.meta["stack_trace"] = "here"
    node.meta["other"] = 1
    set_value(node, 3)
    new = relu(graph())
    new.meta.update(describe(node))
    assert info(new) == NodeInfo(origin="a") and value(new) == 3
    assert new.meta["stack_trace"] == "here" and "other" not in new.meta
