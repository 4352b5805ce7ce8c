"""Fold a batch norm into the convolution before it.

Before::

    %conv = conv2d(%x, %weight, %bias, ...)
    %bn = batch_norm(%conv, %gamma, %beta, %mean, %var, False, ...)

After::

    %scaled = mul(%weight, @weight_factor)
    %conv = conv2d(%x, %scaled, @bias_folded, ...)

Covers conv1d, conv2d, conv3d and their transposes, grouped or depthwise, with and without bias.
In training the node is marked with the batch norm that it absorbed, which ``follow-training`` brings back.
Declines when the convolution has a second reader, when its weight or bias is computed from inputs, and when the batch
norm normalises by the batch's own statistics or has no running ones.
Method: Jacob et al., 2018 (arXiv:1712.05877), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from qfx.meta import info, update
from qfx.operators import argument, is_constant
from qfx.passes import batch_norm
from qfx.patterns import Match, NoMatch, Rule, op, second_user
from qfx.patterns import apply as apply_rules
from qfx.rewrite import erase_dead
from qfx.stage import Stage
from qfx.training import BatchNormMark

CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"


@dataclass(frozen=True)
class FuseConvBn:
    """Applies :data:`RULES`."""

    name: ClassVar[str] = "fuse-conv-bn"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset({"mark"})

    def run(self, gm: fx.GraphModule) -> int:
        return apply_rules(RULES, gm, notes="not fused").rewrites


def check(match: Match) -> NoMatch | None:
    """Why ``match["bn"]`` cannot be folded into ``match["compute"]``, or None where it can."""
    compute, bn = match["compute"], match["bn"]
    weight, bias = compute.args[1], argument(compute, 2, "bias")
    if not (isinstance(weight, fx.Node) and is_constant(weight)):
        return NoMatch("its weight is computed from inputs", compute)
    if bias is not None and not is_constant(bias):
        return NoMatch("its bias is computed from inputs", compute)
    if info(bn).mark is not None and bias is not None and bias.op != "get_attr":
        return NoMatch("its bias is computed, so that training could not change it", compute)
    return second_user(compute, bn) or batch_norm.why_not_affine(bn)


def fold(gm: fx.GraphModule, match: Match) -> None:
    """Scale the weight's output channels, move the shift into the bias, and drop the batch norm."""
    compute, bn = match["compute"], match["bn"]
    bias, mark = argument(compute, 2, "bias"), info(bn).mark
    if isinstance(mark, BatchNormMark):
        update(compute, mark=replace(mark, bias=str(bias.target) if isinstance(bias, fx.Node) else None))
    batch_norm.fold(gm, compute, batch_norm.affine_map(gm, bn))
    bn.replace_all_uses_with(compute)
    erase_dead(gm, bn)


RULES = (Rule("conv-bn", op("bn", batch_norm.NAMES, _0=op("compute", CONVOLUTIONS)), check, fold),)
