"""Quantize and dequantize that do nothing, or the same twice, go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.meta import update_graph
from qfx.ops import dequantize, quantize
from qfx.passes import CancelPairs
from qfx.pipeline import run_pass
from qfx.testing import assert_graph, assert_same_numerics

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Tape:
    """A CONVERTED graph, written by hand: ``q`` and ``d`` append operators with parameters by name."""

    def __init__(self) -> None:
        root = nn.Module()
        for name, scale, zero_point in (("a", 0.1, 3), ("b", 0.2, 3)):
            root.register_buffer(f"{name}_scale", torch.tensor(scale))
            root.register_buffer(f"{name}_zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.root, self.graph = root, fx.Graph()
        self.x = self.graph.placeholder("x")

    def _parameters(self, name: str) -> tuple[fx.Node, fx.Node]:
        return self.graph.get_attr(f"{name}_scale"), self.graph.get_attr(f"{name}_zero_point")

    def q(self, x: fx.Node, name: str = "a", low: int = 0, high: int = 255) -> fx.Node:
        args = (x, *self._parameters(name), None, None, low, high, torch.uint8)
        return self.graph.create_node("call_function", quantize, args, name="q")

    def d(self, q: fx.Node, name: str = "a", dtype: torch.dtype = torch.float32) -> fx.Node:
        args = (q, *self._parameters(name), None, None, dtype)
        return self.graph.create_node("call_function", dequantize, args, name="d")

    def cancel(self, *results: fx.Node) -> tuple[fx.GraphModule, int]:
        self.graph.output(results)
        gm = fx.GraphModule(self.root, self.graph)
        update_graph(gm, stage="CONVERTED")
        before = gm(X)
        count = run_pass(CancelPairs(), gm)
        assert_same_numerics(lambda x: before, gm, X)
        return gm, count


def test_golden_equal_operators_on_one_input() -> None:
    tape = Tape()
    gm, count = tape.cancel(tape.d(tape.q(tape.x)), tape.d(tape.q(tape.x)))
    assert count == 2
    assert_graph(gm, """
        %x = input
        %a_scale = @a_scale
        %a_zero_point = @a_zero_point
        %q = qfx.quantize(%x, %a_scale, %a_zero_point, None, None, 0, 255, u8)
        %a_scale_1 = @a_scale
        %a_zero_point_1 = @a_zero_point
        %d = qfx.dequantize(%q, %a_scale_1, %a_zero_point_1, None, None, f32)
        return (%d, %d)
    """)


def test_golden_quantize_of_its_own_dequantize() -> None:
    tape = Tape()
    gm, count = tape.cancel(tape.d(tape.q(tape.d(tape.q(tape.x)))))
    assert count == 1
    assert_graph(gm, """
        %x = input
        %a_scale = @a_scale
        %a_zero_point = @a_zero_point
        %q = qfx.quantize(%x, %a_scale, %a_zero_point, None, None, 0, 255, u8)
        %a_scale_3 = @a_scale
        %a_zero_point_3 = @a_zero_point
        %d_1 = qfx.dequantize(%q, %a_scale_3, %a_zero_point_3, None, None, f32)
        return (%d_1)
    """)


def test_a_long_chain_needs_one_run() -> None:
    tape = Tape()
    node = tape.x
    for _ in range(4):
        node = tape.d(tape.q(node))
    gm, count = tape.cancel(node)
    assert count == 3 and sum(n.target is quantize for n in gm.graph.nodes) == 1


def test_readers_on_both_sides_of_a_pair_share_one_dequantize() -> None:
    tape = Tape()
    first = tape.d(tape.q(tape.x))
    gm, count = tape.cancel(first, tape.d(tape.q(first)))
    assert count == 2 and [n.name for n in gm.graph.nodes if n.op == "call_function"] == ["q", "d"]


def other_scale(tape: Tape) -> fx.Node:
    return tape.d(tape.q(tape.d(tape.q(tape.x)), "b"), "b")


def other_range(tape: Tape) -> fx.Node:
    return tape.d(tape.q(tape.d(tape.q(tape.x)), high=15))


def read_at_another_scale(tape: Tape) -> fx.Node:
    return tape.d(tape.q(tape.d(tape.q(tape.x), "b")))


def integers_of_a_mover(tape: Tape) -> fx.Node:
    turned = tape.graph.call_function(torch.ops.aten.t.default, (tape.q(tape.x),))
    return tape.d(tape.q(tape.d(turned)))


@pytest.mark.parametrize("build", [other_scale, other_range, read_at_another_scale, integers_of_a_mover])
def test_declines(build: Any) -> None:
    tape = Tape()
    _, count = tape.cancel(build(tape))
    assert count == 0


def test_declines_to_merge_results_of_two_dtypes() -> None:
    tape = Tape()
    q = tape.q(tape.x)
    gm, count = tape.cancel(tape.d(q), tape.d(q, dtype=torch.bfloat16))
    result: tuple[Tensor, Tensor] = gm(X)
    assert count == 0 and result[1].dtype == torch.bfloat16
