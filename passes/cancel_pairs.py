"""Remove quantize and dequantize operators that do nothing or the same twice.

Before::

    %q = qfx.quantize(%x, scale, zero_point, ...)
    %d = qfx.dequantize(%q, scale, zero_point, ...)
    %q1 = qfx.quantize(%d, scale, zero_point, ...)      # the same parameters: %q again
    %q2 = qfx.quantize(%x, scale, zero_point, ...)      # the same input and parameters: %q again

After::

    %q = qfx.quantize(%x, scale, zero_point, ...)

Declines when scale, zero point, type or range differ: that is a requantization, and changes values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from qfx.ops import dequantize, quantize
from qfx.rewrite import erase_dead
from qfx.stage import Stage


@dataclass(frozen=True)
class CancelPairs:
    """First drops ``quantize(dequantize(q))``, then merges equal operators on one input, of which that makes some."""

    name: ClassVar[str] = "cancel-pairs"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CONVERTED, Stage.CONVERTED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        return _cancel(gm) + _merge_equal(gm)


def parameters(node: fx.Node) -> tuple[Any, ...]:
    """What decides the integers, comparable between operators: constants by name, dynamic ones by node.

    ``(scale, zero_point, axis, group_size)``; the range and types follow from the integers' dtype and producer.
    """
    return tuple(a.target if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args[1:5])


def _merge_equal(gm: fx.GraphModule) -> int:
    seen: dict[tuple[Any, ...], fx.Node] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in (quantize, dequantize):
            continue
        key = (node.target, node.args[0], *parameters(node), *node.args[5:])
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            erase_dead(gm, node)
            count += 1
    return count


def _cancel(gm: fx.GraphModule) -> int:
    count = 0
    for node in list(gm.graph.nodes):
        back = node.args[0] if node.target is quantize else None
        if not isinstance(back, fx.Node) or back.target is not dequantize or parameters(node) != parameters(back):
            continue
        integers = back.args[0]
        assert isinstance(integers, fx.Node)
        if _limits(integers) != node.args[5:]:
            continue
        node.replace_all_uses_with(integers)
        erase_dead(gm, node)
        count += 1
    return count


def _limits(integers: fx.Node) -> tuple[Any, ...]:
    """``(quant_min, quant_max, dtype)`` of integers that a quantize operator made; empty for others."""
    return tuple(integers.args[5:]) if integers.target is quantize else ()
