"""What qfx knows of a node and of a graph. The only module that spells ``node.meta["qfx"]`` and ``gm.meta["qfx"]``.

``NodeInfo`` and ``GraphInfo`` are frozen values that are replaced and never mutated: copying a GraphModule shares the
values of ``node.meta``, so a mutable one would leak from the copy into the original. Nothing a saved model needs is
kept here, since pickle drops ``node.meta``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qfx.spec import Spec
from qfx.training import Mark

if TYPE_CHECKING:
    from qfx.bit_allocation import Allocation
    from qfx.recipe import Recipe
    from qfx.sensitivity_table import Sensitivity

_KEY, _CALLS = "qfx", "qfx_calls"

Call = tuple[tuple[Any, ...], Any]
"""Flat inputs of a graph, and the data item that they come from."""


@dataclass(frozen=True)
class NodeInfo:
    """What the passes decided for one node.

    ``origin``: the user's module path. ``fused``: the names of its fusion group in graph order, the compute op first
    (empty: not fused). ``inputs``: one spec or None (float) per tensor input, in the order of
    :func:`qfx.operators.tensor_inputs`. ``output``: the spec of its value, None where it is float. ``group``: who
    shares one scale with its value. ``sensitivity``, a score, and ``bits`` (weight) are what bit-width search found.
    ``reason``: which rule decided, or why the node stays float. ``mark``: what it does in training only.
    """

    origin: str = ""
    fused: tuple[str, ...] = ()
    inputs: tuple[Spec | None, ...] = ()
    output: Spec | None = None
    group: str = ""
    sensitivity: float | None = None
    bits: int | None = None
    reason: str = ""
    mark: Mark | None = None

    @property
    def quantized(self) -> bool:
        """True where any tensor goes in or out as integers."""
        return self.output is not None or any(spec is not None for spec in self.inputs)


NODE_INFO_FIELDS = frozenset(f.name for f in fields(NodeInfo))


@dataclass(frozen=True)
class GraphInfo:
    """What is known of a graph: how far it is compiled, and what is to be told about it.

    ``stage`` is a :class:`qfx.stage.Stage`'s name. ``recipe`` is a name, ``asked`` all of it. ``notes``: ``(topic,
    text)`` pairs for the report, such as near misses of a fusion or what capture had to give up. ``sensitivity`` and
    ``allocation``: what bit-width search found.
    """

    stage: str = ""
    recipe: str = ""
    asked: Recipe | None = None
    target: str = ""
    notes: tuple[tuple[str, str], ...] = ()
    sensitivity: Sensitivity | None = None
    allocation: Allocation | None = None


def info(node: fx.Node) -> NodeInfo:
    """The node's info; an empty one where no pass has set it."""
    found = node.meta.get(_KEY)
    return found if isinstance(found, NodeInfo) else NodeInfo()


def update(node: fx.Node, **changes: Any) -> NodeInfo:
    """Replace the node's info by one with ``changes``; returns it."""
    new = replace(info(node), **changes)
    node.meta[_KEY] = new
    return new


def graph_info(gm: torch.nn.Module) -> GraphInfo:
    """The graph's info; an empty one for a graph that qfx did not make."""
    meta = getattr(gm, "meta", None)
    found = meta.get(_KEY) if isinstance(meta, dict) else None
    return found if isinstance(found, GraphInfo) else GraphInfo()


def update_graph(gm: fx.GraphModule, **changes: Any) -> GraphInfo:
    """Replace the graph's info by one with ``changes``; returns it."""
    new = replace(graph_info(gm), **changes)
    gm.meta[_KEY] = new
    return new


def add_notes(gm: fx.GraphModule, topic: str, texts: list[str]) -> None:
    """Append lines about ``topic`` that the report shall show, each once."""
    old = graph_info(gm).notes
    new = tuple((topic, text) for text in dict.fromkeys(texts) if (topic, text) not in old)
    update_graph(gm, notes=old + new)


def keep_calls(gm: fx.GraphModule, calls: tuple[Call, ...]) -> None:
    """Keep calls of the graph for the passes that measure; none: let go of them."""
    gm.meta[_CALLS] = calls


def kept_calls(gm: fx.GraphModule) -> tuple[Call, ...]:
    """What :func:`keep_calls` kept."""
    return tuple(gm.meta.get(_CALLS, ()))


def value(node: fx.Node) -> Any:
    """The example value (FakeTensor, SymInt, tuple of them, …) that capture recorded, or None."""
    return node.meta.get("val")


def set_value(node: fx.Node, val: Any) -> None:
    node.meta["val"] = val


def describe(node: fx.Node) -> dict[str, Any]:
    """Meta data that a node inserted next to ``node`` inherits: where it comes from, not what was decided."""
    kept: dict[str, Any] = {k: node.meta[k] for k in ("stack_trace", "nn_module_stack", "val") if k in node.meta}
    kept[_KEY] = NodeInfo(origin=info(node).origin)
    return kept
