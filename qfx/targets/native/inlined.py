"""A graph with regions as the graph that they were made of: what tools look at that go layer by layer."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from qfx.graph_module import CapturedModule
from qfx.targets.native.region import NativeRegion


def regions_of(gm: fx.GraphModule) -> dict[str, NativeRegion]:
    """The regions that the graph calls, by their paths."""
    paths = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    modules = {path: gm.get_submodule(path) for path in paths}
    return {path: module for path, module in modules.items() if isinstance(module, NativeRegion)}


def inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with the nodes of its regions in their places; ``gm`` itself where it has none. Modules are shared."""
    regions = regions_of(gm)
    if not regions:
        return gm
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        region = regions.get(str(node.target)) if node.op == "call_module" else None
        if region is not None:
            given = [made[n] for n in node.args]
            made[node] = _splice(graph, region, f"{node.target}.graph", given)
        elif node.target is operator.getitem and not isinstance(made.get(node.args[0]), fx.Node):
            made[node] = made[node.args[0]][node.args[1]]
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
    graph.set_codegen(gm.graph._codegen)
    return CapturedModule.of(gm, graph, type(gm).__name__)


def _splice(graph: fx.Graph, region: NativeRegion, path: str, given: list[Any]) -> Any:
    """Copy the region's nodes into ``graph``; what stands for its result, a node or a tuple of nodes."""
    made: dict[fx.Node, fx.Node] = {}
    inputs = iter(given)
    for node in region.graph.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(inputs)
        elif node.op == "output":
            return fx.map_arg(node.args[0], lambda n: made[n])
        else:
            made[node] = copy = graph.node_copy(node, lambda n: made[n])
            if node.op in ("get_attr", "call_module"):
                copy.target = f"{path}.{node.target}"
    raise AssertionError("a graph has an output")
