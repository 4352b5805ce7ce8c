"""Operators between layers, on integers: tables of 256 entries, C++ loops, and moves.

Each leaf is the reference's with a faster way for the inputs that it knows; all else runs as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qfx import kernels
from qfx.operators import Kind
from qfx.targets.base import PointRegion, Slot, fill
from qfx.targets.lazy import Lazy, runs_here
from qfx.targets.reference import PointLeaf, QParamsBuffers

Row = Callable[..., Tensor]

ELEMENTWISE = frozenset({"add", "mul"})
"""With one input (and a number, or itself twice) these are functions of one integer too."""


class TableLeaf(Lazy, PointLeaf):
    """A function of one integer as a table: the reference applied to all 256, so exact by construction."""

    def __init__(self, region: PointRegion) -> None:
        super().__init__(region)
        self.kernel = f"table {region.op.name}"

    def forward(self, *integers: Tensor) -> Tensor:
        if not runs_here(integers[0]):
            return super().forward(*integers)
        return (self._run or self.prepared(integers[0]))(*integers)

    def prepare(self, x: Tensor) -> Callable[..., Tensor]:
        limits = torch.iinfo(x.dtype)
        table = super().forward(torch.arange(limits.min, limits.max + 1).to(x.dtype))
        return lambda q: kernels.lookup(q, table)


class LoopLeaf(PointLeaf):
    """An operator that has a C++ loop, or an ATen kernel for integers, behind a row of :data:`LOOPS` or :data:`MOVES`.

    ``operator``: its ATen name; ``named``: its arguments by theirs. ``dims``: the only rank that the row takes, or
    None.
    """

    def __init__(self, region: PointRegion, row: Row, kernel: str) -> None:
        super().__init__(region)
        self.operator, self.named, self.row, self.kernel = region.op.name, named_arguments(region), row, kernel
        self.dims = DIMS.get(region.op.name)

    def forward(self, *integers: Tensor) -> Tensor:
        x = integers[0]
        if not runs_here(x) or self.dims not in (None, x.ndim):
            return super().forward(*integers)
        return self.row(self, *integers)

    def ends(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale and zero point of the first input, then of the output."""
        first = self.inputs[0]
        assert isinstance(first, QParamsBuffers)
        return first.scale, first.zero_point, self.output.scale, self.output.zero_point


DIMS = {f"{kind}{dims}d": dims + 2 for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for dims in (1, 2)}


def named_arguments(region: PointRegion) -> dict[str, Any]:
    """The operator's arguments by name; lists as tuples, slots as they are, defaults left out."""
    names = [argument.name for argument in region.target._schema.arguments]
    given = dict(zip(names, region.args, strict=False)) | region.kwargs
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


# --- rows -------------------------------------------------------------------------------------------------------------


def _add(leaf: LoopLeaf, a: Tensor, b: Tensor) -> Tensor:
    return kernels.add(*_operands(leaf, a, b), **leaf.output.limits)


def _mul(leaf: LoopLeaf, a: Tensor, b: Tensor) -> Tensor:
    return kernels.mul(*_operands(leaf, a, b), **leaf.output.limits)


def _operands(leaf: LoopLeaf, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    p, q, out = leaf.inputs[0], leaf.inputs[1], leaf.output
    assert isinstance(p, QParamsBuffers) and isinstance(q, QParamsBuffers)
    return a, p.scale, p.zero_point, b, q.scale, q.zero_point, out.scale, out.zero_point


def _max_pool(leaf: LoopLeaf, x: Tensor) -> Tensor:
    named = leaf.named
    return kernels.max_pool(
        x,
        named["kernel_size"],
        named.get("stride"),
        named.get("padding", 0),
        named.get("dilation", 1),
        named.get("ceil_mode", False),
    )


def _avg_pool(leaf: LoopLeaf, x: Tensor) -> Tensor:
    named = leaf.named
    return kernels.avg_pool(
        x,
        *leaf.ends(),
        named["kernel_size"],
        named.get("stride"),
        named.get("padding", 0),
        ceil_mode=named.get("ceil_mode", False),
        count_include_pad=named.get("count_include_pad", True),
        divisor_override=named.get("divisor_override"),
        **leaf.output.limits,
    )


def _adaptive_avg_pool(leaf: LoopLeaf, x: Tensor) -> Tensor:
    return kernels.adaptive_avg_pool(x, *leaf.ends(), leaf.named["output_size"], **leaf.output.limits)


def _mean(leaf: LoopLeaf, x: Tensor) -> Tensor:
    dim, keepdim = leaf.named.get("dim"), leaf.named.get("keepdim", False)
    return kernels.mean(x, *leaf.ends(), () if dim is None else dim, keepdim, **leaf.output.limits)


def _pad(leaf: LoopLeaf, x: Tensor) -> Tensor:
    value = leaf.output.quantize(leaf.output.scale.new_tensor(float(leaf.named.get("value") or 0.0)))
    return torch.constant_pad_nd(x, leaf.named["pad"], int(value))


def _upsample(leaf: LoopLeaf, x: Tensor) -> Tensor:
    """On bytes: nearest neighbours move them, whatever they mean, and ATen knows uint8 only."""
    args = fill(leaf.args, (x.view(torch.uint8),))
    kwargs = {name: fill(value, (x.view(torch.uint8),)) for name, value in leaf.kwargs.items()}
    moved: Tensor = leaf.target(*args, **kwargs)
    return moved.view(x.dtype)


LOOPS: dict[str, Row] = {
    "add": _add,
    "mul": _mul,
    "max_pool1d": _max_pool,
    "max_pool2d": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool1d": _adaptive_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "mean": _mean,
}
"""Operators that have a loop in :mod:`qfx.kernels`."""

MOVES: dict[str, Row] = {
    "pad": _pad,
    "constant_pad_nd": _pad,
    "upsample_nearest1d": _upsample,
    "upsample_nearest2d": _upsample,
    "upsample_nearest3d": _upsample,
}
"""Operators that move integers, or put the integer of a constant beside them."""


def _declines(region: PointRegion) -> bool:
    """True where an operator's arguments are such that only the reference gives its meaning."""
    named, name = named_arguments(region), region.op.name
    if name in ("add", "mul"):
        values = list(named.values())[:2]
        return values != [Slot(0), Slot(1)] or named.get("alpha", 1) != 1
    if name == "mean":
        return named.get("dtype") is not None
    if name.startswith("max_pool"):  # a window wholly in the padding gives the smallest integer of the dtype
        return not region.same_scale or region.output.quant_min != torch.iinfo(region.output.dtype).min
    if name in MOVES:
        return not region.same_scale or named.get("mode", "constant") != "constant"
    return False


def lower_point(region: PointRegion) -> PointLeaf:
    """The fastest leaf for the region; the reference's where there is no better."""
    name = region.op.name
    if len(region.inputs) == 1 and (region.op.kind is Kind.UNARY or name in ELEMENTWISE):
        return TableLeaf(region)
    if not _declines(region):
        if name in LOOPS:
            return LoopLeaf(region, LOOPS[name], f"loop {name} ({kernels.backend().partition(':')[0]})")
        if name in MOVES:
            return LoopLeaf(region, MOVES[name], f"aten {name} on integers")
    return PointLeaf(region)
