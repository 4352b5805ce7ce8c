"""Embeddings whose tables are stored in integers: ATen gathers the rows, a C++ loop dequantizes them."""

from __future__ import annotations

from torch import Tensor

from qfx import kernels
from qfx.targets.base import LookupRegion
from qfx.targets.lazy import runs_here
from qfx.targets.reference import LookupLeaf


class LoopLookupLeaf(LookupLeaf):
    """The same numbers as the reference's, in one pass over the gathered rows."""

    def __init__(self, region: LookupRegion) -> None:
        super().__init__(region)
        self.kernel = f"rows of int{region.bits}, loop dequantize ({kernels.backend().partition(':')[0]})"

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if not runs_here(q):
            return super().dequantize(q, scale, zero_point)
        return kernels.dequantize(q, scale, zero_point, self.axis, self.group_size)
