"""Name who shares one scale: a reshape's input and output, all parts of a cat.

Before::

    %pool = max_pool2d(%conv)    {in uint8; out shares input 0}

After::

    %conv = ...                  {out uint8; group conv}
    %pool = max_pool2d(%conv)    {in uint8; out shares input 0; group conv}

The groups are the connected components of the graph whose edges are the shared specs. Nothing is declined: annotate
shares a scale only between specs that are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from qfx.meta import info, update
from qfx.operators import activations, tensor_inputs
from qfx.spec import QuantSpec, SharedSpec
from qfx.stage import Stage

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class ShareScales:
    """Writes ``group``: the name of the component's first node, on every node whose value somebody quantizes."""

    name: ClassVar[str] = "share-scales"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.ANNOTATED, Stage.ANNOTATED)
    writes: ClassVar[frozenset[str]] = frozenset({"group"})

    def run(self, gm: fx.GraphModule) -> int:
        import networkx as nx  # here, since a model that is loaded needs none of it

        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        shared = share_graph(gm)
        for component in nx.connected_components(shared):
            first = min(component, key=order.__getitem__)
            for node in component:
                update(node, group=first.name)
        return int(shared.number_of_nodes())


def share_graph(gm: fx.GraphModule) -> nx.Graph:
    """The quantized values of an annotated graph as nodes, "has the same scale" as edges."""
    import networkx as nx

    shared = nx.Graph()
    for node in gm.graph.nodes:
        known = info(node)
        for i in activations(node) if known.inputs else ():
            spec = known.inputs[i]
            if isinstance(spec, QuantSpec) and not spec.dynamic:
                shared.add_node(tensor_inputs(node)[i])
        if isinstance(known.output, SharedSpec):
            shared.add_edges_from((tensor_inputs(node)[i], node) for i in activations(node))
    return shared
