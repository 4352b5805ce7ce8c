"""Layers whose activations have constant scales: integers in, oneDNN, integers or floats out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qfx import kernels
from qfx.cpu import onednn_has_vnni
from qfx.targets.base import AnchorRegion, QParams
from qfx.targets.lazy import Lazy, runs_here
from qfx.targets.reference import AnchorLeaf, QParamsBuffers
from qfx.targets.saturation import halves, may_saturate
from qfx.targets.x86_kernels import FLOAT, Affine, Convolution, Kernel, Linear, Operands, Run
from qfx.targets.x86_post_ops import BEHIND, NONE, fuse, real_bounds
from qfx.targets.x86_transposed import TransposedConvolution


class LoopQParams(QParamsBuffers):
    """QParams whose quantize and dequantize are the loops of :mod:`qfx.kernels`: the same numbers, faster."""

    def quantize(self, x: Tensor) -> Tensor:
        if not runs_here(x):
            return super().quantize(x)
        return kernels.quantize(x, self.scale, self.zero_point, **self.layout, **self.limits)

    def dequantize(self, q: Tensor) -> Tensor:
        if not runs_here(q):
            return super().dequantize(q)
        return kernels.dequantize(q, self.scale, self.zero_point, **self.layout)

    def numbers(self) -> Affine:
        """Scale and zero point per tensor as Python numbers."""
        return Affine(float(self.scale), int(self.zero_point), self.limits["dtype"])


def kernel_of(region: AnchorRegion) -> Kernel:
    """The geometry of the region's layer."""
    if region.op.name == "linear":
        return Linear()
    assert region.weight is not None
    size = tuple(region.weight.shape[2:])
    if region.op.channel_axis == 0:
        stride, padding, dilation = (_per_dimension(values, len(size)) for values in region.args[:3])
        return Convolution(stride, padding, dilation, groups=region.args[3])
    *given, groups, last = region.args
    stride, padding, output_padding, dilation = (_per_dimension(values, len(size)) for values in (*given, last))
    return TransposedConvolution(size, stride, padding, output_padding, dilation, groups)


def _per_dimension(values: Any, dims: int) -> tuple[int, ...]:
    given = (values,) if isinstance(values, int) else tuple(values)
    return given * dims if len(given) == 1 else given


def signed(leaf: AnchorLeaf) -> Tensor:
    """The weight's integers less their zero point, int8 in the weight's own shape; their range must allow it."""
    weight, zero_point = leaf.integers(), leaf.weight_qparams.zero_point
    if weight.dtype == torch.int8 and not zero_point.any():
        return weight
    shape = [1] * weight.ndim
    if zero_point.ndim:
        shape[leaf.axis] = -1
    return (weight.to(torch.int16) - zero_point.to(torch.int16).reshape(shape)).to(torch.int8)


def by_output_channel(leaf: AnchorLeaf) -> Tensor:
    """The weight's scale for every output channel, float32 of ``[O]``."""
    scale = leaf.weight_qparams.scale.float()
    channels = leaf.weight_shape[leaf.axis]
    return scale.reshape(-1).expand(channels).repeat(leaf.groups)


def must_split(leaf: AnchorLeaf, quant_max: int) -> bool:
    """True where this machine's kernels could saturate with the leaf's weights."""
    return not onednn_has_vnni() and may_saturate(signed(leaf).movedim(leaf.axis, 0), quant_max)


