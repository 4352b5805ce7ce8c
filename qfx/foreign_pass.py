"""The adapter for passes that were written for torch.fx and know nothing of qfx.

Such a pass is a function of a GraphModule, or a ``PassBase`` of ``torch.fx.passes.infra``. It edits what it is given or
returns another GraphModule, and leaves out what qfx needs. The adapter takes the result over in place, so that the
graph is called as before, gives new nodes their place in the user's model, and finds example values again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.fx.passes.infra.pass_base import PassResult

from qfx.attributes import exists, set_module, set_tensor
from qfx.errors import PassError
from qfx.meta import describe, set_value, update, value
from qfx.operators import tensor_inputs
from qfx.rewrite import propagate
from qfx.stage import Stage, stage_of

Function = Callable[[fx.GraphModule], fx.GraphModule | PassResult | None]
Sources = Mapping[fx.Node, fx.Node]
"""A node of the graph behind the pass → the node of the graph before it that this is."""


@dataclass(frozen=True)
class ForeignPass:
    """``function`` as a pass of qfx, for any stage.

    ``function`` is given a graph of ATen operators on flat tensors. It may edit it and return None, or return a
    GraphModule or a PassResult, which must take and return as many tensors. It writes no NodeInfo: nodes that it left
    keep theirs, and new ones get the place in the user's model of what they replace.
    """

    function: Function
    name: str
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CAPTURED, Stage.CAPTURED)
    writes: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def of(cls, function: Function) -> ForeignPass:
        """The pass of the function's, or else its class's, name: ``FoldThat`` and ``fold_that`` are ``fold-that``."""
        named = function.func if isinstance(function, functools.partial) else function
        return cls(function, _kebab(getattr(named, "__name__", type(named).__name__)))

    def run(self, gm: fx.GraphModule) -> int:
        """Run it on ``gm``, in place; returns 1 where the graph changed, or the pass says so.

        Raises:
            PassError: what it returns, or leaves, is not such a graph any more.
        """
        before = _Before(gm)
        made, modified = self._result(gm)
        made.graph.lint()
        _in_a_tuple(made.graph.output_node())
        sources = before.sources(made.graph)
        self._check(before, made.graph, sources, stage_of(gm))
        graph = made.graph
        if graph is not before.graph:
            graph, sources = _copied(graph, sources)
        graph.set_codegen(before.codegen)
        if made is not gm:
            _take_over(gm, made)
        if graph is not gm.graph or made is not gm:
            gm.graph = graph
        before.restore(gm, sources)
        for node, like in _places(graph, sources, before).items():
            self._settle(node, like, stage_of(gm))
        _find_values(gm, sources, before)
        return int(modified or str(graph) != before.text)

    def _result(self, gm: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
        """The GraphModule that the pass makes, and whether it says that it changed anything."""
        result: object = self.function(gm)
        modified = isinstance(result, PassResult) and bool(result.modified)
        made = result.graph_module if isinstance(result, PassResult) else gm if result is None else result
        if not isinstance(made, fx.GraphModule):
            raise PassError(
                f"pass {self.name!r} returned a {type(made).__name__}",
                hint="return a GraphModule, a PassResult, or None where the graph that was given is edited",
            )
        return made, modified

    def _check(self, before: _Before, graph: fx.Graph, sources: Sources, stage: Stage) -> None:
        for what, old, new in zip(("takes", "returns"), before.arity, _arity(graph), strict=True):
            if old != new:
                raise PassError(
                    f"pass {self.name!r} changed how the model is called: it {what} {new} tensors, not {old}",
                    hint="keep the placeholders, and the outputs in their order",
                )
        for node in graph.nodes:
            foreign = node.op == "call_method" or (node.op == "call_module" and stage < Stage.LOWERED)
            if foreign and node not in sources:
                raise PassError(
                    f"pass {self.name!r} inserted a {node.op} of {node.target!r}",
                    hint="call operators, such as torch.ops.aten.silu.default: the passes behind it know nothing else",
                )

    def _settle(self, node: fx.Node, like: fx.Node | None, stage: Stage) -> None:
        """Give a new node its place in the user's model; behind ``annotate`` it must say itself why it stays float."""
        place = describe(like or node)
        node.meta = {k: v for k, v in {**node.meta, **place}.items() if k != "val"}
        if stage >= Stage.ANNOTATED and node.op == "call_function":
            update(node, reason=f"pass {self.name} inserted it behind annotation")


def _kebab(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name.strip("<>"))
    return words.replace("_", "-").strip("-").lower()


