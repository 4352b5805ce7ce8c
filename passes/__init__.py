"""The passes of qfx, one a file, and the order in which they run."""

from __future__ import annotations

from qfx.auto_recipe import AutoRecipe
from qfx.errors import ConfigError
from qfx.passes.absorb_clamps import AbsorbClamps
from qfx.passes.allocate_bits import AllocateBits
from qfx.passes.annotate import Annotate
from qfx.passes.annotate_again import AnnotateAgain
from qfx.passes.cancel_pairs import CancelPairs
from qfx.passes.canonicalize import Canonicalize
from qfx.passes.compile_regions import CompileRegions
from qfx.passes.convert import Convert
from qfx.passes.eliminate_dead_code import EliminateDeadCode
from qfx.passes.fold_weights import FoldWeights
from qfx.passes.follow_training import FollowTraining
from qfx.passes.functionalize import Functionalize
from qfx.passes.fuse_bn_conv import FuseBnConv
from qfx.passes.fuse_conv_bn import FuseConvBn
from qfx.passes.fuse_epilogues import FuseEpilogues
from qfx.passes.fuse_linear_bn import FuseLinearBn
from qfx.passes.insert_observers import InsertObservers
from qfx.passes.lower import Lower
from qfx.passes.measure_latency import MeasureLatency
from qfx.passes.measure_sensitivity import MeasureSensitivity
from qfx.passes.reuse_memory import ReuseMemory
from qfx.passes.settle_training import SettleTraining
from qfx.passes.share_scales import ShareScales
from qfx.passes.store_embeddings import StoreEmbeddings
from qfx.pipeline import ORDERS, PASSES_BY_NAME, Pass
from qfx.recipe import Recipe
from qfx.targets import Native, Target


def ptq(recipe: Recipe, target: Target) -> tuple[Pass, ...]:
    """The order of post-training quantization; calibration runs between ``insert-observers`` and ``convert``."""
    return (
        Functionalize(),
        Canonicalize(),
        FuseConvBn(),
        FuseLinearBn(),
        FuseBnConv(),
        FuseEpilogues(),
        Annotate(recipe, target),
        StoreEmbeddings(recipe),
        ShareScales(),
        InsertObservers(),
        Convert(),
        FoldWeights(),
        CancelPairs(),
        *lowering(target),
    )


def lowering(target: Target) -> tuple[Pass, ...]:
    """The order behind CONVERTED, the same for every recipe: what a saved model goes through when it is loaded."""
    order: tuple[Pass, ...] = (Lower(target), ReuseMemory(), EliminateDeadCode())
    return (*order, CompileRegions(target.isa, target.tune)) if isinstance(target, Native) else order


def auto_ptq(auto: AutoRecipe, target: Target) -> tuple[Pass, ...]:
    """The order that finds the bits itself: behind calibration it measures sensitivity and annotates anew."""
    order: list[Pass] = []
    for p in ptq(auto.base, target):
        order.append(p)
        if isinstance(p, InsertObservers):
            order += [MeasureSensitivity(auto, target), *([MeasureLatency(target)] if auto.latency_ms else [])]
            order += [AllocateBits(auto), AnnotateAgain(target)]
    return tuple(order)


def qat(recipe: Recipe, target: Target) -> tuple[Pass, ...]:
    """The order of quantization-aware training, which happens between ``absorb-clamps`` and ``settle-training``.

    A batch norm before a convolution stays one: only those behind are folded, and they live on until training ends.
    """
    order: list[Pass] = []
    for p in ptq(recipe, target):
        if isinstance(p, InsertObservers):
            order += [InsertObservers(training=True), FollowTraining(), AbsorbClamps(), SettleTraining()]
        elif not isinstance(p, FuseBnConv):
            order.append(p)
    return tuple(order)


def _ptq(recipe: Recipe | AutoRecipe, target: Target) -> tuple[Pass, ...]:
    return auto_ptq(recipe, target) if isinstance(recipe, AutoRecipe) else ptq(recipe, target)


def _qat(recipe: Recipe | AutoRecipe, target: Target) -> tuple[Pass, ...]:
    if isinstance(recipe, AutoRecipe):
        raise ConfigError(
            "training needs the bits beforehand",
            hint="find them with qfx.sensitivity and qfx.allocate, and train with the recipe that gives",
        )
    return qat(recipe, target)


ORDERS.update(ptq=_ptq, qat=_qat)
PASSES_BY_NAME.add_own(
    (
        AbsorbClamps,
        AllocateBits,
        Annotate,
        AnnotateAgain,
        CancelPairs,
        Canonicalize,
        CompileRegions,
        Convert,
        EliminateDeadCode,
        FoldWeights,
        FollowTraining,
        Functionalize,
        FuseBnConv,
        FuseConvBn,
        FuseEpilogues,
        FuseLinearBn,
        InsertObservers,
        Lower,
        MeasureLatency,
        MeasureSensitivity,
        ReuseMemory,
        SettleTraining,
        ShareScales,
        StoreEmbeddings,
    )
)

if __name__ != "qfx.passes":
    raise ImportError(f"this package is qfx.passes and is imported under that name only, not as {__name__}")
