"""Fold a batch norm into the convolution or linear layer behind it.

Before::

    %bn = batch_norm(%x, %gamma, %beta, %mean, %var, False, ...)
    %conv = conv2d(%bn, %weight, %bias, stride, [0, 0], ...)

After::

    %scaled = mul(%weight, @weight_factor)
    %conv = conv2d(%x, %scaled, @bias_folded, stride, [0, 0], ...)

Declines when the batch norm has a second reader or is not a constant affine map, when the weight or bias is computed
from inputs, when the convolution is padded while the batch norm shifts (the padding is zero behind the batch norm, and
would be the shift before it), and for linear layers on more than two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.meta import value
from qfx.operators import argument, is_constant, name_of
from qfx.passes import batch_norm
from qfx.patterns import Match, NoMatch, Rule, op, second_user
from qfx.patterns import apply as apply_rules
from qfx.rewrite import erase_dead, evaluate
from qfx.stage import Stage


@dataclass(frozen=True)
class FuseBnConv:
    """Applies :data:`RULES`."""

    name: ClassVar[str] = "fuse-bn-conv"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        return apply_rules(RULES, gm, notes="not fused").rewrites


def _check(match: Match) -> NoMatch | None:
    bn, compute = match["bn"], match["compute"]
    weight, bias = compute.args[1], argument(compute, 2, "bias")
    if not (isinstance(weight, fx.Node) and is_constant(weight)) or (bias is not None and not is_constant(bias)):
        return NoMatch("its weight or bias is computed from inputs", compute)
    if name_of(compute) == "linear":
        if value(bn).ndim != 2:
            return NoMatch("batch norm's channels are not the linear layer's features", compute)
    elif any(argument(compute, 4, "padding", [0])):
        return NoMatch("its zero padding comes behind the batch norm's shift", compute)
    return second_user(bn, compute) or batch_norm.why_not_affine(bn)


def _fold(gm: fx.GraphModule, match: Match) -> None:
    bn, compute = match["bn"], match["compute"]
    affine = batch_norm.affine_map(gm, bn)
    assert isinstance(compute.args[1], fx.Node) and isinstance(bn.args[0], fx.Node)
    weight = evaluate(gm, compute.args[1])  # [out, in / groups, ...]
    groups = argument(compute, 6, "groups", 1) if name_of(compute) != "linear" else 1
    ones = [1] * (weight.ndim - 2)
    grouped = weight.double().unflatten(0, (groups, -1))
    shift = (grouped * affine.shift.reshape(groups, 1, -1, *ones)).flatten(0, 1).flatten(1).sum(1)
    by_group = affine.scale.reshape(groups, 1, -1)
    per_output = by_group if groups == 1 else by_group.expand(groups, weight.shape[0] // groups, -1)
    factor = per_output.reshape(-1, weight.shape[1], *ones)
    bias = argument(compute, 2, "bias")
    batch_norm.absorb(gm, compute, factor, shift if bias is None else shift + evaluate(gm, bias).double())
    bn.replace_all_uses_with(bn.args[0])
    erase_dead(gm, bn)


RULES = (
    Rule("bn-conv", op("compute", "conv1d conv2d conv3d linear", _0=op("bn", batch_norm.NAMES)), _check, _fold),
)
