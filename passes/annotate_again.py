"""Round a calibrated graph by another recipe, with the ranges that its data gave.

Before::

    %conv = conv2d(%x_fake_quant, %weight_fake_quant)       {in uint8 ..., int8 ...}

After (here the weight was given 4 bits, and the data 6)::

    %conv = conv2d(%x_fake_quant_1, %weight_fake_quant_1)   {in uint6 ..., int4 ...}

The roundings are taken out, the graph is annotated by the allocation's recipe, and roundings of the new widths come in.
Weights are observed anew; data are not: each observer's statistics give the range for its new width. Declines, with an
error, where an observer keeps too little for that (Mse on data).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.calibration import observe_weights
from qfx.fake_quant import FakeQuantize
from qfx.layers import source_of
from qfx.meta import graph_info, info, update
from qfx.operators import is_constant, tensor_inputs
from qfx.passes.annotate import Annotate
from qfx.passes.fuse_epilogues import FuseEpilogues
from qfx.passes.insert_observers import InsertObservers
from qfx.passes.share_scales import ShareScales
from qfx.passes.store_embeddings import StoreEmbeddings
from qfx.roundings import fake_quants
from qfx.spec import QuantSpec
from qfx.stage import Stage
from qfx.targets import Target
from qfx.widths import observed


@dataclass(frozen=True)
class AnnotateAgain:
    """Annotates by the recipe of ``graph_info(gm).allocation``."""

    target: Target

    name: ClassVar[str] = "annotate-again"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CALIBRATED)
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "output", "reason", "bits", "fused", "group"})

    def run(self, gm: fx.GraphModule) -> int:
        allocation = graph_info(gm).allocation
        assert allocation is not None
        recipe = allocation.recipe()
        seen = observed(gm)
        taken = _take_out(gm)
        FuseEpilogues().run(gm)  # the first annotation has cut from the groups what was float then
        for p in (Annotate(recipe, self.target), StoreEmbeddings(recipe), ShareScales(), InsertObservers()):
            p.run(gm)
        _set_ranges(gm, seen)
        return taken + sum(1 for _ in fake_quants(gm))


def _take_out(gm: fx.GraphModule) -> int:
    """Remove every rounding, so that nodes are as they were before the first annotation; returns how many."""
    calls = [node for node, _ in fake_quants(gm)]
    for node in calls:
        node.replace_all_uses_with(tensor_inputs(node)[0])
        gm.graph.erase_node(node)
    for path in {str(node.target) for node in calls}:
        gm.delete_submodule(path)
    for node in gm.graph.nodes:
        if info(node).group:
            update(node, group="")
    return len(calls)


def _set_ranges(gm: fx.GraphModule, seen: dict[fx.Node, FakeQuantize]) -> None:
    for node, module in fake_quants(gm):
        source = source_of(node, 0)
        if is_constant(source) or not isinstance(module.spec, QuantSpec) or module.dynamic or module.scale.numel():
            continue
        observer = seen[source].observer
        assert observer is not None
        module.observer = observer.with_spec(module.spec)
        module.calculate()
    observe_weights(gm)
