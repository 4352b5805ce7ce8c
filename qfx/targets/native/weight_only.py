"""Linear layers with weights of 2 to 8 bits on float activations, by a C++ kernel that reads the narrow weights once.

The kernel is made for the one row of decoding, in float32 or bfloat16. With more rows it keeps up with a float layer,
and many rows dequantize the weight and multiply in the input's dtype.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qfx import jit
from qfx.targets.base import AnchorRegion
from qfx.targets.lazy import Lazy, runs_here
from qfx.targets.native.weight_only_packing import PackedWeight, pack_weight
from qfx.targets.reference import AnchorLeaf
from qfx.targets.x86_kernels import Run
from qfx.targets.x86_static import LoopQParams

MOST_ROWS = {torch.float32: 128, torch.bfloat16: 16}
"""The rows up to which the kernel takes less time than to dequantize and multiply.

In float32 it then computes as fast as a float matrix product; in bfloat16 the CPU may have faster instructions.
"""

_CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = tuple(_CSRC / name for name in ("weight_only.cpp", "native/weight_only.h", "native/team.h", "parallel.h"))

_pointer, _count = ctypes.c_void_p, ctypes.c_int64
_SCRATCH = (_count, _count, ctypes.c_int)
_MULTIPLY = (*(_pointer,) * 7, *(_count,) * 4, ctypes.c_float, *(ctypes.c_int,) * 3)


@functools.cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled kernel, or None where there is no compiler; ``flags`` are further ones for it.

    Raises:
        NativeError: there is a compiler, and it failed.
    """
    found = jit.load(SOURCES, flags=flags)
    if found is not None:
        found.qfx_weight_only_scratch.argtypes, found.qfx_weight_only_scratch.restype = _SCRATCH, _count
        found.qfx_weight_only.argtypes, found.qfx_weight_only.restype = _MULTIPLY, None
    return found


def bind(kernel: ctypes.CDLL, packed: PackedWeight, bias: Tensor | None) -> Run:
    """The layer as a function of float32 or bfloat16 ``[..., K]`` that gives ``[..., O]`` of the same dtype.

    The kernel reads ``packed`` and ``bias`` (float32 ``[O]``) where they lie; the function keeps them alive.
    """
    channels, length = packed.out_features, packed.in_features
    floats: int = kernel.qfx_weight_only_scratch(length, packed.group, packed.bits)
    constants = tuple(
        None if part is None else part.data_ptr() for part in (packed.weight, packed.scale, packed.zero, bias)
    )

    def run(x: Tensor, kept: tuple[PackedWeight, Tensor | None] = (packed, bias)) -> Tensor:
        rows = x.reshape(-1, length).contiguous()
        y = rows.new_empty((*x.shape[:-1], channels))
        arranged = rows.new_empty(rows.shape[0] * floats, dtype=torch.float32)
        kernel.qfx_weight_only(
            rows.data_ptr(), *constants, arranged.data_ptr(), y.data_ptr(), rows.shape[0], length, channels,
            packed.group, packed.middle, packed.bits, x.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return y

    return run


class NativeWeightOnlyLeaf(Lazy, AnchorLeaf):
    """A linear layer that computes in its input's dtype; gradients of the input pass through.

    bfloat16 is rounded once, behind the bias: the weight itself is never rounded to it.
    """

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        assert region.weight_qparams is not None
        self.weight_qparams = LoopQParams(region.weight_qparams)
        self.packs = _packs(self)
        self.kernel = f"native linear on int{region.weight_bits} weights"

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        few = 0 < x.numel() <= MOST_ROWS.get(x.dtype, 0) * self.weight_shape[1]
        if not (few and self.packs and runs_here(x)) or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x, *others)
        return self.finish((self._run or self.prepared(x))(x), others)

    def prepare(self, x: Tensor) -> Run:
        kernel = library()
        if kernel is None:
            return self._weight_only
        return bind(kernel, self.packed(), None if self.bias is None else self.bias.float().contiguous())

    def packed(self) -> PackedWeight:
        """The weight in the kernel's layout."""
        qparams, (channels, length) = self.weight_qparams, self.weight_shape
        scale, zero_point = (p if p.ndim == 2 else p.reshape(-1, 1) for p in (qparams.scale, qparams.zero_point))
        scale = scale.expand(channels, -1)
        group = qparams.layout["group_size"]
        group = length if group in (None, -1) else group
        return pack_weight(self.integers(), scale, zero_point.expand_as(scale), group, self.weight_bits)


def _packs(leaf: AnchorLeaf) -> bool:
    """True where the kernel has the weight's layout: scales per tensor, output channel, or group of inputs."""
    qparams, layout, limits = leaf.weight_qparams, leaf.weight_qparams.layout, leaf.weight_qparams.limits
    axes = (None, 0, -2) if layout["group_size"] is None else (1, -1)
    zeros = qparams.zero_point
    within = bool(((zeros >= limits["quant_min"]) & (zeros <= limits["quant_max"])).all())
    return layout["axis"] in axes and within and leaf.weight.numel() > 0
