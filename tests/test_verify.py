"""Every row of the stage table fails on a graph that breaks it, and the error says which node and layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qfx.errors import VerifyError
from qfx.fake_quant import FakeQuantize
from qfx.meta import set_value, update
from qfx.ops import dequantize, quantize
from qfx.spec import INT8, UINT8, QuantSpec
from qfx.stage import Stage
from qfx.targets import Leaf
from qfx.verify import TABLE, verify

aten = torch.ops.aten
SPEC = QuantSpec(UINT8)


class Draft:
    """A small graph to be broken: ``y = relu(x)``, with a parameter and a FakeQuantize at hand."""

    def __init__(self) -> None:
        self.root = nn.Module()
        self.root.weight = nn.Parameter(torch.ones(2, 2))
        self.root.fake_quant = FakeQuantize(SPEC)
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        set_value(self.x, torch.zeros(2, 2))
        self.relu = self.call(aten.relu.default, self.x)
        update(self.relu, origin="layer1", reason="it is small")

    def call(self, target: object, *args: object, reason: str = "a test") -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        set_value(node, torch.zeros(2, 2))
        update(node, origin="layer1", reason=reason)
        return node

    def done(self) -> fx.GraphModule:
        self.graph.output(list(self.graph.nodes)[-1])
        return fx.GraphModule(self.root, self.graph)


def plain_calls(d: Draft) -> None:
    d.graph.call_method("relu", (d.x,))


def assertions(d: Draft) -> None:
    d.graph.call_function(aten._assert_async.default, (d.x,))


def one_spelling(d: Draft) -> None:
    weight = d.graph.get_attr("weight")
    set_value(weight, torch.zeros(2, 2))
    d.call(aten.mm.default, d.x, weight)


def every_node_explained(d: Draft) -> None:
    update(d.relu, reason="")


def specs_of_another_length(d: Draft) -> None:
    update(d.relu, inputs=(SPEC, SPEC))


def specs_on_a_float_operator(d: Draft) -> None:
    update(d.call(aten.sin.default, d.x), output=SPEC)


def specs_on_a_write(d: Draft) -> None:
    update(d.call(aten.relu_.default, d.x), inputs=(SPEC,))


def edges_observed(d: Draft) -> None:
    update(d.relu, inputs=(SPEC,))


def edges_observed_by_another_spec(d: Draft) -> None:
    module = d.graph.call_module("fake_quant", (d.x,))
    update(d.call(aten.relu.default, module), inputs=(QuantSpec(INT8),))


def ranges_known(d: Draft) -> None:
    d.graph.call_module("fake_quant", (d.x,))


def no_observer(d: Draft) -> None:
    d.graph.call_module("fake_quant", (d.x,))


def portable(d: Draft) -> None:
    d.root.leaf = nn.ReLU()
    d.graph.call_module("leaf", (d.x,))


def overwritten_and_read(d: Draft) -> None:
    d.root.first, d.root.second = Leaf(), Leaf()
    d.root.second.overwrites = True
    first = d.graph.call_module("first", (d.x,))
    d.graph.call_module("second", (d.x, first))
    d.call(aten.sin.default, first)


def overwritten_input(d: Draft) -> None:
    d.root.second = Leaf()
    d.root.second.overwrites = True
    d.graph.call_module("second", (d.relu, d.x))


def dequantize_of_floats(d: Draft) -> None:
    d.call(dequantize, d.x, d.x, d.x, None, None, torch.float32)


def quantize_of_integers(d: Draft) -> None:
    set_value(d.x, torch.zeros(2, 2, dtype=torch.int64))
    d.call(quantize, d.x, d.x, d.x, None, None, 0, 255, torch.uint8)


OVERWRITTEN = "nothing overwritten that is read: it overwrites its last input, but "

CASES: list[tuple[Callable[[Draft], None], Stage, str]] = [
    (plain_calls, Stage.CAPTURED, "plain calls: methods are spelled as operators: %relu = relu(%x)"),
    (assertions, Stage.LOWERED, "plain calls: assertions of export are removed"),
    (one_spelling, Stage.CANONICAL, "one spelling: a product with a parameter is spelled linear: %mm_default"),
    (every_node_explained, Stage.ANNOTATED, "every node explained: a node that stays float has no reason"),
    (specs_of_another_length, Stage.ANNOTATED, "specs fit: it has not one spec for each tensor input"),
    (specs_on_a_float_operator, Stage.ANNOTATED, "specs fit: an operator without integer form is annotated: %sin"),
    (specs_on_a_write, Stage.ANNOTATED, "specs fit: an operator without integer form is annotated: %relu__"),
    (edges_observed, Stage.PREPARED, "edges observed: its input 0 has no FakeQuantize of its spec"),
    (edges_observed_by_another_spec, Stage.PREPARED, "edges observed: its input 0 has no FakeQuantize of its spec"),
    (ranges_known, Stage.CALIBRATED, "ranges known: its FakeQuantize has no scale"),
    (no_observer, Stage.CONVERTED, "no observer: an observer is left: %fake_quant"),
    (portable, Stage.CONVERTED, "portable: the portable form calls no modules: %leaf"),
    (overwritten_and_read, Stage.LOWERED, f"{OVERWRITTEN}sin_default reads first again: %second"),
    (overwritten_input, Stage.LOWERED, f"{OVERWRITTEN}its last input is no kernel's own result: %second"),
    (dequantize_of_floats, Stage.CONVERTED, "types of quantize: dequantize reads no integers"),
    (quantize_of_integers, Stage.LOWERED, "types of quantize: quantize reads no floats"),
]


@pytest.mark.parametrize(("break_it", "stage", "text"), CASES, ids=[c[0].__name__ for c in CASES])
def test_row_finds(break_it: Callable[[Draft], None], stage: Stage, text: str) -> None:
    draft = Draft()
    break_it(draft)
    with pytest.raises(VerifyError) as raised:
        verify(draft.done(), stage)
    assert f"stage {stage.name}, {text}" in str(raised.value)


@pytest.mark.parametrize("stage", list(Stage))
def test_the_draft_itself_is_fine_at_every_stage(stage: Stage) -> None:
    verify(Draft().done(), stage)


def test_every_row_is_tested() -> None:
    assert {row.name for row in TABLE} == {text.partition(":")[0] for _, _, text in CASES}


def test_rows_hold_only_for_their_stages() -> None:
    fine = ((every_node_explained, Stage.FUSED), (no_observer, Stage.PREPARED), (portable, Stage.LOWERED))
    for break_it, stage in fine:
        draft = Draft()
        break_it(draft)
        verify(draft.done(), stage)


def test_the_error_names_the_layer() -> None:
    draft = Draft()
    every_node_explained(draft)
    with pytest.raises(VerifyError) as raised:
        verify(draft.done(), Stage.ANNOTATED)
    assert raised.value.where == "layer1" and "%relu" in str(raised.value)
