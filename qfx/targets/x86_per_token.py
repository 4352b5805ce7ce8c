"""Linear layers whose activations get a scale per token when they run.

Two ways to the same sums: ``_int_mm`` of int8 and int8, and oneDNN's ``qlinear`` of uint8 (int8 + 128) and int8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qfx import kernels
from qfx.cpu import onednn_has_vnni
from qfx.targets.base import AnchorRegion
from qfx.targets.lazy import Lazy, runs_here
from qfx.targets.reference import AnchorLeaf
from qfx.targets.saturation import halves
from qfx.targets.x86_kernels import FLOAT, Affine, Linear, Operands, Run
from qfx.targets.x86_static import by_output_channel, must_split, signed

FEW_ROWS = 32
"""Up to so many rows ``_int_mm`` (4 us a call) beats ``qlinear`` (20 us), whose output needs one pass less."""


class PerTokenLeaf(Lazy, AnchorLeaf):
    """A linear layer that quantizes each row of its input by the row's own symmetric scale."""

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        self.split = must_split(self, 255)
        self.kernel = f"onednn linear per token{' in two halves' * self.split}"

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        if not runs_here(x):
            return super().forward(x, *others)
        return self.finish((self._run or self.prepared(x))(x), others)

    def prepare(self, x: Tensor) -> Run:
        assert self.dynamic is not None
        low, high = self.dynamic.quant_min, self.dynamic.quant_max
        weight, scale = signed(self), by_output_channel(self)
        bias = None if self.bias is None else self.bias.float()
        exact = onednn_has_vnni() and weight.shape[1] > 1  # _int_mm is wrong for one column
        few = _few_rows(weight, scale, bias, low, high) if exact else None
        many = self._many_rows(weight, scale, bias, low, high, x)
        channels, length = weight.shape

        def run(x: Tensor) -> Tensor:
            rows = x.detach().float().reshape(-1, length)
            multiply = few if few is not None and rows.shape[0] <= FEW_ROWS else many
            return multiply(rows).view(*x.shape[:-1], channels)

        return run

    def _many_rows(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, low: int, high: int, x: Tensor
    ) -> Callable[[Tensor], Tensor]:
        shift = 128 if low < 0 else 0
        data = Affine(1.0, (low + high + 1) // 2 + shift, torch.uint8)
        parts = halves(weight) if self.split else (weight,)
        runs = [Linear().bind(Operands(part, scale, None), x, data, FLOAT) for part in parts]

        def run(x: Tensor) -> Tensor:
            q, token_scale = kernels.quantize_per_token(x, low + shift, high + shift, torch.uint8)
            y = runs[0](q)
            for other in runs[1:]:
                y.add_(other(q))
            return y.mul_(token_scale) if bias is None else torch.addcmul(bias, y, token_scale, out=y)

        return run


def _few_rows(weight: Tensor, scale: Tensor, bias: Tensor | None, low: int, high: int) -> Callable[[Tensor], Tensor]:
    shift = 0 if low < 0 else -((low + high + 1) // 2)
    columns = weight.t()

    def run(x: Tensor) -> Tensor:
        q, token_scale = kernels.quantize_per_token(x, low + shift, high + shift, torch.int8)
        y = torch._int_mm(q, columns) * scale
        return y.mul_(token_scale) if bias is None else torch.addcmul(bias, y, token_scale, out=y)

    return run
