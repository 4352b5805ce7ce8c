"""A region's graph cut at what has no native form for some sizes: what lies around it are regions of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx

from qfx.graph_module import CapturedModule
from qfx.targets.native.choice import Tune
from qfx.targets.native.grouping import free_nodes, groups_of
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.replacing import call_regions, module_of, sources
from qfx.targets.native.shapes import rows_of_samples, tried


def cut(
    gm: fx.GraphModule, declined: Collection[fx.Node], inputs: Sequence[Tensor], isa: str | None, tune: Tune | None
) -> CapturedModule | None:
    """The graph of a region with ``declined`` as the leaves and operators that they are, and regions of all else.

    Each of these has fewer nodes than the region, so that cutting them in turn comes to an end. ``gm`` stays as it is;
    its layers are shared.

    Returns:
        The graph; None where no layer of it would be native, or nothing of ``declined`` was.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, made))
    whole = module_of(gm, graph)
    free = free_nodes(whole)
    before = {node for group in groups_of(whole, free, []) for node in group}
    outside = before & {made[node] for node in declined if node in made}
    groups = _groups(whole, free, outside, _rows(whole, inputs)) if outside else []
    if not groups:
        return None
    call_regions(whole, groups, free, isa, tune)
    whole.recompile()
    return whole


def _rows(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, int | None]:
    """How many rows of each value's first dimension belong to a sample; nothing where that is not known."""
    try:
        return {node: rows_of_samples(found) for node, found in tried(gm, inputs).items()}
    except NotNative:
        return {}


def _groups(
    gm: fx.GraphModule, free: Collection[fx.Node], outside: set[fx.Node], rows: Mapping[fx.Node, int | None]
) -> list[list[fx.Node]]:
    """The nodes of each region, without ``outside``, and without those that read what a region cannot be given: all its
    inputs are to have as many samples, in the first dimension and no other."""
    while True:
        groups = groups_of(gm, free, [], outside)
        unfit = {node for group in groups for node in _unfit(group, free, rows)}
        if not unfit:
            return groups
        outside = outside | unfit


def _unfit(group: list[fx.Node], free: Collection[fx.Node], rows: Mapping[fx.Node, int | None]) -> list[fx.Node]:
    """The nodes of ``group`` that read an input with other rows for each sample than the others have."""
    inside = set(group)
    given = {node: rows.get(node, 1) for node in sources(group, inside, free)}
    usual = min((count for count in given.values() if count is not None), default=None)
    other = {node for node, count in given.items() if count is None or count != usual}
    return [node for node in group if not other.isdisjoint(sources([node], inside, free))]
