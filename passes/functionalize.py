"""Replace in-place operators by their plain twins, where nobody can tell.

Before::

    %conv = conv2d(%x, ...)
    %relu_ = relu_(%conv)

After::

    %conv = conv2d(%x, ...)
    %relu_ = relu(%conv)

Declines when the tensor that is written to is an input or a parameter, when it is read again under its old name, or
when a view of it is: those readers see the change, so the operator stays, in float. Declines when the plain twin would
promote the tensor to another dtype, which the in-place operator keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qfx.meta import add_notes, value
from qfx.operators import is_view
from qfx.patterns import NoMatch
from qfx.rewrite import propagate
from qfx.stage import Stage


@dataclass(frozen=True)
class Functionalize:
    """Rewrites every ``aten.op_`` whose target is fresh and unviewed to ``aten.op``."""

    name: ClassVar[str] = "functionalize"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CAPTURED, Stage.CAPTURED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        misses: list[NoMatch] = []
        promoted: dict[str, Any] = {}  # sizes do not matter, and an example of each would take milliseconds
        count = 0
        for node in gm.graph.nodes:
            twin = plain_twin(node)
            if twin is None:
                continue
            miss = why_visible(node, order)
            if miss is None:
                kinds = f"{twin} {fx.map_arg((node.args, dict(node.kwargs)), _kind)}"
                if kinds not in promoted:
                    promoted[kinds] = propagate(twin, node.args, node.kwargs)
                miss = why_promoted(node, promoted[kinds])
            if miss is None:
                node.target = twin
                count += 1
            else:
                misses.append(miss)
        add_notes(gm, "in place", [str(miss) for miss in misses])
        return count


def plain_twin(node: fx.Node) -> Any:
    """The overload without the trailing underscore, with the same arguments, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    if not packet.endswith("_") or packet.endswith("__"):
        return None
    twin = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
    if twin is None:
        return None
    names = [[a.name for a in op._schema.arguments[1:]] for op in (twin, target)]  # the first is self here, input there
    return twin if names[0] == names[1] else None


def why_promoted(node: fx.Node, promoted: Any) -> NoMatch | None:
    """A NoMatch where the plain twin's example value, ``promoted``, has another dtype than that of ``node``."""
    kept = value(node)
    if not (isinstance(kept, torch.Tensor) and isinstance(promoted, torch.Tensor)) or kept.dtype == promoted.dtype:
        return None
    return NoMatch(f"it keeps {kept.dtype}, its plain twin gives {promoted.dtype}", node)


def _kind(node: fx.Node) -> Any:
    """All that a dtype is promoted by."""
    val = value(node)
    return (val.dtype, val.dim()) if isinstance(val, torch.Tensor) else type(val)


def why_visible(node: fx.Node, order: dict[fx.Node, int]) -> NoMatch | None:
    """A NoMatch where anyone but readers of the result would see the write of ``node``, else None."""
    written: Any = node.args[0]
    reader = node
    while isinstance(written, fx.Node):
        if written.op != "call_function":
            return NoMatch(f"it writes to {written.name}, which is not its own", node)
        for user in written.users:
            if user is reader:
                continue
            if order[user] > order[node]:
                return NoMatch(f"{user.name} reads {written.name} after it was written to", node)
            if is_view(user):
                return NoMatch(f"{user.name} is a view of {written.name}", node)
        if not is_view(written):
            return None
        written, reader = written.args[0], written
    return NoMatch("it writes to something that is no tensor of this graph", node)
