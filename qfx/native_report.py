"""The report of a model with native regions: what they run, which is known when they have run."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from qfx.meta import info
from qfx.node_table import Report
from qfx.targets.native.declined import Declined
from qfx.targets.native.inlined import regions_of
from qfx.targets.native.region import NativeRegion


def as_it_runs(report: Report, gm: fx.GraphModule) -> Report:
    """``report`` with the kernels of the programs that the regions of ``gm`` have by now, and why they have none."""
    regions = regions_of(gm)
    kernels = {name: kernel for region in regions.values() for name, kernel in native_kernels(region).items()}
    rows = tuple(replace(row, kernel=kernels.get(row.name, row.kernel)) for row in report.rows)
    found = (("not native", f"{path}: {why}") for path, region in regions.items() for why in region.declined)
    return replace(report, rows=rows, notes=tuple(dict.fromkeys((*report.notes, *found))))


def native_kernels(region: NativeRegion) -> dict[str, str]:
    """By the names of the float model's operators, what computes them in the region's first program, or in those of the
    parts that it was cut into; nothing of what runs as the lowered graph does."""
    made = next((made for made in region.outcomes if not isinstance(made, Declined) or made.parts), None)
    if made is None:
        return {}
    if isinstance(made, Declined):
        return {name: kernel for part in made.parts for name, kernel in native_kernels(part).items()}
    steps: dict[str, list[str]] = {}
    for step in made.steps:
        steps.setdefault(step.source, []).append(step.kernel)
    nodes = [node for node in region.graph.graph.nodes if node.op.startswith("call")]
    said = {node: f"native {', '.join(dict.fromkeys(steps.get(node.name, ())))}".rstrip() for node in nodes}
    return {name: said[node] for node in nodes for name in info(node).fused}
