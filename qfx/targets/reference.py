"""The definition of right: integers accumulated exactly, then scaled in float32, then rounded once.

Products and sums of integers are taken in float64, which holds every integer below 2^53 exactly; with 8-bit operands
that allows more than 10^11 terms. Runs wherever torch runs, and consists of ATen operators only, so that it exports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import affine
from qfx.operators import Op
from qfx.ops import pack, unpack
from qfx.patterns import NoMatch
from qfx.spec import PerAxis, PerGroup, PerTensor, PerToken, QConfig
from qfx.targets.base import (
    AnchorRegion,
    DynamicQParams,
    Leaf,
    LookupRegion,
    Operator,
    PointRegion,
    QParams,
    fill,
)

NOT_BY_ROW = "the table has scales across its rows, so that one row cannot be dequantized by itself"


def _of_inputs(op: Op, groups: PerGroup) -> bool:
    """True for groups of a weight's input channels, which lie along axis 1 behind the output channels."""
    return op.channel_axis == 0 and groups.axis in ((1, -1) if op.name == "linear" else (1,))


@dataclass(frozen=True)
class Reference:
    """Accepts every operator that qfx quantizes."""

    name: ClassVar[str] = "reference"

    def unavailable(self, device: str = "cpu") -> str | None:
        return None

    def slow(self) -> str | None:
        return "it computes exactly, in float64, and is slower than float: use it to check, not to deploy"

    def refuses(self, node: fx.Node, op: Op, qconfig: QConfig) -> str | None:
        activation, weight = qconfig.activation, qconfig.weight
        if activation is not None:
            allowed = PerTensor | PerToken if op.name == "linear" else PerTensor
            if not isinstance(activation.granularity, allowed):
                return f"{op.name} takes no activations {activation.granularity}"
            if op.weight is None and activation.dynamic:
                return f"{op.name} takes no dynamic activations"
        if weight is not None and op.weight is not None:
            if isinstance(weight.granularity, PerGroup) and not _of_inputs(op, weight.granularity):
                hint = ", unless of its input channels, axis 1" if op.channel_axis == 0 else ""
                return f"{op.name} takes no weights {weight.granularity}{hint}"
            if weight.dynamic:
                return f"{op.name} takes no dynamic weights"
            if isinstance(weight.granularity, PerAxis) and weight.granularity.axis not in (0, op.channel_axis):
                return f"{op.name} takes weight scales along its output channels only"
        return None

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        return MatmulLeaf(region) if region.op.weight is None else AnchorLeaf(region)

    def lower_point(self, region: PointRegion) -> Leaf | NoMatch:
        return PointLeaf(region)

    def lower_lookup(self, region: LookupRegion) -> Leaf | NoMatch:
        return LookupLeaf(region) if region.by_row else NoMatch(NOT_BY_ROW)


class QParamsBuffers(nn.Module):
    """QParams as buffers of a leaf, so that they follow ``.to(device)`` and appear in the state dict.

    Equal zero points, as symmetric weights have, are kept as one number.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", _once(qparams.zero_point))
        self.layout: dict[str, Any] = {"axis": qparams.axis, "group_size": qparams.group_size}
        self.limits: dict[str, Any] = {
            "quant_min": qparams.quant_min,
            "quant_max": qparams.quant_max,
            "dtype": qparams.dtype,
        }

    def quantize(self, x: Tensor) -> Tensor:
        return affine.quantize(x, self.scale, self.zero_point, **self.layout, **self.limits)

    def dequantize(self, q: Tensor) -> Tensor:
        return affine.dequantize(q, self.scale, self.zero_point, **self.layout)

    def centred(self, q: Tensor) -> Tensor:
        """``q - zero_point`` in float64: exact integers."""
        return q.double() - affine.expand_qparam(self.zero_point, q, **self.layout).double()


def _once(zero_point: Tensor) -> Tensor:
    """A copy of ``zero_point``, of shape ``[]`` where all its numbers are equal."""
    first = zero_point.flatten()[:1]
    return first[0].clone() if first.numel() and bool((zero_point == first).all()) else zero_point.clone()


def _buffers(qparams: QParams | DynamicQParams | None) -> QParamsBuffers | None:
    return QParamsBuffers(qparams) if isinstance(qparams, QParams) else None


class _Epilogue(Leaf):
    """What follows the accumulation in every anchor: steps in float32, then the output's rounding."""

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__()
        self.calls = tuple((step.name, Operator(step.target), step.args, dict(step.kwargs)) for step in region.steps)
        self.others = nn.ModuleList(
            nn.Identity() if step.other is None else QParamsBuffers(step.other)
            for step in region.steps
            if step.name == "add"
        )
        self.output = _buffers(region.output)
        self.dtype = region.dtype
        self.kernel = "+".join(["reference " + region.op.name, *(step.name for step in region.steps)])

    def given(self, y: Tensor) -> Tensor:
        """A tensor of the sizes of ``y`` and the leaf's dtype, whose values are left open."""
        return y.new_empty(y.shape, dtype=self.dtype if self.output is None else self.output.limits["dtype"])

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        position = 0
        for name, target, args, kwargs in self.calls:
            if name == "add":
                reader, other = self.others[position], others[position]
                y = y + (reader.dequantize(other) if isinstance(reader, QParamsBuffers) else other.float())
                position += 1
            else:
                y = target(y, *args, **kwargs)
        return y.to(self.dtype) if self.output is None else self.output.quantize(y)


