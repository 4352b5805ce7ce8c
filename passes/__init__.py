"""The passes of qfx, one a file, and the order in which they run."""

from __future__ import annotations

from qfx.passes.absorb_clamps import AbsorbClamps
from qfx.passes.annotate import Annotate
from qfx.passes.cancel_pairs import CancelPairs
from qfx.passes.canonicalize import Canonicalize
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
from qfx.passes.reuse_memory import ReuseMemory
from qfx.passes.settle_training import SettleTraining
from qfx.passes.share_scales import ShareScales
from qfx.passes.store_embeddings import StoreEmbeddings
from qfx.pipeline import Pass, Pipeline
from qfx.recipe import Recipe
from qfx.targets import Target


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
        Lower(target),
        ReuseMemory(),
        EliminateDeadCode(),
    )


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


def ptq_pipeline(recipe: Recipe, target: Target) -> Pipeline:
    """:func:`ptq` as a pipeline that can be edited."""
    return Pipeline(ptq(recipe, target))


def qat_pipeline(recipe: Recipe, target: Target) -> Pipeline:
    """:func:`qat` as a pipeline that can be edited."""
    return Pipeline(qat(recipe, target))


if __name__ != "qfx.passes":
    raise ImportError(f"this package is qfx.passes and is imported under that name only, not as {__name__}")
