"""Regions in place of groups of a lowered graph's nodes."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from qfx.attributes import drop_unused, free_path, get_tensor, set_module, set_tensor
from qfx.graph_module import CapturedModule
from qfx.meta import describe, info, update, value
from qfx.operators import tensor_inputs
from qfx.targets.native.choice import Tune
from qfx.targets.native.region import NativeRegion


def call_regions(
    gm: fx.GraphModule, groups: Sequence[list[fx.Node]], free: Collection[fx.Node], isa: str | None, tune: Tune | None
) -> None:
    """Call a region in place of each of ``groups``.

    Args:
        gm: a lowered graph, edited in place; layers that only a group calls leave it.
        groups: nodes that can be called as a whole, in order (:func:`qfx.targets.native.grouping.groups_of`).
        free: what every region that reads it computes for itself (:func:`qfx.targets.native.grouping.free_nodes`).
        isa: as :class:`NativeRegion` takes it.
        tune: the same.
    """
    if groups:
        _view_any_strides(gm)
    for group in groups:
        _replace(gm, group, free, isa, tune)
    drop_unused(gm)


def module_of(gm: fx.GraphModule, graph: fx.Graph) -> CapturedModule:
    """``graph``, which names modules and tensors of ``gm``, over these alone; they are shared, their containers not."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "call_module":
            set_module(root, str(node.target), gm.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            set_tensor(root, str(node.target), get_tensor(gm, str(node.target)))
    return CapturedModule.of(root, graph, "Region")


def sources(group: Collection[fx.Node], inside: Collection[fx.Node], free: Collection[fx.Node]) -> set[fx.Node]:
    """Tensors from outside ``inside`` that the group reads, by way of what is free too."""
    found: set[fx.Node] = set()
    todo = list(group)
    while todo:
        for source in tensor_inputs(todo.pop()):
            if source in free:
                todo.append(source)
            elif source not in inside:
                found.add(source)
    return found


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def _view_any_strides(gm: fx.GraphModule) -> None:
    """Results of regions have other strides than those that the graph was captured with."""
    for node in gm.graph.nodes:
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default


def _escapes(node: fx.Node, inside: Collection[fx.Node], free: Collection[fx.Node]) -> bool:
    """True where anything outside reads the node, or its sizes."""
    return any(user not in inside and (user not in free or _escapes(user, inside, free)) for user in node.users)


def _replace(
    gm: fx.GraphModule, group: list[fx.Node], free: Collection[fx.Node], isa: str | None, tune: Tune | None
) -> None:
    """Call a region in place of ``group``."""
    inside = set(group)
    outputs = [node for node in group if _escapes(node, inside, free)]
    graph, inputs = _extract(gm, group, outputs, free)
    path = free_path(gm, "native")
    set_module(gm, path, NativeRegion(module_of(gm, graph), isa, tune))
    last = group[-1]
    with gm.graph.inserting_after(last):
        call = gm.graph.create_node("call_module", path, tuple(inputs), {}, name=path)
    call.meta.update(describe(last))
    covers = tuple(name for node in group for name in info(node).fused)
    update(call, fused=covers, reason="one native program")
    single = len(outputs) == 1
    call.meta["val"] = value(outputs[0]) if single else tuple(value(n) for n in outputs)
    behind = call
    for i, node in enumerate(outputs):
        replacement = call
        if not single:
            with gm.graph.inserting_after(behind):
                replacement = behind = gm.graph.call_function(operator.getitem, (call, i))
            replacement.meta.update(describe(node))
            replacement.meta["val"] = value(node)
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in inside)
    _move_readers(gm.graph, call, behind)
    _erase(gm, inside, free)


def _erase(gm: fx.GraphModule, inside: Collection[fx.Node], free: Collection[fx.Node]) -> None:
    """Erase what the region computes now, what only it reads, and the layers that nothing else calls."""
    paths = set()
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node in inside or node in free):
            gm.graph.erase_node(node)
            if node.op == "call_module":
                paths.add(str(node.target))
    for path in paths - {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}:
        gm.delete_submodule(path)  # whole: what it holds is the region's


def _move_readers(graph: fx.Graph, call: fx.Node, behind: fx.Node) -> None:
    """Put what reads the region's results, and stood before the last of its nodes, behind it."""
    late = {call, *call.users}
    for node in list(graph.nodes):
        if node is call:
            break
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
            behind.append(node)
            behind = node


def _extract(
    gm: fx.GraphModule, group: list[fx.Node], outputs: list[fx.Node], free: Collection[fx.Node]
) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of ``group`` and the nodes that its placeholders stand for."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    inside = set(group)
    wanted = sorted(sources(group, inside, free), key=list(gm.graph.nodes).index)
    for node in wanted:
        made[node] = placeholder = graph.placeholder(node.name)
        placeholder.meta.update(node.meta)
        inputs.append(node)

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            for source in tensor_inputs(node):
                copy(source)
            made[node] = graph.node_copy(node, lambda n: made[n])
        return made[node]

    for node in group:
        copy(node)
    results: Any = tuple(made[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph, inputs
