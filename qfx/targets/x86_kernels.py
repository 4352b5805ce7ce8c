"""oneDNN's quantized convolution and linear layer as functions of their input, everything else bound once.

What is bound are Python numbers and lists and the packed weight: converting them at every call would cost as much as a
small layer. Activations come as uint8; convolutions take and give channels-last, so that neighbours copy nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qfx.targets.x86_post_ops import NONE, PostOp

Run = Callable[..., Tensor]
_onednn = torch.ops.onednn


@dataclass(frozen=True)
class Affine:
    """How integers of ``dtype`` stand for reals; the default is a float32 tensor as it is."""

    scale: float = 1.0
    zero_point: int = 0
    dtype: torch.dtype = torch.float32


FLOAT = Affine()


@dataclass(frozen=True)
class Operands:
    """What a layer computes with.

    ``weight``: int8 of the layer's own shape; ``scale``: float32 of ``[O]``; ``bias``: float32 of ``[O]``.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


class Kernel(Protocol):
    """A layer's geometry. ``row`` is its row of :data:`qfx.targets.x86_post_ops.POST_OPS`."""

    @property
    def row(self) -> str: ...

    def bind(self, operands: Operands, like: Tensor, data: Affine, out: Affine, post: PostOp = NONE) -> Run:
        """``x -> y``; packs for inputs shaped ``like``, and runs on any other shape as well."""
        ...

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
        """``(x, other) -> y``, with the other's dtype that of the output; ``overwrite`` lets y take other's memory."""
        ...


@dataclass(frozen=True)
class Linear:
    """A linear layer on the last of any number of dimensions."""

    row: str = "linear"

    def bind(self, operands: Operands, like: Tensor, data: Affine, out: Affine, post: PostOp = NONE) -> Run:
        op = _onednn.qlinear_pointwise.default
        packed, scale, zeros, bias = _packed_linear(operands, like)
        x_scale, x_zero, y_scale, y_zero, dtype = data.scale, data.zero_point, out.scale, out.zero_point, out.dtype
        attr, scalars, algorithm = post.attr, list(post.scalars), post.algorithm

        def run(x: Tensor) -> Tensor:
            if not x.numel():  # oneDNN's reshape of no elements fails
                return x.new_empty((*x.shape[:-1], scale.numel()), dtype=dtype)
            y: Tensor = op(
                x, x_scale, x_zero, packed, scale, zeros, bias, y_scale, y_zero, dtype, attr, scalars, algorithm
            )
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
        op = _onednn.qlinear_pointwise.binary
        packed, scale, zeros, bias = _packed_linear(operands, like)
        tail = (out.scale, out.zero_point, out.dtype, other.scale, other.zero_point)
        tail = (*tail, "sum", 1.0, post.attr, list(post.scalars), post.algorithm)  # type: ignore[assignment]

        def run(x: Tensor, accumulator: Tensor) -> Tensor:
            if overwrite:  # the kernel writes to it
                accumulator = accumulator.contiguous()
            else:
                accumulator = accumulator.clone(memory_format=torch.contiguous_format)
            if not x.numel():
                return accumulator
            y: Tensor = op(x, data.scale, data.zero_point, packed, scale, zeros, accumulator, bias, *tail)
            return y

        return run


def _packed_linear(operands: Operands, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows = max(1, like.numel() // max(1, like.shape[-1]))
    packed = _onednn.qlinear_prepack(operands.weight.contiguous(), [rows, like.shape[-1]])
    return packed, operands.scale, torch.zeros_like(operands.scale, dtype=torch.int32), operands.bias


_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Convolution:
    """A convolution over 1 to 3 dimensions. In 1d it runs as 2d over one row, where there are more post-ops."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def dims(self) -> int:
        return len(self.stride)

    @property
    def row(self) -> str:
        return "conv3d" if self.dims == 3 else "conv2d"

    def bind(self, operands: Operands, like: Tensor, data: Affine, out: Affine, post: PostOp = NONE) -> Run:
        if self.dims == 1:
            wide = self.wide().bind(_wide(operands), like.unsqueeze(2), data, out, post)
            return lambda x: wide(x.unsqueeze(2)).squeeze(2)
        op = _onednn.qconv_pointwise.default
        packed, scale, zeros, bias = self._packed(operands, like, data)
        stride, padding, dilation, groups = self._lists()
        x_scale, x_zero, y_scale, y_zero, dtype = data.scale, data.zero_point, out.scale, out.zero_point, out.dtype
        attr, scalars, algorithm = post.attr, list(post.scalars), post.algorithm

        def run(x: Tensor) -> Tensor:
            y: Tensor = op(
                x, x_scale, x_zero, packed, scale, zeros, bias, stride, padding, dilation, groups,
                y_scale, y_zero, dtype, attr, scalars, algorithm,
            )  # fmt: skip
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
        if self.dims == 1:
            wide = self.wide().bind_sum(
                _wide(operands), like.unsqueeze(2), data, out, other, post, overwrite=overwrite
            )
            return lambda x, accumulator: wide(x.unsqueeze(2), accumulator.unsqueeze(2)).squeeze(2)
        op = _onednn.qconv2d_pointwise.binary
        packed, scale, zeros, bias = self._packed(operands, like, data)
        stride, padding, dilation, groups = self._lists()
        x_scale, x_zero, y_scale, y_zero, dtype = data.scale, data.zero_point, out.scale, out.zero_point, out.dtype
        other_scale, other_zero = other.scale, other.zero_point
        attr, scalars, algorithm = post.attr, list(post.scalars), post.algorithm
        memory_format = _LAST[self.dims]

        def run(x: Tensor, accumulator: Tensor) -> Tensor:
            if overwrite:  # the kernel writes to it
                accumulator = accumulator.contiguous(memory_format=memory_format)
            else:
                accumulator = accumulator.clone(memory_format=memory_format)
            y: Tensor = op(
                x, x_scale, x_zero, packed, scale, zeros, accumulator, bias, stride, padding, dilation, groups,
                y_scale, y_zero, dtype, other_scale, other_zero, "sum", 1.0, attr, scalars, algorithm,
            )  # fmt: skip
            return y

        return run

    def _lists(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def _packed(self, operands: Operands, like: Tensor, data: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shape = [max(1, like.shape[0]), *like.shape[1:]]
        weight, scale = operands.weight.contiguous(), operands.scale
        packed = _onednn.qconv_prepack(weight, scale, data.scale, data.zero_point, *self._lists(), shape)
        return packed, scale, torch.zeros_like(scale, dtype=torch.int32), operands.bias

    def wide(self) -> Convolution:
        return Convolution((1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups)


def _wide(operands: Operands) -> Operands:
    return Operands(operands.weight.unsqueeze(2), operands.scale, operands.bias)