class AnchorLeaf(_Epilogue):
    """A convolution or linear layer: static, dynamic or weight-only.

    An integer bias has no scale of its own: it is added to the sums, which have ``data``'s times the weight's.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        assert region.weight is not None and region.weight_qparams is not None
        self.target, self.args, self.axis = Operator(region.target), region.args, region.op.channel_axis
        self.groups = region.args[3] if self.axis == 1 else 1
        self.data = _buffers(region.data)
        self.weight_only = region.data is None
        self.dynamic = region.data if isinstance(region.data, DynamicQParams) else None
        self.weight_qparams = QParamsBuffers(region.weight_qparams)
        self.weight_shape, self.weight_bits = tuple(region.weight.shape), region.weight_bits
        self.weight_signed = region.weight.dtype == torch.int8
        stored = pack(region.weight.flatten(1), region.weight_bits) if region.stored is None else region.stored
        self.register_buffer("weight", stored.flatten(1))
        self.register_buffer("bias", region.bias)
        self.integer_bias = region.bias_scale is not None
        assert not (self.integer_bias and region.weight_qparams.group_size is not None), "sums of groups have no scale"

    def example(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        real = x if x.is_floating_point() else x.new_empty(x.shape, dtype=torch.float32)
        y = self.target(real, real.new_empty(self.weight_shape), None, *self.args)
        return self.given(y)

    def integers(self) -> Tensor:
        """The weight's integers in its own shape; narrow ones are stored packed."""
        length = math.prod(self.weight_shape[1:])
        return unpack(self.weight, self.weight_bits, self.weight_signed, length).reshape(self.weight_shape)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        if self.data is None and self.dynamic is None:
            return self.finish(self._weight_only(x), others)
        if self.dynamic is not None:
            centred, scale = self._quantize_now(x, self.dynamic)
        else:
            assert self.data is not None
            centred, scale = self.data.centred(x), self.data.scale
        y = self._product(centred, scale)
        return self.finish(y, others)

    def _weight_only(self, x: Tensor) -> Tensor:
        weight = self.weight_qparams.dequantize(self.integers()).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = self.target(x, weight, bias, *self.args)
        return y

    def _quantize_now(self, x: Tensor, how: DynamicQParams) -> tuple[Tensor, Tensor]:
        low, high = affine.min_max(x, how.axis, how.group_size)
        scale, zero_point = affine.choose_qparams(
            low, high, symmetric=how.symmetric, quant_min=how.quant_min, quant_max=how.quant_max
        )
        layout: dict[str, Any] = {"axis": how.axis, "group_size": how.group_size}
        q = affine.quantize(
            x, scale, zero_point, **layout, quant_min=how.quant_min, quant_max=how.quant_max, dtype=how.dtype
        )
        return q.double() - affine.expand_qparam(zero_point, q, **layout).double(), scale

    def _product(self, centred: Tensor, scale: Tensor) -> Tensor:
        """The layer on exact integers, as float32 reals."""
        weight = self.weight_qparams.centred(self.integers())
        if self.weight_qparams.layout["group_size"] is not None:  # scales inside the sum: no common factor
            weight = weight * affine.expand_qparam(self.weight_qparams.scale, weight, **self.weight_qparams.layout)
            y = self.target(centred, weight, None, *self.args).float() * scale
        else:
            bias = self.bias.double() if self.integer_bias and self.bias is not None else None
            accumulator = self.target(centred, weight, bias, *self.args)
            y = accumulator.float() * self._channels(scale * self._by_channel())
        return y if self.bias is None or self.integer_bias else y + self._channels(self.bias.float())

    def _by_channel(self) -> Tensor:
        scale = self.weight_qparams.scale
        return scale.repeat(self.groups) if scale.ndim else scale

    def _channels(self, values: Tensor) -> Tensor:
        """``values`` by output channel, shaped to broadcast; per-token scales already do."""
        if values.ndim != 1 or len(self.weight_shape) == 2:  # linear: the channels are the last axis anyway
            return values
        return values.reshape(-1, *[1] * (len(self.weight_shape) - 2))


