"""A graph at any stage as values that can be shown: :class:`qfx.dump_model.NodeView` of every node."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.dump_model import Integers, NodeView, StageView
from qfx.fake_quant import FakeQuantize
from qfx.layers import ends_of
from qfx.meta import info, value
from qfx.node_table import region_graph
from qfx.operators import Kind, is_constant, lookup, macs, name_of, tensor_inputs
from qfx.ops import dequantize, quantize
from qfx.origin import layer_path, source_line
from qfx.passes.annotate import subject
from qfx.printer import DTYPES, show_node, show_value
from qfx.recipe import Recipe
from qfx.roundings import fake_quant_of
from qfx.spec import Spec
from qfx.stage import Stage
from qfx.targets import Leaf, Target


@dataclass
class Viewer:
    """Makes views of graphs of one model; source lines, which take file look-ups, are found once.

    ``recipe`` and ``target``, where known, say which rule decided for a node and what the target thinks of it.
    """

    recipe: Recipe | None = None
    target: Target | None = None
    _lines: dict[str, str] = field(default_factory=dict)

    def view(self, gm: fx.GraphModule, stage: Stage, graph: str = "") -> StageView:
        """The whole graph at ``stage``."""
        constants = {n for n in gm.graph.nodes if is_constant(n) or _rounds_constant(gm, n)}
        integer = {n for n in gm.graph.nodes if _is_integer(gm, n, stage)}
        regions = _regions(gm, integer - constants, stage)
        rules = self._rules(gm) if stage >= Stage.ANNOTATED else {}
        refusals = self._refusals(gm) if stage is Stage.ANNOTATED else {}
        nodes = []
        for n in gm.graph.nodes:
            known, leaf = info(n), _leaf(gm, n)
            line = show_node(n, with_info=False)
            lowered = stage is Stage.LOWERED
            nodes.append(
                NodeView(
                    name=n.name,
                    op=n.op,
                    target=_target(gm, n, line),
                    line=line,
                    facts=show_node(n).removeprefix(line).strip()[1:-1],
                    args=tuple(source.name for source in tensor_inputs(n)),
                    kind="" if n.op == "output" else show_value(value(n)),
                    layer=known.origin or layer_path(n),
                    source=self._source(n),
                    constant=n in constants,
                    integer=n in integer,
                    crossing=_crosses(gm, n, constants),
                    region=regions.get(n),
                    fused=() if lowered else known.fused,
                    covers=known.fused if lowered else (),
                    inputs=_inputs(gm, n),
                    output=_output(gm, n),
                    group=known.group,
                    bits=known.bits,
                    sensitivity=known.sensitivity,
                    reason=known.reason,
                    rule=rules.get(n.name, ""),
                    refusal=refusals.get(n.name, ""),
                    kernel="" if leaf is None else leaf.kernel,
                    macs=macs(n),
                )
            )
        return StageView(stage.name.lower(), graph, tuple(nodes))

    def _source(self, node: fx.Node) -> str:
        trace = node.meta.get("stack_trace") or ""
        if trace not in self._lines:
            self._lines[trace] = source_line(node)
        return self._lines[trace]

    def _rules(self, gm: fx.GraphModule) -> dict[str, str]:
        """The words of the rule that decides, for every operator that OPS knows."""
        if self.recipe is None:
            return {}
        ends = ends_of(gm) if self.recipe.ends is not None else set()
        return {n.name: rule_for(self.recipe, n, end=n in ends) for n in gm.graph.nodes if lookup(n) is not None}

    def _refusals(self, gm: fx.GraphModule) -> dict[str, str]:
        """What the target refuses, asked for every operator that the recipe would quantize."""
        found: dict[str, str] = {}
        if self.recipe is None or self.target is None:
            return found
        for n in gm.graph.nodes:
            row = lookup(n)
            if row is None or row.reason or is_constant(n):
                continue
            qconfig, _ = self.recipe.resolve(subject(n))
            refusal = None if qconfig is None else self.target.refuses(n, row, qconfig)
            if refusal:
                found[n.name] = refusal
        return found


def rule_for(recipe: Recipe, node: fx.Node, *, end: bool = False) -> str:
    """Which rule of ``recipe`` decides for ``node``, by its place, its text and its reason."""
    looked_at = subject(node)
    for number, rule in enumerate(recipe.rules, 1):
        if rule.matches(looked_at):
            return f"rule {number} of {len(recipe.rules)} of {recipe.name}: {rule}"
    if end and recipe.ends is not None:
        return f"{recipe.name} for first and last layers: {recipe.ends}"
    none = "no rule matches; " if recipe.rules else ""
    return f"{none}the default of {recipe.name}: {recipe.default}"


def _target(gm: fx.GraphModule, node: fx.Node, line: str) -> str:
    """The operator's name, the class of a called module, or the path of an attribute."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return name_of(node) or line.partition(" = ")[2].partition("(")[0]
    return str(node.target) if node.op == "get_attr" else ""


