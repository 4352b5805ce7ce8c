"""Remove what nobody reads: nodes, and the parameters, buffers and modules that only they referred to.

Before::

    %q = qfx.quantize(%x, ...)      # no reader
    %y = relu(%x)

After::

    %y = relu(%x)

Declines for placeholders and for operators that write to a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.attributes import drop_unused
from qfx.operators import mutates
from qfx.stage import Stage


@dataclass(frozen=True)
class EliminateDeadCode:
    """Runs over the whole graph, then over the tensors and modules that it holds."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CAPTURED, Stage.CAPTURED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        before = len(gm.graph.nodes)
        for node in reversed(gm.graph.nodes):
            if not node.users and node.op in ("call_function", "call_module", "get_attr") and not mutates(node):
                gm.graph.erase_node(node)
        return before - len(gm.graph.nodes) + drop_unused(gm)
