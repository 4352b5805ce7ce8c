"""Regions and integers of random content, from which the tests of targets make leaves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qfx.operators import OPS
from qfx.targets import AnchorRegion, DynamicQParams, PointRegion, QParams, Slot, Step

aten = torch.ops.aten

RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def qparams(
    scale: float, zero_point: int, dtype: torch.dtype = torch.uint8, low: int | None = None, high: int | None = None
) -> QParams:
    """Per-tensor parameters; the range is the dtype's unless given."""
    ends = RANGES[dtype]
    return QParams(
        torch.tensor(scale),
        torch.tensor(zero_point, dtype=torch.int32),
        None,
        None,
        ends[0] if low is None else low,
        ends[1] if high is None else high,
        dtype,
    )


def integers(shape: tuple[int, ...], q: QParams, generator: torch.Generator) -> Tensor:
    return torch.randint(q.quant_min, q.quant_max + 1, shape, generator=generator).to(q.dtype)


def weight_qparams(shape: tuple[int, ...], axis: int | None, bits: int, generator: torch.Generator) -> QParams:
    """Symmetric int8 parameters per tensor or per index of ``axis``."""
    size = () if axis is None else (shape[axis],)
    scale = 0.001 + 0.002 * torch.rand(size, generator=generator)
    half = 1 << (bits - 1)
    return QParams(scale, torch.zeros(size, dtype=torch.int32), axis, None, -half, half - 1, torch.int8)


TARGETS_OF = {
    "conv1d": aten.conv1d.default,
    "conv2d": aten.conv2d.default,
    "conv3d": aten.conv3d.default,
    "conv_transpose1d": aten.conv_transpose1d.default,
    "conv_transpose2d": aten.conv_transpose2d.input,
    "conv_transpose3d": aten.conv_transpose3d.input,
    "linear": aten.linear.default,
}


def anchor(
    name: str,
    weight_shape: tuple[int, ...],
    args: tuple[Any, ...] = (),
    *,
    data: QParams | DynamicQParams | None,
    output: QParams | None = None,
    steps: tuple[Step, ...] = (),
    bias: bool = True,
    per_channel: bool = True,
    bits: int = 8,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AnchorRegion:
    """A layer with random weights (or the integers ``weight``); its bias is int32 where the data are integers."""
    generator = torch.Generator().manual_seed(seed)
    op = OPS[name]
    of_weight = weight_qparams(weight_shape, op.channel_axis if per_channel else None, bits, generator)
    q = integers(weight_shape, of_weight, generator) if weight is None else weight
    groups = args[3] if op.channel_axis == 1 else 1
    channels = weight_shape[op.channel_axis] * groups
    bias_value: Tensor | None = None
    bias_scale: Tensor | None = None
    if bias and isinstance(data, QParams):
        bias_value = torch.randint(-2000, 2000, (channels,), generator=generator, dtype=torch.int32)
        bias_scale = (data.scale * of_weight.scale).expand(weight_shape[op.channel_axis]).repeat(groups)
    elif bias:
        bias_value = torch.randn(channels, generator=generator).to(dtype)
    return AnchorRegion(
        op, TARGETS_OF[name], data, q, of_weight, bits, bias_value, bias_scale, args, steps, output, dtype
    )


def point(
    target: Any,
    inputs: tuple[QParams, ...],
    output: QParams,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> PointRegion:
    """An operator on integers; without ``args`` its arguments are the inputs."""
    slots = tuple(Slot(i) for i in range(len(inputs)))
    name = target.name().split("::")[-1].split(".")[0]
    return PointRegion(OPS[name], target, inputs, slots if args is None else args, kwargs or {}, output)


def worst_lsb(a: Tensor, b: Tensor) -> int:
    """The largest difference of two integer tensors of one shape and dtype."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return int((a.int() - b.int()).abs().max()) if a.numel() else 0


def relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` by norms."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    size = float(b.double().norm()) if b.numel() else 0.0
    return float((a.double() - b.double()).norm()) / size if size else float(a.double().norm())


def output_scale(weight_shape: tuple[int, ...], channel_axis: int, x_scale: float) -> float:
    """A scale at which outputs of random layers fill 8 bits and clip a little."""
    terms = math.prod(weight_shape) / max(1, weight_shape[channel_axis])
    return max(1e-4, 70 * 70 * 0.002 * x_scale * math.sqrt(terms) / 64)