def _leaf(gm: fx.GraphModule, node: fx.Node) -> Leaf | None:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Leaf) else None


# --- what is in integers ----------------------------------------------------------------------------------------------


def _is_integer(gm: fx.GraphModule, node: fx.Node, stage: Stage) -> bool:
    """Before lowering what is annotated so, with its fusion group; behind it what kernels compute and hold."""
    if node.op in ("placeholder", "output"):
        return False
    if stage >= Stage.CONVERTED and _holds_integers(value(node)):
        return True
    if stage is Stage.LOWERED:
        leaf = _leaf(gm, node)
        return leaf is not None and not leaf.storage_only and not leaf.weight_only
    return _quantized(node) or fake_quant_of(gm, node) is not None or node.target in (quantize, dequantize)


def _quantized(node: fx.Node) -> bool:
    """True for what a kernel on integers is meant to compute; a fusion group is decided by its first member."""
    known = info(node)
    if known.quantized or (known.fused and known.fused[0] != node.name and known.reason):
        return True
    return not known.inputs and _between(node)


def _between(node: fx.Node) -> bool:
    """The same in a graph from a file, which keeps no annotations: it reads dequantized integers, and has a use."""
    row = lookup(node)
    reads = any(n.target is dequantize for n in tensor_inputs(node))
    return row is not None and reads and (row.kind is Kind.ANCHOR or any(u.target is quantize for u in node.users))


def _holds_integers(val: object) -> bool:
    if isinstance(val, tuple | list):
        return bool(val) and _holds_integers(val[0])
    return isinstance(val, Tensor) and val.dtype in (torch.uint8, torch.int8)


def _regions(gm: fx.GraphModule, integer: set[fx.Node], stage: Stage) -> dict[fx.Node, int]:
    """Connected parts of ``integer``, numbered in graph order.

    In a lowered graph they are those that the report counts: a leaf that gives reals belongs to the region it reads.
    """
    graph = region_graph(gm)
    nodes = {n.name: n for n in gm.graph.nodes}
    inside = {n.name for n in integer}
    if stage is Stage.LOWERED:
        inside = {name for name in inside if graph.nodes[name]["integer"]}
    order = {name: i for i, name in enumerate(nodes)}
    found_parts = nx.weakly_connected_components(graph.subgraph(inside))
    parts = sorted(found_parts, key=lambda part: min(order[name] for name in part))
    found = {nodes[name]: number for number, part in enumerate(parts) for name in part}
    for n in gm.graph.nodes:
        if n in integer and n not in found:
            read = [found[source] for source in tensor_inputs(n) if source in found]
            found |= {n: read[0]} if read else {}
    return found


