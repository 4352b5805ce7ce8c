"""Where a prepared graph rounds: its calls of FakeQuantize."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qfx.fake_quant import FakeQuantize
from qfx.meta import info
from qfx.training import DropoutMark, DropPathMark


def fake_quant_of(gm: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    """The FakeQuantize that the node calls, or None."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FakeQuantize) else None


def fake_quants(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, FakeQuantize]]:
    """Every FakeQuantize of a prepared graph with the node that calls it."""
    for node in gm.graph.nodes:
        module = fake_quant_of(gm, node)
        if module is not None:
            yield node, module


def rounded_by(gm: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    """The FakeQuantize that makes the value of ``node``, also where dropout lies between: what it drops was rounded."""
    while isinstance(info(node).mark, DropoutMark | DropPathMark):
        node = node.args[0]  # type: ignore[assignment]
    return fake_quant_of(gm, node)
