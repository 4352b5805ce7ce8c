"""x86-64 CPUs by the oneDNN operators of torch, with C++ loops between them.

Weights are symmetric, or narrow enough that their distance from the zero point fits into int8; oneDNN ignores a zero
point of weights. What a layer's kernel cannot do behind its sums runs on float32 output, in the same leaf.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qfx import jit
from qfx.cpu import onednn_has_vnni
from qfx.operators import Op
from qfx.patterns import NoMatch
from qfx.spec import PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.targets.base import AnchorRegion, DynamicQParams, Leaf, LookupRegion, PointRegion, QParams
from qfx.targets.reference import NOT_BY_ROW, Reference
from qfx.targets.x86_lookup import LoopLookupLeaf
from qfx.targets.x86_per_token import PerTokenLeaf
from qfx.targets.x86_point import lower_point
from qfx.targets.x86_static import StaticLeaf
from qfx.targets.x86_weight_only import WeightOnlyLeaf

PRODUCTS = ("matmul", "bmm")
NO_PRODUCT = "x86 has no integer kernel for activation x activation"


@dataclass(frozen=True)
class X86:
    """oneDNN's integer convolutions and linear layers."""

    name: ClassVar[str] = "x86"

    def unavailable(self, device: str = "cpu") -> str | None:
        if device != "cpu":
            return f"x86 computes on the CPU, the model is on {device}"
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            return f"x86 needs Linux on an x86-64 CPU, this is {sys.platform} on {platform.machine()}"
        if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv_pointwise"):
            return "this build of torch has no oneDNN"
        return None

    def slow(self) -> str | None:
        if onednn_has_vnni():
            return None
        halves = "this CPU has no VNNI: layers whose 8-bit sums could saturate are computed in two halves"
        return halves if jit.unavailable() else f"{halves}; target='native' needs no halves, and compiles for seconds"

    def refuses(self, node: fx.Node, op: Op, qconfig: QConfig) -> str | None:
        general = Reference().refuses(node, op, qconfig)
        if general is not None:
            return general
        if op.name in PRODUCTS:
            return NO_PRODUCT
        activation, weight = qconfig.activation, qconfig.weight
        if op.weight is None or weight is None or activation is None:
            return None if op.name == "linear" or op.weight is None else _weight_only_refusal(op, qconfig)
        if activation.dynamic and not (
            isinstance(activation.granularity, PerToken) and activation.scheme is Scheme.SYMMETRIC
        ):
            return "x86 takes dynamic activations per token and symmetric only"
        return _weight_refusal(op, weight)

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        if region.op.weight is None:
            return NoMatch(NO_PRODUCT)
        if region.data is None:
            return WeightOnlyLeaf(region) if region.op.name == "linear" else NoMatch(_no_weight_only(region.op))
        miss = _misfit(region)
        if miss is not None:
            return NoMatch(miss)
        return PerTokenLeaf(region) if isinstance(region.data, DynamicQParams) else StaticLeaf(region)

    def lower_point(self, region: PointRegion) -> Leaf | NoMatch:
        return lower_point(region)

    def lower_lookup(self, region: LookupRegion) -> Leaf | NoMatch:
        return LoopLookupLeaf(region) if region.by_row else NoMatch(NOT_BY_ROW)


def _weight_refusal(op: Op, weight: QuantSpec) -> str | None:
    if isinstance(weight.granularity, PerGroup):
        return "x86 takes weight scales per group with float activations only"
    if not isinstance(weight.granularity, PerTensor) and op.name == "linear" and weight.granularity.layout()[0] != 0:
        return "x86 takes weight scales per tensor or per output channel"
    if weight.scheme is Scheme.AFFINE and weight.bits == 8:
        return "x86 takes 8-bit weights symmetric only: oneDNN ignores their zero point"
    return None


def _weight_only_refusal(op: Op, qconfig: QConfig) -> str | None:
    return _no_weight_only(op) if qconfig.activation is None and qconfig.weight is not None else None


def _no_weight_only(op: Op) -> str:
    return f"x86 has no kernel for {op.name} with float activations"


def _misfit(region: AnchorRegion) -> str | None:
    """Why the region's parameters fit no kernel, or None. ``refuses`` keeps such regions from being annotated."""
    data, weight = region.data, region.weight_qparams
    assert weight is not None
    if weight.group_size is not None or weight.axis not in (None, region.op.channel_axis):
        return "x86 takes weight scales per tensor or per output channel"
    if _distance(region, weight) > 128:
        return "x86 takes weights whose distance from their zero point fits into int8"
    if isinstance(data, DynamicQParams):
        per_token = data.axis == -1 and data.group_size == -1 and data.symmetric
        return None if per_token else "x86 takes dynamic activations per token and symmetric only"
    others = [step.other for step in region.steps if step.other is not None]
    ends = [q for q in (data, region.output, *others) if q is not None]
    if not all(q.per_tensor and q.dtype in (torch.uint8, torch.int8) for q in ends):
        return "x86 takes activations per tensor, as uint8 or int8"
    return None


def _distance(region: AnchorRegion, weight: QParams) -> int:
    """The largest distance of a weight below its zero point, or above it plus one: at most 128 fits into int8."""
    assert region.weight is not None
    shape = [1] * region.weight.ndim
    if weight.axis is not None:
        shape[weight.axis] = -1
    centred = region.weight.to(torch.int16) - weight.zero_point.to(torch.int16).reshape(shape)
    if centred.numel() == 0:
        return 0
    return max(-int(centred.min()), int(centred.max()) + 1)
