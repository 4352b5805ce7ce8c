"""Decide, for every node, what is quantized and how, or why it stays float.

Before::

    %conv = conv2d(%x, %weight, ...)
    %ln = layer_norm(%conv, ...)

After (same nodes)::

    %conv = conv2d(%x, %weight, ...)  {in uint8 affine per tensor, int8 symmetric per axis 0; out float}
    %ln = layer_norm(%conv, ...)      {LayerNorm stays float: ...}

Two sweeps over the graph. Forwards: what can come as integers? Convolutions, linear layers and matrix products
("anchors") that the recipe quantizes and the target can run; and element-wise, pooling and reshaping operators whose
inputs all come as integers. Backwards: who wants integers? Anchors do; other operators only if somebody behind them
does, so that no value is rounded that only float operators read.

Declines, with the reason on the node: operators without an integer form, rules of the recipe, refusals of the target,
values that an in-place operator changes, and integer or boolean arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from qfx.errors import ConfigError, UnsupportedError
from qfx.layers import ends_of
from qfx.meta import info, update, update_graph, value
from qfx.operators import (
    Kind,
    Op,
    activations,
    argument,
    is_constant,
    is_floating,
    is_view,
    lookup,
    mutates,
    name_of,
    tensor_inputs,
)
from qfx.origin import calls_before, module_classes, source_line
from qfx.recipe import QuantRule, Recipe, Subject
from qfx.spec import PerAxis, QConfig, QuantSpec, SharedSpec, Spec, bias_spec
from qfx.stage import Stage
from qfx.targets import TARGETS, Target


@dataclass(frozen=True)
class Annotate:
    """Writes specs and reasons by ``recipe``, within what ``target`` can lower."""

    recipe: Recipe
    target: Target

    name: ClassVar[str] = "annotate"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FUSED, Stage.ANNOTATED)
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "output", "reason", "bits", "fused"})

    def run(self, gm: fx.GraphModule) -> int:
        subjects = {n: subject(n) for n in gm.graph.nodes if n.op == "call_function"}
        check_rules(self.recipe, subjects)
        plan = Plan(self.recipe, self.target, subjects, written_in_place(gm), ends_of(gm))
        for node in gm.graph.nodes:
            plan.offer(node)
        for node in reversed(gm.graph.nodes):
            plan.demand(node)
        plan.settle()
        for node in gm.graph.nodes:
            plan.write(node)
        update_graph(gm, recipe=str(self.recipe.name), asked=self.recipe, target=self.target.name)
        return sum(info(n).quantized for n in gm.graph.nodes)


def subject(node: fx.Node) -> Subject:
    return Subject(
        name_of(node) or str(node.target), info(node).origin, module_classes(node), partial(calls_before, node)
    )


def written_in_place(gm: fx.GraphModule) -> set[fx.Node]:
    """All values that share memory with one that an operator writes to."""
    import networkx as nx  # here, since a model that is loaded needs none of it

    aliases = nx.Graph()
    for node in gm.graph.nodes:
        if (is_view(node) or mutates(node)) and tensor_inputs(node):
            aliases.add_edge(node, tensor_inputs(node)[0])
    written = [n for n in gm.graph.nodes if mutates(n) and n in aliases]
    return {n for root in written for n in nx.node_connected_component(aliases, root)}


# --- is the recipe meant? ---------------------------------------------------------------------------------------------


def check_rules(recipe: Recipe, subjects: dict[fx.Node, Subject]) -> None:
    """Refuse a rule of the user's that matches nothing, or only what can never be integers.

    Raises:
        ConfigError: the text lists the nearest names, or says why the operators stay float.
    """
    for rule in recipe.unmatched(set(subjects.values())):
        raise ConfigError(f"the rule for {rule} matches nothing in this model", hint=_nearest(rule, subjects.values()))
    for rule in recipe.rules:
        if rule.own or rule.qconfig is None:
            continue
        matched = [n for n, s in subjects.items() if rule.matches(s)]
        rows = [row for n in matched if (row := lookup(n)) is not None]
        if rows and all(row.kind is Kind.FLOAT for row in rows):
            node = next(n for n in matched if lookup(n) is not None)
            raise ConfigError(
                f"the rule for {rule} asks for integers where there are none: {rows[0].reason}",
                where=info(node).origin,
                source=source_line(node),
                hint="take the rule out; the layers around it are quantized without it",
            )


def _nearest(rule: QuantRule, subjects: Iterable[Subject]) -> str:
    import difflib

    known = list(subjects)
    for pattern, names in (
        (rule.layer, {s.layer for s in known}),
        (rule.op, {s.op for s in known}),
        (rule.module, {m for s in known for m in s.modules}),
    ):
        if pattern is not None:
            near = difflib.get_close_matches(pattern.rstrip(".*"), sorted(names), n=4, cutoff=0.3)
            return "the nearest names are " + ", ".join(repr(n) for n in near or sorted(names)[:4])
    return "name a layer, an op or a module of the model"


# --- the two sweeps ---------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What the sweeps have found so far. ``offers`` may become integers; ``demands`` lists who asks for which spec.

    ``carried``: what depends on the content of inputs, not on sizes and parameters alone; integers are content where an
    embedding looks them up.
    """

    recipe: Recipe
    target: Target
    subjects: dict[fx.Node, Subject]
    written: set[fx.Node]
    ends: set[fx.Node]
    qconfigs: dict[fx.Node, QConfig] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    carried: set[fx.Node] = field(default_factory=set)
    offers: set[fx.Node] = field(default_factory=set)
    demands: dict[fx.Node, list[QuantSpec]] = field(default_factory=dict)
    inputs: dict[fx.Node, dict[int, Spec]] = field(default_factory=dict)
    outputs: dict[fx.Node, Spec] = field(default_factory=dict)
    groups: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    # forwards

    def offer(self, node: fx.Node) -> None:
        """Note whether the node's value can come as integers, and why not."""
        if _brings_content(node) or any(n in self.carried for n in tensor_inputs(node)):
            self.carried.add(node)
        if node.op != "call_function":
            return
        found = self._why_float(node)
        if isinstance(found, str):
            self.reasons[node] = found
            return
        row, self.qconfigs[node], self.reasons[node] = found
        if row.kind is Kind.ANCHOR:
            if self._static(node):
                self._offer_group(node)
        elif self.groups.get(node) is None:
            source = self._float_source(node)
            if source is None:
                self.offers.add(node)
            else:
                del self.qconfigs[node]
                self.reasons[node] = f"its input {source.name} is float"

    def _why_float(self, node: fx.Node) -> str | tuple[Op, QConfig, str]:
        val = value(node)
        if isinstance(val, torch.SymInt | int | bool | float):
            return "size arithmetic"
        if isinstance(val, torch.Tensor) and not val.dtype.is_floating_point:
            return "integer or boolean arithmetic"
        if is_constant(node):
            return "a constant"
        if mutates(node):
            return "it writes to a tensor in place, where others read it"
        row = lookup(node)
        if row is None:
            return f"unknown operator {name_of(node) or node.target}: it stays float"
        if row.kind is Kind.FLOAT:
            return row.reason
        if node in self.written or any(n in self.written for n in tensor_inputs(node)):
            return "an in-place operator changes its tensor later on"
        qconfig, why = self.recipe.resolve(self.subjects[node], end=node in self.ends)
        if qconfig is None:
            return why
        refusal = self._why_unfit(node, row, qconfig)
        return refusal or (row, _resolved(qconfig, row), why)

    def _why_unfit(self, node: fx.Node, row: Op, qconfig: QConfig) -> str | None:
        if row.weight is None and (qconfig.activation is None or qconfig.activation.dynamic):
            return "this recipe keeps what lies between layers float"
        if row.weight is not None:
            weight = node.args[row.weight]
            if not (isinstance(weight, fx.Node) and is_constant(weight)):
                return "its weight is computed from inputs"
            if qconfig.weight is None:
                return "the recipe leaves its weight float"
            bias = argument(node, row.bias, "bias") if row.bias is not None else None
            if isinstance(bias, fx.Node) and not is_constant(bias):
                return "its bias is computed from inputs"
        if row.kind is Kind.ANCHOR and node not in self.carried:
            return "it is computed from positions alone, whose every digit counts"
        if not any(is_floating(tensor_inputs(node)[i]) for i in activations(node)):
            return "integer or boolean arithmetic"
        refusal = self.target.refuses(node, row, qconfig)
        if refusal and all(t.refuses(node, row, qconfig) for t in TARGETS.values()):
            raise UnsupportedError(
                f"no target can run {row.name} with {qconfig}: {refusal}",
                where=info(node).origin,
                source=source_line(node),
                hint="see the spec's other granularities, or leave the layer float with Recipe.skip",
            )
        return refusal

    def _offer_group(self, anchor: fx.Node) -> None:
        """Offer the last node of the anchor's fusion group; what joins it from outside must be integers too."""
        members = tuple(n for n in anchor.graph.nodes if n.name in info(anchor).fused) or (anchor,)
        for member in members[1:]:
            outside = [n for i in activations(member) if (n := tensor_inputs(member)[i]) not in members]
            if any(n not in self.offers for n in outside) or isinstance(self._why_float(member), str):
                members = members[: members.index(member)]
                break
        for member in members:
            self.groups[member] = members
        self.offers.add(members[-1])

    def _static(self, node: fx.Node) -> bool:
        activation = self.qconfigs[node].activation
        return activation is not None and not activation.dynamic

    def _float_source(self, node: fx.Node) -> fx.Node | None:
        """The first data input that cannot come as integers, or None where all can."""
        sources = [tensor_inputs(node)[i] for i in activations(node)]
        return next((n for n in sources if n not in self.offers), None) if sources else node

    # backwards

    def demand(self, node: fx.Node) -> None:
        """Ask for the specs that the node needs of its inputs."""
        if node not in self.qconfigs:
            return
        row, qconfig = lookup(node), self.qconfigs[node]
        assert row is not None
        group = self.groups.get(node)
        if row.kind is Kind.ANCHOR:
            for i in activations(node):
                if qconfig.activation is not None:
                    self._ask(node, i, qconfig.activation)
            self._constants(node, row, qconfig)
        elif group is not None and group[0] is not node:
            own = (self.qconfigs[node] if node in self.qconfigs else self.qconfigs[group[0]]).activation
            for i in activations(node):
                if tensor_inputs(node)[i] not in group and group[-1] in self.demands and own is not None:
                    self._ask(node, i, own)
            self.reasons[node] = f"runs inside the kernel of {group[0].name}"
        elif node in self.offers and node in self.demands:
            wanted = _widest(self.demands[node]) if row.kind is Kind.SHARE else qconfig.activation
            for i in activations(node):
                if wanted is not None:
                    self._ask(node, i, wanted)
        else:
            self.reasons[node] = "nobody behind it computes in integers"
            return
        if node in self.offers and node in self.demands:
            best = _widest(self.demands[node])
            self.outputs[node] = SharedSpec(activations(node)[0], best) if row.kind is Kind.SHARE else best

    def _ask(self, node: fx.Node, position: int, spec: QuantSpec) -> None:
        source = tensor_inputs(node)[position]
        self.inputs.setdefault(node, {})[position] = spec
        asked = self.demands.setdefault(source, [])
        if not spec.dynamic and spec not in asked:
            asked.append(spec)
        if not asked:
            del self.demands[source]

    def _constants(self, node: fx.Node, row: Op, qconfig: QConfig) -> None:
        if row.weight is None or qconfig.weight is None:
            return
        positions = {id(n): i for i, n in enumerate(tensor_inputs(node))}
        self.inputs.setdefault(node, {})[positions[id(node.args[row.weight])]] = qconfig.weight
        bias = node.args[row.bias] if row.bias is not None and len(node.args) > row.bias else None
        derived = bias_spec(qconfig.activation, qconfig.weight)
        if isinstance(bias, fx.Node) and is_constant(bias) and derived is not None:
            self.inputs[node][positions[id(bias)]] = derived

    # the result

    def settle(self) -> None:
        """Cut from every group what its kernel cannot run: an operand that nobody wants as integers stays float."""
        for members in set(self.groups.values()):
            for i, member in enumerate(members[1:], 1):
                operands = [tensor_inputs(member)[k] for k in activations(member)]
                late = next((n for n in operands if n not in members and n not in self.outputs), None)
                if late is not None:
                    self._cut(members, i, late)
                    break

    def _cut(self, members: tuple[fx.Node, ...], at: int, late: fx.Node) -> None:
        for kept in members[:at]:
            self.groups[kept] = members[:at]
        for source, member in zip((late, *members[at:]), members[at:], strict=False):
            del self.groups[member]
            self.reasons[member] = f"its input {source.name} is float"

    def write(self, node: fx.Node) -> None:
        """Put what was found on the node."""
        inputs = self.inputs.get(node, {})
        weight = self.qconfigs[node].weight if node in self.qconfigs and inputs else None
        group = self.groups.get(node)
        update(
            node,
            inputs=tuple(inputs.get(i) for i in range(len(tensor_inputs(node)))) if inputs else (),
            output=self.outputs.get(node),
            bits=weight.bits if weight is not None and _has_weight(node) else None,
            reason=self.reasons.get(node, ""),
            fused=tuple(n.name for n in group) if group and len(group) > 1 else (),
        )


