"""A target that computes as ``reference`` does and counts the multiply-accumulates of its convolutions.

It stands for a machine with an integer unit for convolutions only: it refuses all other layers, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx, nn

from qfx import QConfig
from qfx.operators import Kind, Op
from qfx.patterns import NoMatch
from qfx.targets import AnchorRegion, Leaf
from qfx.targets.reference import AnchorLeaf, Reference


@dataclass(frozen=True)
class Counting(Reference):
    """Convolutions in integers, counted; linear layers and matrix products in float."""

    name: ClassVar[str] = "counting"

    def slow(self) -> str | None:
        return None

    def refuses(self, node: fx.Node, op: Op, qconfig: QConfig) -> str | None:
        if op.kind is Kind.ANCHOR and not op.name.startswith("conv"):
            return f"this machine has no integer unit for {op.name}"
        return super().refuses(node, op, qconfig)

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        return CountedConvolution(region)


class CountedConvolution(AnchorLeaf):
    """``macs``: the multiply-accumulates since it was made."""

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        self.kernel = self.kernel.replace("reference", "counting")
        self.macs = 0

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        y = super().forward(x, *others)
        transposed = self.axis == 1  # there every input element meets every weight of its channel
        self.macs += (x if transposed else y).numel() * math.prod(self.weight_shape[1:])
        return y


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of all counted convolutions of a lowered model."""
    return sum(leaf.macs for leaf in model.modules() if isinstance(leaf, CountedConvolution))
