"""Linear layers with narrow weights on float activations: w8a16, w4a16.

A few rows of bfloat16 go through a kernel that reads the narrow weights, which is 2 to 6 times faster; everything else
dequantizes the weight and multiplies in the input's dtype. Those kernels lose in float32 and at many rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qfx.targets.base import AnchorRegion
from qfx.targets.lazy import Lazy, runs_here
from qfx.targets.reference import AnchorLeaf
from qfx.targets.x86_kernels import Run
from qfx.targets.x86_static import LoopQParams, by_output_channel, signed

FEW_ROWS = 16
_aten = torch.ops.aten
_ALIGNED = 64  # _weight_int8pack_mm reads beyond rows of other lengths, and crashes
_GROUPS = (32, 64, 128, 256)  # what _weight_int4pack_mm_for_cpu takes
_CHANNELS = 16  # it takes multiples of so many output channels


class WeightOnlyLeaf(Lazy, AnchorLeaf):
    """A linear layer that computes in its input's dtype; gradients of the input pass through."""

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        assert region.weight_qparams is not None
        self.weight_qparams = LoopQParams(region.weight_qparams)
        self.packs = _packs(self)
        self.kernel = f"aten linear on int{region.weight_bits} weights"

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        few = x.dtype == torch.bfloat16 and 0 < x.numel() <= FEW_ROWS * self.weight_shape[1]
        if not (few and self.packs and runs_here(x)) or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x, *others)
        return self.finish((self._run or self.prepared(x))(x), others)

    def prepare(self, x: Tensor) -> Run:
        multiply = _int8_rows(self) if self.weight_bits > 4 else _int4_rows(self)
        bias, channels = self.bias, self.weight_shape[0]

        def run(x: Tensor) -> Tensor:
            y = multiply(x.reshape(-1, x.shape[-1]))
            y = y.to(x.dtype) if bias is None else (y + bias).to(x.dtype)
            return y.view(*x.shape[:-1], channels)

        return run


def _packs(leaf: AnchorLeaf) -> bool:
    """True where one of the two kernels has the weight's layout."""
    qparams, layout = leaf.weight_qparams, leaf.weight_qparams.layout
    last = layout["axis"] in (-1, 1)
    if leaf.weight_bits > 4:
        symmetric = leaf.weight_signed and not qparams.zero_point.any()
        return symmetric and layout["group_size"] is None and layout["axis"] in (None, 0)
    middle = 0 if leaf.weight_signed else 8
    symmetric = bool((qparams.zero_point == middle).all())
    grouped = layout["group_size"] in _GROUPS and last
    return symmetric and grouped and leaf.weight_shape[0] % _CHANNELS == 0


def _int8_rows(leaf: AnchorLeaf) -> Run:
    missing = -leaf.weight_shape[1] % _ALIGNED
    weight = pad(signed(leaf), (0, missing)).contiguous()
    scale = by_output_channel(leaf)
    ones = torch.ones_like(scale, dtype=torch.bfloat16)  # the kernel's own scales would be rounded to bfloat16
    return lambda x: _aten._weight_int8pack_mm(pad(x, (0, missing)) if missing else x, weight, ones) * scale


def _int4_rows(leaf: AnchorLeaf) -> Run:
    group = leaf.weight_qparams.layout["group_size"]
    missing = -leaf.weight_shape[1] % group  # the ragged last group
    weight = leaf.integers().to(torch.int32) + (8 if leaf.weight_signed else 0)
    packed = _aten._convert_weight_to_int4pack_for_cpu(pad(weight, (0, missing), value=8), 1)
    scale = leaf.weight_qparams.scale.t()
    both = torch.stack([scale, torch.zeros_like(scale)], -1).to(torch.bfloat16).contiguous()
    return lambda x: _aten._weight_int4pack_mm_for_cpu(pad(x, (0, missing)) if missing else x, packed, group, both)