class _Before:
    """What is known of a graph before a foreign pass gets it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph, self.codegen, self.meta = gm.graph, gm.graph._codegen, dict(gm.meta)
        self.text, self.arity = str(gm.graph), _arity(gm.graph)
        self.by_name = {n.name: n for n in gm.graph.nodes}
        self.metas = {n: dict(n.meta) for n in gm.graph.nodes}
        self.calls = {n: _call(n) for n in gm.graph.nodes}
        self.inputs = {n: tensor_inputs(n) for n in gm.graph.nodes}

    def sources(self, graph: fx.Graph) -> Sources:
        """What is left of the graph in ``graph``: the same nodes, or in a new graph the same calls by their names."""
        if graph is self.graph:
            return {n: n for n in graph.nodes if n in self.metas}
        inputs = (n for n in self.calls if n.op == "placeholder")
        found: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            source = next(inputs, None) if node.op == "placeholder" else self.interpreted(node) or self._named(node)
            if source is not None and (node.op == "placeholder" or _called(node) == _called(source)):
                found[node] = source
        return found

    def interpreted(self, node: fx.Node) -> fx.Node | None:
        """The node that an ``fx.Interpreter``, as ``fx.Transformer`` is one, made ``node`` of."""
        for recorded in node.meta.get("from_node") or ():
            known = recorded.node_info
            if known is not None and known.graph_id == id(self.graph):
                return self.by_name.get(known.name)
        return None

    def _named(self, node: fx.Node) -> fx.Node | None:
        return self.by_name.get(node.name)

    def restore(self, gm: fx.GraphModule, sources: Sources) -> None:
        """Put back what was known of the graph, and of the nodes that are left."""
        gm.meta = {**gm.meta, **self.meta}
        for node, source in sources.items():
            node.meta = {**node.meta, **self.metas[source]}


def _in_a_tuple(output: fx.Node) -> None:
    """Let a graph of one result return it as captured graphs do."""
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)


def _arity(graph: fx.Graph) -> tuple[int, int]:
    """How many tensors the graph takes, and how many it returns."""
    output = graph.output_node().args[0]
    return sum(n.op == "placeholder" for n in graph.nodes), len(output) if isinstance(output, tuple | list) else 1


def _call(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, node.args, node.kwargs


def _called(node: fx.Node) -> tuple[str, str]:
    return node.op, str(node.target)


def _copied(graph: fx.Graph, sources: Sources) -> tuple[fx.Graph, Sources]:
    """A copy of ``graph`` whose nodes bear the names of their sources: fusion groups and reports go by them."""
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        name = sources[node].name if node in sources else node.name
        made[node] = new.create_node(node.op, node.target, args, kwargs, name=name)
        made[node].meta = dict(node.meta)
    return new, {made[node]: source for node, source in sources.items()}


def _take_over(gm: fx.GraphModule, made: fx.GraphModule) -> None:
    """Give ``gm`` the tensors and modules that ``made``'s graph reads; equal tensors stay, shared with the model."""
    for path in dict.fromkeys(str(n.target) for n in made.graph.nodes if n.op in ("get_attr", "call_module")):
        own, new = attrgetter(path)(gm) if exists(gm, path) else None, attrgetter(path)(made)
        if isinstance(new, nn.Module):
            if own is not new:
                set_module(gm, path, new)
        elif not _equal(own, new):
            set_tensor(gm, path, new)


def _equal(a: object, b: Tensor) -> bool:
    alike = isinstance(a, Tensor) and type(a) is type(b) and _kind(a) == _kind(b)
    return a is b or (alike and not b.is_meta and torch.equal(a, b))  # type: ignore[arg-type]


def _places(graph: fx.Graph, sources: Sources, before: _Before) -> dict[fx.Node, fx.Node | None]:
    """For every new node an old one that it stands in the place of, or near: what it replaces, else what it reads."""
    places: dict[fx.Node, fx.Node | None] = {}
    for node in reversed(graph.nodes):
        if node not in sources:
            read = (sources[n] for n in tensor_inputs(node) if n in sources and n.op not in ("placeholder", "get_attr"))
            near = (*(places.get(user) for user in node.users), *read)
            found = (before.interpreted(node), _replaced(node, sources, before), *near)
            places[node] = next((place for place in found if place is not None), None)
    return places


def _replaced(node: fx.Node, sources: Sources, before: _Before) -> fx.Node | None:
    """What an old reader of ``node`` read in its place."""
    for user in node.users:
        if user in sources:
            for old, new in zip(before.inputs[sources[user]], tensor_inputs(user), strict=False):
                if new is node:
                    return old
    return None


def _find_values(gm: fx.GraphModule, sources: Sources, before: _Before) -> None:
    """Example values of what is new or calls something else, and of what reads a value of another kind than before."""
    mode = detect_fake_mode([value(n) for n in gm.graph.nodes if value(n) is not None])
    if mode is None:  # a graph without example values
        return
    moved: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = attrgetter(str(node.target))(gm)
            if not isinstance(tensor, Tensor) or _kind(tensor) == _kind(value(node)):
                continue
            new = mode.from_tensor(tensor.detach(), static_shapes=True)
        elif node.op == "call_function" and (moved & {*tensor_inputs(node)} or not _unchanged(node, sources, before)):
            new = propagate(node.target, node.args, node.kwargs)
        else:
            continue
        if new is not None and _kind(new) != _kind(value(node)):
            set_value(node, new)
            moved.add(node)


def _unchanged(node: fx.Node, sources: Sources, before: _Before) -> bool:
    if node not in sources:
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: sources.get(n, n))
    return (node.op, node.target, args, kwargs) == before.calls[sources[node]]


def _kind(val: object) -> object:
    """What tells two example values apart for those who read them."""
    if isinstance(val, Tensor):
        return val.dtype, val.device, tuple(map(str, val.shape))
    return tuple(map(_kind, val)) if isinstance(val, tuple | list) else str(val)
