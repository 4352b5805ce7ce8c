"""The layers of a prepared graph whose bit widths can be chosen, and which of them must choose alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.meta import info, value
from qfx.operators import Kind, activations, is_constant, lookup, macs, name_of, tensor_inputs
from qfx.rewrite import evaluate, root_of
from qfx.spec import QConfig, QuantSpec


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear layer or a matrix product that is quantized: all calls of one operator at one place.

    ``path``: the user's layer path. ``calls``: its operators, more than one where the module is used again. ``data``:
    the tensor inputs (:func:`qfx.operators.tensor_inputs`) that are activations, ``weight`` the one that is its weight,
    None for a product of two activations. ``qconfig``: the specs that it was prepared with. ``shape``: of its weight.
    ``macs`` are multiply-accumulates at the example's sizes. ``end``: it is a first or a last layer. ``parameter``
    names the weight where one place has several (the projections of ``nn.MultiheadAttention``).
    """

    path: str
    op: str
    calls: tuple[fx.Node, ...]
    data: tuple[int, ...]
    weight: int | None
    qconfig: QConfig
    shape: tuple[int, ...]
    macs: int
    end: bool
    parameter: str = ""

    @property
    def key(self) -> str:
        """The name in tables and files: the path, the operator, and the weight where those do not say which it is."""
        return ":".join(filter(None, (self.path, self.op, self.parameter)))

    @property
    def observed(self) -> bool:
        """Whether calibration set the range of its data, so that it has one at every width."""
        return self.qconfig.activation is not None and not self.qconfig.activation.dynamic


def layers_of(gm: fx.GraphModule) -> tuple[Layer, ...]:
    """The layers of a graph at PREPARED or CALIBRATED, in graph order."""
    found: dict[tuple[str, str, str], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        row = lookup(node)
        if row is not None and row.kind is Kind.ANCHOR and any(_spec(node, i) for i in range(len(info(node).inputs))):
            found.setdefault((info(node).origin, row.name, _parameter(node)), []).append(node)
    ends = ends_of(gm)
    weights = Counter((path, op) for path, op, _ in found)
    return tuple(
        _layer(gm, path, op, parameter.removeprefix(f"{path}.") if weights[path, op] > 1 else "", calls, ends)
        for (path, op, parameter), calls in found.items()
    )


def _parameter(node: fx.Node) -> str:
    """The name of the operator's weight, or "" where it has none."""
    position = _weight(node)
    return "" if position is None else str(root_of(source_of(node, position)).target)


def _weight(node: fx.Node) -> int | None:
    """Which tensor input is the weight."""
    row = lookup(node)
    assert row is not None
    weight = None if row.weight is None else node.args[row.weight]
    return tensor_inputs(node).index(weight) if isinstance(weight, fx.Node) else None


def _layer(
    gm: fx.GraphModule, path: str, op: str, parameter: str, calls: Sequence[fx.Node], ends: set[fx.Node]
) -> Layer:
    first, weight = calls[0], _weight(calls[0])
    data = activations(first)
    of_data = next((spec for i in data if (spec := _spec(first, i)) is not None), None)
    return Layer(
        path=path,
        op=op,
        calls=tuple(calls),
        data=data,
        weight=weight,
        qconfig=QConfig(of_data, _spec(first, weight) if weight is not None else None),
        shape=tuple(int(size) for size in value(tensor_inputs(first)[weight]).shape) if weight is not None else (),
        macs=sum(macs(call) for call in calls),
        end=any(call in ends for call in calls),
        parameter=parameter,
    )


def _spec(node: fx.Node, position: int) -> QuantSpec | None:
    """What the node was annotated to read there, None where it is float or its range is fixed beforehand.

    Not what rounds it: a float layer reads rounded values too, where an integer kernel makes them.
    """
    specs = info(node).inputs
    spec = specs[position] if position < len(specs) else None
    return spec if isinstance(spec, QuantSpec) else None


def source_of(node: fx.Node, position: int) -> fx.Node:
    """What a layer reads at a tensor input, before it is rounded."""
    read = tensor_inputs(node)[position]
    while read.op == "call_module":
        read = tensor_inputs(read)[0]
    return read


def weight_of(gm: fx.GraphModule, layer: Layer) -> Tensor:
    """The float weight as its operator reads it, batch norm folded in."""
    assert layer.weight is not None
    weight: Tensor = evaluate(gm, source_of(layer.calls[0], layer.weight))
    return weight


def ends_of(gm: fx.GraphModule) -> set[fx.Node]:
    """The layers with weights that have no other such layer before them, or none behind."""
    layers = [n for n in gm.graph.nodes if (row := lookup(n)) is not None and row.weight is not None]
    behind: set[fx.Node] = set()
    before: set[fx.Node] = set()
    known = set(layers)
    for node in gm.graph.nodes:
        if any(n in known or n in behind for n in tensor_inputs(node)):
            behind.add(node)
    for node in reversed(gm.graph.nodes):
        if any(n in known or n in before for n in node.users):
            before.add(node)
    return {n for n in layers if n not in behind or n not in before}


# --- who must choose alike --------------------------------------------------------------------------------------------


def coupled(gm: fx.GraphModule, layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """Groups of positions in ``layers`` that get one choice, in order of their first: each layer is in one.

    Layers are coupled that read one weight, that read data of one scale, or whose results meet in one addition: the
    integers of both sides then have one width, and one kernel adds them. So are those of one operator at one place,
    which no rule of a recipe tells apart.
    """
    import networkx as nx  # here, since a model that is loaded needs none of it

    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(range(len(layers)))
    first: dict[object, int] = {}
    of_call = {call: i for i, layer in enumerate(layers) for call in layer.calls}
    for i, layer in enumerate(layers):
        for meeting in _meetings(gm, layer):
            graph.add_edge(i, first.setdefault(meeting, i))
    for node in gm.graph.nodes:
        if name_of(node) == "add":
            made_by = [of_call[n] for i in activations(node) if (n := _maker(tensor_inputs(node)[i])) in of_call]
            graph.add_edges_from(pairwise(made_by))
    return tuple(sorted(tuple(sorted(group)) for group in nx.connected_components(graph)))


def _meetings(gm: fx.GraphModule, layer: Layer) -> list[object]:
    """What the layer may share with others: its place, its weight's memory (tied ones have names), its data's scale."""
    found: list[object] = [("place", layer.path, layer.op)]
    for call in layer.calls:
        if layer.weight is not None:
            weight = get_tensor(gm, str(root_of(source_of(call, layer.weight)).target))
            found.append(("weight", weight.untyped_storage().data_ptr()))
        for i in layer.data:
            source = source_of(call, i)
            found.append(("scale", info(source).group or source.name))
    return found


def _maker(node: fx.Node) -> fx.Node | None:
    """The layer that made the value, seen through what only moves, bounds or rounds it."""
    while True:
        row = lookup(node)
        if row is not None and row.kind is Kind.ANCHOR:
            return node
        passes = node.op == "call_module" or (row is not None and row.kind in (Kind.UNARY, Kind.SHARE))
        inputs = tensor_inputs(node)
        if not passes or not inputs or is_constant(node):
            return None
        node = inputs[0]
