"""Record which element-wise operators run inside the kernel of the convolution or linear layer before them.

Before::

    %conv = conv2d(%x, ...)
    %add = add(%conv, %shortcut)
    %relu = relu(%add)

After (same nodes; each knows its fusion group)::

    %conv = conv2d(%x, ...)        {fused conv+add+relu}
    %add = add(%conv, %shortcut)   {fused conv+add+relu}
    %relu = relu(%add)             {fused conv+add+relu}

Declines when a node inside the group has a second reader, when ``add`` scales its second operand, when its operands
have different shapes, and when a clamp's bounds are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import fx

from qfx.meta import info, update, value
from qfx.operators import argument
from qfx.passes.fuse_conv_bn import CONVOLUTIONS
from qfx.patterns import Match, NoMatch, Pattern, Rule, op, second_user
from qfx.patterns import apply as apply_rules
from qfx.stage import Stage

ACTIVATIONS = "relu hardtanh hardswish silu gelu leaky_relu hardsigmoid sigmoid clamp"


@dataclass(frozen=True)
class FuseEpilogues:
    """Applies :data:`RULES`: longest groups first, so that a shorter rule never splits one."""

    name: ClassVar[str] = "fuse-epilogues"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.FUSED)
    writes: ClassVar[frozenset[str]] = frozenset({"fused"})

    def run(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            update(node, fused=())
        return apply_rules(RULES, gm, notes="not fused").rewrites


def _compute() -> Pattern:
    return op("compute", f"{CONVOLUTIONS} linear")


def _members(match: Match) -> list[fx.Node]:
    return [match[name] for name in ("compute", "add", "act") if name in match]


def _check(match: Match) -> NoMatch | None:
    members = _members(match)
    if any(info(n).fused for n in members):
        return NoMatch("a longer group holds it already")
    for node, reader in pairwise(members):
        if miss := second_user(node, reader):
            return miss
    return (_check_add(match) if "add" in match else None) or (_check_clamp(match) if "act" in match else None)


def _check_add(match: Match) -> NoMatch | None:
    add, compute = match["add"], match["compute"]
    left, right = add.args[:2]
    if argument(add, 2, "alpha", 1) != 1:
        return NoMatch("alpha scales the second operand", add)
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return NoMatch("it adds a number", add)
    if left is right:
        return NoMatch("it adds the tensor to itself", add)
    other = right if left is compute else left
    if value(other) is None or value(other).shape != value(compute).shape:
        return NoMatch("its operands have different shapes", add)
    later = _other_compute(other, add)
    if later is not None and list(add.graph.nodes).index(later) > list(add.graph.nodes).index(compute):
        return NoMatch("its other operand is computed later and takes it")
    return None


def _other_compute(node: fx.Node, add: fx.Node) -> fx.Node | None:
    """The other operand where it could be this group's compute op as well."""
    fits = _compute().match(node) is not None and second_user(node, add) is None and not info(node).fused
    return node if fits else None


def _check_clamp(match: Match) -> NoMatch | None:
    act = match["act"]
    computed = any(isinstance(a, fx.Node) for a in (*act.args[1:], *act.kwargs.values()))
    return NoMatch("its bounds are computed", act) if computed else None


def _record(gm: fx.GraphModule, match: Match) -> None:
    members = _members(match)
    for node in members:
        update(node, fused=tuple(n.name for n in members))


RULES = tuple(
    Rule(name, pattern, _check, _record)
    for name, pattern in (
        ("add-activation", op("act", ACTIVATIONS, _0=op("add", "add", _0=_compute()))),
        ("add-activation", op("act", ACTIVATIONS, _0=op("add", "add", _1=_compute()))),
        ("activation", op("act", ACTIVATIONS, _0=_compute())),
        ("add", op("add", "add", _0=_compute())),
        ("add", op("add", "add", _1=_compute())),
    )
)
