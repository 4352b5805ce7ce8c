"""Rules: what matches, who wins, what is told of a near miss."""

from __future__ import annotations

import torch
from torch import fx

from qfx.meta import graph_info
from qfx.patterns import Match, NoMatch, Report, Rule, apply, op, second_user

aten = torch.ops.aten


def graph(second_reader: bool = False) -> fx.GraphModule:
    """``relu(sin(x))``, and ``cos`` of the sine where there shall be a second reader."""
    g = fx.Graph()

    def call(name: str, x: fx.Node) -> fx.Node:
        return g.create_node("call_function", getattr(aten, name).default, (x,), name=name)

    sin = call("sin", g.placeholder("x"))
    relu = call("relu", sin)
    others = (call("cos", sin),) if second_reader else ()
    g.output((relu, *others))
    return fx.GraphModule(torch.nn.Module(), g)


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


PATTERN = op("act", "relu gelu", _0=op("wave", "sin cos"))


def drop_act(gm: fx.GraphModule, match: Match) -> None:
    match["act"].replace_all_uses_with(match["wave"])
    gm.graph.erase_node(match["act"])


def always(match: Match) -> NoMatch | None:
    return None


def single(match: Match) -> NoMatch | None:
    return second_user(match["wave"], match["act"])


def test_match_binds_names() -> None:
    gm = graph()
    assert PATTERN.match(node(gm, "relu")) == {"act": node(gm, "relu"), "wave": node(gm, "sin")}


def test_no_match() -> None:
    gm = graph()
    assert PATTERN.match(node(gm, "sin")) is None
    assert PATTERN.match(node(gm, "x")) is None
    assert PATTERN.match(2.0) is None
    assert op("act", "relu", _0=op("wave", "cos")).match(node(gm, "relu")) is None
    assert op("act", "relu", _3=op("wave", "sin")).match(node(gm, "relu")) is None


def test_apply_rewrites_and_counts() -> None:
    gm = graph()
    report = apply([Rule("drop", PATTERN, always, drop_act)], gm, notes="topic")
    assert report == Report(1, []) and [n.name for n in gm.graph.nodes] == ["x", "sin", "output"]
    assert graph_info(gm).notes == ()


def test_an_earlier_rule_wins() -> None:
    gm, order = graph(), []

    def log(name: str) -> Rule:
        def rewrite(gm: fx.GraphModule, match: Match) -> None:
            order.append(name)
            drop_act(gm, match)

        return Rule(name, PATTERN, always, rewrite)

    report = apply([log("first"), log("second")], gm, notes="topic")
    assert order == ["first"] and report.rewrites == 1


def test_a_near_miss_is_noted_once() -> None:
    gm = graph(second_reader=True)
    rule = Rule("drop", PATTERN, single, drop_act)
    for _ in range(2):
        report = apply([rule], gm, notes="not dropped")
        assert report.rewrites == 0
        assert [(name, str(miss)) for name, miss in report.misses] == [("drop", "sin: it has a second user, cos")]
    assert graph_info(gm).notes == (("not dropped", "drop: sin: it has a second user, cos"),)


def test_a_miss_without_a_node_is_not_noted() -> None:
    gm = graph()
    report = apply([Rule("drop", PATTERN, lambda match: NoMatch("not here"), drop_act)], gm, notes="topic")
    assert len(report.misses) == 1 and graph_info(gm).notes == ()


def test_second_user_names_the_models_output() -> None:
    gm = graph()
    assert second_user(node(gm, "sin"), node(gm, "relu")) is None
    assert str(second_user(node(gm, "relu"), node(gm, "sin"))) == "relu: it has a second user, the model's output"