def _rounds_constant(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True for the FakeQuantize call of a weight."""
    return fake_quant_of(gm, node) is not None and is_constant(node.args[0])  # type: ignore[arg-type]


def _crosses(gm: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> bool:
    return node not in constants and (node.target in (quantize, dequantize) or fake_quant_of(gm, node) is not None)


# --- specs, scales and zero points ------------------------------------------------------------------------------------


def _inputs(gm: fx.GraphModule, node: fx.Node) -> tuple[Integers | None, ...]:
    """How every tensor input comes, as annotated; in order of :func:`qfx.operators.tensor_inputs`."""
    specs = info(node).inputs
    if not specs and _between(node):
        return tuple(_of_file(gm, source) for source in tensor_inputs(node))
    if not any(specs):
        return ()
    return tuple(_known(gm, source, spec) for source, spec in zip(tensor_inputs(node), specs, strict=False))


def _known(gm: fx.GraphModule, source: fx.Node, spec: Spec | None) -> Integers | None:
    if spec is None:
        return None
    made = Integers(str(spec), spec.bits)
    return _with_parameters(made, gm, source)


def _output(gm: fx.GraphModule, node: fx.Node) -> Integers | None:
    spec = info(node).output
    rounding = fake_quant_of(gm, node)
    if rounding is not None:
        return _with_parameters(Integers(str(rounding.spec), rounding.spec.bits), gm, node)
    if node.target is quantize:
        low, high, dtype = node.args[5:8]
        assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
        words = f"{DTYPES[dtype]} in {low} to {high}"
        return _with_parameters(Integers(words, (high - low).bit_length()), gm, node)
    reader = next((u for u in node.users if u.target is quantize or fake_quant_of(gm, u) is not None), node)
    if spec is None:
        return _output(gm, reader) if reader.target is quantize and _quantized(node) else None
    return _with_parameters(Integers(str(spec), spec.bits), gm, reader)


def _of_file(gm: fx.GraphModule, source: fx.Node) -> Integers | None:
    """What a dequantize operator itself tells of its integers."""
    integers = value(source.args[0]) if source.target is dequantize else None  # type: ignore[arg-type]
    if not isinstance(integers, Tensor):
        return None
    axis, group_size = source.args[3], source.args[4]
    layout = f"per axis {axis}" if group_size is None else f"per group of {group_size}"
    words = f"{DTYPES[integers.dtype]} {'per tensor' if axis is None else layout}"
    return _with_parameters(Integers(words, torch.iinfo(integers.dtype).bits), gm, source)


def _with_parameters(known: Integers, gm: fx.GraphModule, node: fx.Node) -> Integers:
    """``known`` with the constant scale and zero point of ``node``, a rounding or one half of it, if it has them."""
    rounding = fake_quant_of(gm, node)
    if rounding is not None:
        return _measured(known, rounding)
    if node.target not in (quantize, dequantize):
        return known
    scale, zero_point = node.args[1], node.args[2]
    if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (scale, zero_point)):
        return known
    return _filled(known, *(get_tensor(gm, str(n.target)) for n in (scale, zero_point)))  # type: ignore[union-attr]


def _measured(known: Integers, rounding: FakeQuantize) -> Integers:
    return known if rounding.dynamic else _filled(known, rounding.scale, rounding.zero_point)


def _filled(known: Integers, scale: Tensor, zero_point: Tensor) -> Integers:
    if not scale.numel() or scale.is_meta:
        return known
    scales, points = (t.detach().flatten() for t in (scale, zero_point))
    return replace(
        known,
        scales=scales.numel(),
        scale=(float(scales.min()), float(scales.max())),
        zero_point=(int(points.min()), int(points.max())),
    )


def with_specs_of(lowered: StageView, converted: StageView) -> StageView:
    """``lowered`` with the specs of the operators that its leaves stand for: a kernel keeps them in its own form."""
    known = converted.by_name

    def told(node: NodeView) -> NodeView:
        covered = [known[name] for name in node.covers if name in known]
        if not covered:
            return node
        first, last = covered[0], covered[-1]
        return replace(
            node, inputs=first.inputs, output=last.output, rule=first.rule, macs=sum(n.macs for n in covered)
        )

    return replace(lowered, nodes=tuple(map(told, lowered.nodes)))
