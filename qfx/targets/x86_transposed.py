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
        cuts = self.cuts()

        def run(x: Tensor) -> Tensor:
            y = self.interleave(inner(x))
            for axis, (start, s, extra) in enumerate(cuts, start=2):
                y = y.narrow(axis, start, x.shape[axis] * s + extra)
            return y

        return run

    def bind_sum(
        self,
        operands: Operands,
        like: Tensor,
        data: Affine,
        out: Affine,
        other: Affine,
        post: PostOp = NONE,
        *,
        overwrite: bool = False,
    ) -> Run:
        raise AssertionError("POST_OPS has no sum for transposed convolutions: they add behind their kernel")

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

    def interleave(self, y: Tensor) -> Tensor:
        """``[N, G * prod(s) * O / G, ...]`` to ``[N, O, ...]``, in memory channels-last."""
        dims = len(self.stride)
        channels = y.shape[1] // (self.groups * math.prod(self.stride))
        split = y.unflatten(1, (self.groups, *self.stride, channels))
        axes = [axis for i in range(dims) for axis in (3 + dims + i, 2 + i)]  # each size before its phase
        shape = [size * s for size, s in zip(y.shape[2:], self.stride, strict=True)]
        ordered = split.permute(0, *axes, 1, 2 + dims)
        out: Tensor = ordered.reshape(y.shape[0], *shape, self.groups * channels)
        return out.movedim(-1, 1)

    def cuts(self) -> tuple[tuple[int, int, int], ...]:
        """Per dimension ``(start, stride, extra)``: the output is ``[start, start + size * stride + extra)``."""
        found = []
        for i, (s, p, reach) in enumerate(zip(self.stride, self.padding, self._reach, strict=True)):
            start = p - s * (self._taps[i] - 1 - self.convolution().padding[i])
            found.append((start, s, reach + self.output_padding[i] - 2 * p - s))
        return tuple(found)
