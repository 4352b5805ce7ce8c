"""Write a product with one's own sigmoid as silu.

Before::

    %sigmoid = sigmoid(%x)
    %mul = mul(%x, %sigmoid)

After::

    %silu = silu(%x)

One table then serves for what were a table and a product. Declines when the sigmoid has a second reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qfx import Stage
from qfx.meta import add_notes, info
from qfx.patterns import Match, NoMatch, Rule, apply, op, second_user
from qfx.rewrite import erase_dead, insert_call


@dataclass(frozen=True)
class FuseSilu:
    """Applies :data:`RULES`."""

    name: ClassVar[str] = "fuse-silu"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        return apply(RULES, gm, notes=self.name).rewrites


def _check(match: Match) -> NoMatch | None:
    mul, sigmoid = match["mul"], match["sigmoid"]
    if set(mul.args) != {sigmoid, sigmoid.args[0]}:
        return NoMatch("the sigmoid is another value's")
    return second_user(sigmoid, mul)


def _rewrite(gm: fx.GraphModule, match: Match) -> None:
    mul, sigmoid = match["mul"], match["sigmoid"]
    with gm.graph.inserting_before(mul):
        silu = insert_call(gm, torch.ops.aten.silu.default, sigmoid.args[0], like=mul, name="silu")
    mul.replace_all_uses_with(silu)
    erase_dead(gm, mul)
    add_notes(gm, FuseSilu.name, [f"{silu.name} of {info(silu).origin or 'the model'} was a sigmoid and a product"])


_SIGMOID = op("sigmoid", "sigmoid")

RULES = (
    Rule("x-sigmoid", op("mul", "mul", _1=_SIGMOID), _check, _rewrite),
    Rule("sigmoid-x", op("mul", "mul", _0=_SIGMOID), _check, _rewrite),
)