class StaticLeaf(Lazy, AnchorLeaf):
    """A convolution, transposed convolution or linear layer on integers."""

    data: LoopQParams
    output: LoopQParams | None

    def __init__(self, region: AnchorRegion) -> None:
        super().__init__(region)
        assert isinstance(region.data, QParams)
        self.data = LoopQParams(region.data)
        self.output = None if region.output is None else LoopQParams(region.output)
        self.others = torch.nn.ModuleList(
            torch.nn.Identity() if step.other is None else LoopQParams(step.other)
            for step in region.steps
            if step.name == "add"
        )
        self.geometry = kernel_of(region)
        self.channels_last = region.op.name != "linear"
        self.fusion = fuse(self.geometry.row, region.steps, region.output)
        self.split = must_split(self, self._largest())
        if self.split:
            self.fusion = BEHIND
        self.bounds_of_sum = _bounds_of_sum(region)
        self.unbatched = len(region.weight.shape) - 1 if region.op.name != "linear" and region.weight is not None else 0
        self.kernel = self._name(region)

    def _name(self, region: AnchorRegion) -> str:
        steps = [step.name for step in region.steps]
        if self.fusion.inside:
            return "onednn " + "+".join([region.op.name, *steps])
        behind = f", then {'+'.join(steps)}" if steps else ""
        return f"onednn {region.op.name}{' in two halves' * self.split}{behind}"

    def _largest(self) -> int:
        """The largest activation, as uint8."""
        quant_max: int = self.data.limits["quant_max"]
        return quant_max + 128 if self.data.limits["dtype"] == torch.int8 else quant_max

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        if not runs_here(x):
            return super().forward(x, *others)
        if x.ndim == self.unbatched:
            return self.forward(x.unsqueeze(0), *(other.unsqueeze(0) for other in others)).squeeze(0)
        return (self._run or self.prepared(x))(x, *others)

    def prepare(self, x: Tensor) -> Run:
        data = self.data.numbers()
        run = self._inside(x, data) if self.fusion.inside else self._behind(x, data)
        return _shifted(run) if data.dtype == torch.int8 else run

    def _operands(self) -> Operands:
        bias, scale = self.bias, by_output_channel(self)
        if bias is not None:
            bias = bias * (self.data.scale * scale) if self.integer_bias else bias.float()
        return Operands(signed(self), scale, bias)

    def _inside(self, x: Tensor, data: Affine) -> Run:
        fusion, output = self.fusion, self.output
        data = _as_uint8(data)
        if output is None:
            direct = self.dtype in (torch.float32, torch.bfloat16)
            run = self.geometry.bind(
                self._operands(), x, data, Affine(dtype=self.dtype) if direct else FLOAT, fusion.post
            )
            return run if direct else _converted(run, self.dtype)
        if fusion.adds:
            other = self.others[0]
            assert isinstance(other, LoopQParams)
            run = self.geometry.bind_sum(
                self._operands(), x, data, output.numbers(), other.numbers(), fusion.post, overwrite=self.overwrites
            )
        else:
            run = self.geometry.bind(self._operands(), x, data, output.numbers(), fusion.post)
        return self._bounded(run, output)

    def _bounded(self, run: Run, output: LoopQParams) -> Run:
        """``run`` with its integers cut to the fusion's bounds and the output's own range, where that is narrower."""
        ends = output.scale.new_tensor([self.fusion.low, self.fusion.high])
        low, high = (int(q) for q in output.quantize(ends))
        limits = torch.iinfo(output.limits["dtype"])
        if (low, high) == (limits.min, limits.max):
            return run
        return lambda *tensors: run(*tensors).clamp_(low, high)

    def _behind(self, x: Tensor, data: Affine) -> Run:
        operands, data = self._operands(), _as_uint8(data)
        if not self.split:
            whole = self.geometry.bind(operands, x, data, FLOAT, NONE)
            return lambda x, *others: self.finish(whole(x), others)
        one, two = halves(operands.weight)
        first = self.geometry.bind(Operands(one, operands.scale, operands.bias), x, data, FLOAT, NONE)
        second = self.geometry.bind(Operands(two, operands.scale, None), x, data, FLOAT, NONE)
        return lambda x, *others: self.finish(first(x).add_(second(x)), others)

    def finish(self, y: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        if self.bounds_of_sum is None or self.output is None or not runs_here(y):
            return super().finish(y, others)
        (low, high), out, reader = self.bounds_of_sum, self.output, self.others[0]
        assert isinstance(reader, LoopQParams)
        return kernels.add(
            y, None, None, others[0], reader.scale, reader.zero_point, out.scale, out.zero_point,
            low=low, high=high, **out.limits,
        )  # fmt: skip


def _bounds_of_sum(region: AnchorRegion) -> tuple[float, float] | None:
    """Bounds of ``add`` or of ``add`` and a clamp, which one loop does with the quantization; else None."""
    if not region.steps or region.steps[0].name != "add" or region.steps[0].other is None or len(region.steps) > 2:
        return None
    return (-math.inf, math.inf) if len(region.steps) == 1 else real_bounds(region.steps[1])


def _as_uint8(data: Affine) -> Affine:
    return Affine(data.scale, data.zero_point + 128, torch.uint8) if data.dtype == torch.int8 else data


def _shifted(run: Run) -> Run:
    """``run`` for int8 input: q + 128 as uint8 is q with its highest bit flipped."""
    return lambda x, *others: run(x.view(torch.uint8) ^ 128, *others)


def _converted(run: Run, dtype: torch.dtype) -> Run:
    return lambda *tensors: run(*tensors).to(dtype)
