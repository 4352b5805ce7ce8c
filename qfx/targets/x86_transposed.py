"""A transposed convolution as an ordinary one with ``prod(stride)`` times the output channels.

Output ``s * a + r`` of a transposed convolution with stride s is ``sum_j w[s * j + r] * x[a - j]``: for each phase
``r < s`` an ordinary convolution of x with every s-th weight. All phases are computed at once, as channels, and then
interleaved; unlike inserting zeros into x, that multiplies nothing by zero. Method: sub-pixel convolution, Shi et al.,
2016 (arXiv:1609.05158, arXiv:1609.07009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from qfx.targets.x86_kernels import Affine, Convolution, Operands, Run
from qfx.targets.x86_post_ops import NONE, PostOp


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution over 1 to 3 dimensions; ``kernel_size`` is that of its weight."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def row(self) -> str:
        return "conv_transpose3d" if len(self.stride) == 3 else "conv_transpose2d"

    def bind(self, operands: Operands, like: Tensor, data: Affine, out: Affine, post: PostOp = NONE) -> Run:
        inner = self.convolution().bind(self.phases(operands), like, data, out, post)
        return lambda x: self.interleave(inner(x), x)

    def bind_sum(
        self, operands: Operands, like: Tensor, data: Affine, out: Affine, other: Affine, post: PostOp = NONE
    ) -> Run:
        raise NotImplementedError("a transposed convolution adds behind its kernel")

    @property
    def _reach(self) -> list[int]:
        """Inputs that an output depends on, per dimension, holes of the dilation included."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]

    @property
    def _taps(self) -> list[int]:
        return [-(-reach // s) for reach, s in zip(self._reach, self.stride, strict=True)]

    def convolution(self) -> Convolution:
        """The ordinary convolution: padded so far that both the first and the last output are there."""
        ones = (1,) * len(self.stride)
        paddings = []
        for taps, reach, s, p, extra in zip(
            self._taps, self._reach, self.stride, self.padding, self.output_padding, strict=True
        ):
            paddings.append(max(taps - 1 - p // s, (reach + extra - p - 1) // s, 0))
        return Convolution(ones, tuple(paddings), ones, self.groups)

    def phases(self, operands: Operands) -> Operands:
        """Weight, scale and bias with a channel per group, phase and output channel, in this order."""
        weight, groups, dims = operands.weight, self.groups, len(self.stride)
        channels = weight.shape[1]
        taps = self._taps
        full = weight.new_zeros((*weight.shape[:2], *(t * s for t, s in zip(taps, self.stride, strict=True))))
        places = tuple(slice(0, reach, d) for reach, d in zip(self._reach, self.dilation, strict=True))
        full[(slice(None), slice(None), *places)] = weight
        # [G, I / G, O / G, taps, s, taps, s, ...]: tap t and phase r of each dimension
        split = full.reshape(groups, -1, channels, *(n for pair in zip(taps, self.stride, strict=True) for n in pair))
        tap_axes, phase_axes = list(range(3, 3 + 2 * dims, 2)), list(range(4, 4 + 2 * dims, 2))
        ordered = split.flip(tap_axes).permute(0, *phase_axes, 2, 1, *tap_axes)
        phased = ordered.reshape(-1, weight.shape[0] // groups, *taps)

        def repeated(values: Tensor) -> Tensor:
            return values.view(groups, 1, channels).expand(-1, math.prod(self.stride), -1).reshape(-1)

        bias = None if operands.bias is None else repeated(operands.bias)
        return Operands(phased.contiguous(), repeated(operands.scale), bias)

    def interleave(self, y: Tensor, x: Tensor) -> Tensor:
        """``[N, G * prod(s) * O / G, ...]`` to ``[N, O, ...]``, cut to the output's size."""
        dims = len(self.stride)
        channels = y.shape[1] // (self.groups * math.prod(self.stride))
        split = y.unflatten(1, (self.groups, *self.stride, channels))
        sizes, phases = range(3 + dims, 3 + 2 * dims), range(2, 2 + dims)
        ordered = split.permute(0, *(axis for pair in zip(sizes, phases, strict=True) for axis in pair), 1, 2 + dims)
        shape = [size * s for size, s in zip(y.shape[2:], self.stride, strict=True)]
        out = ordered.reshape(y.shape[0], *shape, self.groups * channels).movedim(-1, 1)
        padding = self.convolution().padding
        for axis, (size, s, p, taps, reach, extra, inner) in enumerate(
            zip(
                x.shape[2:], self.stride, self.padding, self._taps, self._reach, self.output_padding, padding,
                strict=True,
            ),
            start=2,
        ):  # fmt: skip
            length = (size - 1) * s - 2 * p + reach + extra
            out = out.narrow(axis, p - s * (taps - 1 - inner), length)
        return out
