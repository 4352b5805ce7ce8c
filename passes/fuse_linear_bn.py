"""Fold a batch norm into the linear layer before it.

Before::

    %linear = linear(%x, %weight, %bias)                                # [N, C]
    %bn = batch_norm(%linear, %gamma, %beta, %mean, %var, False, ...)

After::

    %scaled = mul(%weight, @weight_factor)
    %linear = linear(%x, %scaled, @bias_folded)

Declines as fuse_conv_bn does, and when the linear layer's output has more than two dimensions: batch norm's channels
are axis 1, the linear layer's features the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.meta import value
from qfx.passes import batch_norm, fuse_conv_bn
from qfx.patterns import Match, NoMatch, Rule, op
from qfx.patterns import apply as apply_rules
from qfx.stage import Stage


@dataclass(frozen=True)
class FuseLinearBn:
    """Applies :data:`RULES`."""

    name: ClassVar[str] = "fuse-linear-bn"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset({"mark"})

    def run(self, gm: fx.GraphModule) -> int:
        return apply_rules(RULES, gm, notes="not fused").rewrites


def _check(match: Match) -> NoMatch | None:
    if value(match["compute"]).ndim != 2:
        return NoMatch("batch norm's channels are not the linear layer's features", match["bn"])
    return fuse_conv_bn.check(match)


RULES = (Rule("linear-bn", op("bn", batch_norm.NAMES, _0=op("compute", "linear")), _check, fuse_conv_bn.fold),)