def _widest(asked: list[QuantSpec]) -> QuantSpec:
    return max(asked, key=lambda spec: spec.bits)


def _brings_content(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return is_floating(node)
    return name_of(node) in _LOOKUPS or (_has_weight(node) and not _is_outer_product(node))


def _is_outer_product(node: fx.Node) -> bool:
    """True for a linear layer of one feature: its sums have one term, as the angles of rotary embeddings have."""
    return name_of(node) == "linear" and value(node.args[1]).shape[-1] == 1  # type: ignore[arg-type]


_LOOKUPS = ("embedding", "embedding_bag")


def _has_weight(node: fx.Node) -> bool:
    row = lookup(node)
    return row is not None and row.weight is not None


def _resolved(qconfig: QConfig, row: Op) -> QConfig:
    """``PerAxis(0)`` of a weight means its output channels, which transposed convolutions keep on axis 1."""
    weight = qconfig.weight
    if weight is None or row.channel_axis == 0 or weight.granularity != PerAxis(0):
        return qconfig
    return replace(qconfig, weight=replace(weight, granularity=PerAxis(row.channel_axis)))


def specs(node: fx.Node) -> Iterable[tuple[int, Any]]:
    """``(position, spec)`` of the node's inputs that are quantized."""
    return ((i, spec) for i, spec in enumerate(info(node).inputs) if spec is not None)