class MatmulLeaf(_Epilogue):
    """The product of two activations."""

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        assert isinstance(region.data, QParams) and region.second is not None
        self.target = Operator(region.target)
        self.left, self.right = QParamsBuffers(region.data), QParamsBuffers(region.second)

    def forward(self, left: Tensor, right: Tensor, *others: Tensor) -> Tensor:
        accumulator = self.target(self.left.centred(left), self.right.centred(right))
        return self.finish(accumulator.float() * (self.left.scale * self.right.scale), others)

    def example(self, *inputs: Tensor) -> Tensor:
        return self.given(self.target(*(x.new_empty(x.shape, dtype=torch.float32) for x in inputs[:2])))


class PointLeaf(Leaf):
    """Dequantize, apply the ATen operator in float32, quantize."""

    def __init__(self, region: PointRegion) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = Operator(region.target), region.args, region.kwargs
        self.inputs = nn.ModuleList(QParamsBuffers(q) for q in region.inputs)
        self.output = QParamsBuffers(region.output)
        self.kernel = f"reference {region.op.name}"

    def forward(self, *integers: Tensor) -> Tensor:
        return self.output.quantize(self._real(integers, lambda reader, q: reader.dequantize(q)))

    def example(self, *inputs: Tensor) -> Tensor:
        y = self._real(inputs, lambda _, q: q.new_empty(q.shape, dtype=torch.float32))
        return y.new_empty(y.shape, dtype=self.output.limits["dtype"])

    def _real(self, integers: tuple[Tensor, ...], real: Callable[[QParamsBuffers, Tensor], Tensor]) -> Tensor:
        """The operator on what ``real`` makes of the integers."""
        pairs = zip(self.inputs, integers, strict=True)
        reals = tuple(real(reader, q) for reader, q in pairs if isinstance(reader, QParamsBuffers))
        y: Tensor = self.target(*fill(self.args, reals), **{k: fill(v, reals) for k, v in self.kwargs.items()})
        return y


class LookupLeaf(Leaf):
    """Rows of integers, gathered and dequantized: an embedding whose table never becomes float as a whole."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    weight_only = storage_only = True

    def __init__(self, region: LookupRegion) -> None:
        super().__init__()
        self.bits, self.signed, self.length, self.dtype = region.bits, region.signed, region.length, region.dtype
        self.axis, self.group_size = region.qparams.axis, region.qparams.group_size
        self.register_buffer("weight", region.table)
        self.register_buffer("scale", region.qparams.scale.clone())
        self.register_buffer("zero_point", _once(region.qparams.zero_point))
        self.kernel = f"reference rows of int{region.bits}"

    def forward(self, indices: Tensor) -> Tensor:
        """``indices``, int32 or int64 of any shape, to ``[*indices.shape, length]`` of the table's float dtype."""
        rows = indices.reshape(-1)
        q = unpack(self.weight.index_select(0, rows), self.bits, self.signed, self.length)
        scale, zero_point = (p.index_select(0, rows) if p.ndim else p for p in (self.scale, self.zero_point))
        return self.dequantize(q, scale, zero_point).to(self.dtype).reshape(*indices.shape, self.length)

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """float32 of the integers ``q``, ``[N, length]``, with scales and zero points of the N rows, or one number."""
        return affine.dequantize(q, scale, zero_point, axis=self.axis, group_size=self.group_size)
