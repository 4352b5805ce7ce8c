"""Which nodes of a lowered graph become one program together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from qfx.meta import value
from qfx.operators import is_floating, is_written, mutates, name_of, tensor_inputs
from qfx.patterns import NoMatch
from qfx.targets.native.moves import MOVES
from qfx.targets.native.operators import operator_of
from qfx.targets.native.weight_only import NativeWeightOnlyLeaf
from qfx.targets.reference import MatmulLeaf
from qfx.targets.x86_static import StaticLeaf
from qfx.verify import leaf_of


def _is_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    leaf = leaf_of(gm, node)
    return isinstance(leaf, StaticLeaf | NativeWeightOnlyLeaf | MatmulLeaf)


def free_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """What every region that reads it computes for itself, when it is compiled: sizes, and functions of parameters."""
    sizes: set[fx.Node] = set()
    known: set[fx.Node] = set()  # whatever the number of samples
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not is_written(node):
            known.add(node)
        elif node.op == "call_function" and _is_size(node):
            sizes.add(node)
            if (name_of(node) == "sym_size" and node.args[1] != 0) or _is_known(node, known):
                known.add(node)
        elif _folds(gm, node) and _is_known(node, known):
            known.add(node)
    return sizes | known


def _is_size(node: fx.Node) -> bool:
    return not isinstance(value(node), Tensor | tuple | list)


def _is_known(node: fx.Node, known: Collection[fx.Node]) -> bool:
    return all(n in known for n in node.all_input_nodes)


def _folds(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True for an operator without chance or effects that gives a tensor, and for a leaf."""
    op = node.target
    if leaf_of(gm, node) is not None:
        return True
    if not isinstance(op, torch._ops.OpOverload) or not isinstance(value(node), Tensor):
        return False
    return op.namespace in ("aten", "qfx") and torch.Tag.nondeterministic_seeded not in op.tags and not mutates(node)


def groups_of(
    gm: fx.GraphModule, free: Collection[fx.Node], misses: list[NoMatch], declined: Collection[fx.Node] = ()
) -> list[list[fx.Node]]:
    """The nodes of each region, in order; ``misses`` gets the reasons of those that belong to none.

    ``declined`` have no native form, whatever their operators say.

    A node's depth counts how often the way to it changes sides, between nodes with a native form (odd depths) and such
    without (even ones). No way between two nodes of one depth leads through the other side, so that all nodes of an odd
    depth can be called as a whole.
    """
    depth: dict[fx.Node, int] = {}
    found: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        before = {n: depth[n] for n in tensor_inputs(node)}
        if node.op not in ("call_function", "call_module") or node in free:
            depth[node] = max(before.values(), default=0)
            continue
        native = node not in declined and _has_native_form(gm, node, free, depth, misses)
        reached = max((d + (d % 2 != native and n not in free) for n, d in before.items()), default=0)
        depth[node] = reached + (reached % 2 != native)
        if native:
            found[depth[node]].append(node)
    return [group for group in found.values() if any(_is_layer(gm, node) for node in group)]


def _has_native_form(
    gm: fx.GraphModule,
    node: fx.Node,
    free: Collection[fx.Node],
    depth: Mapping[fx.Node, int],
    misses: list[NoMatch],
) -> bool:
    source = node.args[0] if node.args and name_of(node) in MOVES else None
    if isinstance(source, fx.Node) and depth[source] % 2 == 0 and source.op != "placeholder" and source not in free:
        return False  # what moves elements stays where they are
    reason = operator_of(gm, node).refusal(gm, node)
    if reason is not None and is_floating(node):
        misses.append(NoMatch(reason, node))
    return reason is None
