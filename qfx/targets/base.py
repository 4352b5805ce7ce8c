"""What a target is, and the regions of a CONVERTED graph that it lowers to kernels.

The pass ``lower`` finds the regions and edits the graph; a target only says what it accepts and makes one leaf module
of each region. A leaf holds plain integer buffers, so that it copies, pickles and loads like any module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from qfx.operators import Kind, Op
from qfx.patterns import NoMatch
from qfx.spec import QConfig


@dataclass(frozen=True)
class QParams:
    """How integers stand for reals: ``x = (q - zero_point) * scale``, with shapes as in :mod:`qfx.affine`.

    ``quant_min`` and ``quant_max`` bound the integers, ``dtype`` holds them.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None
    group_size: int | None
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @property
    def per_tensor(self) -> bool:
        return self.axis is None


@dataclass(frozen=True)
class DynamicQParams:
    """Parameters that are chosen from the data at run time, as ``torch.ops.qfx.choose_qparams`` does."""

    axis: int | None
    group_size: int | None
    symmetric: bool
    quant_min: int
    quant_max: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One operator behind the compute op: ATen name, overload, arguments without the tensor that flows through.

    It is called as ``target(y, *args, **dict(kwargs))``; ``kwargs`` are those that ATen takes by name only (gelu's).
    ``other``: for ``add``, how the second operand comes: QParams (integers), or None (float). It is the leaf's next
    positional input.
    """

    name: str
    target: Any
    args: tuple[Any, ...] = ()
    other: QParams | None = None
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class AnchorRegion:
    """A convolution, linear layer or matrix product with all that runs in its kernel.

    The leaf is called with ``(data, *others)``: ``data`` holds integers where ``data`` is QParams, else float (dynamic
    or weight-only); ``others`` are the second operands of the ``add`` steps. It gives integers where ``output`` is
    QParams, else ``dtype``.

    ``args``: the ATen arguments behind the bias (stride, padding, dilation, groups, ... as the op orders them).
    ``weight``: integers of the op's own weight shape, int8 or uint8; ``stored``: as the graph stores them, packed where
    they are narrow, if they are to be shared. ``bias_scale`` None: ``bias`` is float.
    """

    op: Op
    target: Any
    data: QParams | DynamicQParams | None
    weight: Tensor | None
    weight_qparams: QParams | None
    weight_bits: int
    bias: Tensor | None
    bias_scale: Tensor | None
    args: tuple[Any, ...]
    steps: tuple[Step, ...]
    output: QParams | None
    dtype: torch.dtype
    second: QParams | None = None  # a matrix product's second operand
    stored: Tensor | None = None


@dataclass(frozen=True)
class PointRegion:
    """An operator on integers without weights: ``quantize(op(dequantize(a), ...))``.

    The leaf is called with the integer tensors in order. ``args`` and ``kwargs`` hold the ATen arguments with
    ``Slot(i)`` where tensor i goes.
    """

    op: Op
    target: Any
    inputs: tuple[QParams, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: QParams

    @property
    def same_scale(self) -> bool:
        """True where inputs and output have one scale and zero point."""
        return all(
            torch.equal(q.scale, self.output.scale) and torch.equal(q.zero_point, self.output.zero_point)
            for q in self.inputs
        )


@dataclass(frozen=True)
class LookupRegion:
    """An embedding whose table is dequantized: ``op(dequantize(table), indices)``.

    The leaf is called with ``(indices,)``, int32 or int64 of any shape; it gives ``[*indices.shape, length]`` of
    ``dtype``.

    ``table``: the integers as the graph stores them, ``[rows, length]``, those of fewer than 8 bits packed
    (:func:`qfx.ops.pack`). Another layer's region may hold the same tensor. ``signed``: they are int8, else uint8.
    """

    op: Op
    table: Tensor
    bits: int
    signed: bool
    length: int
    qparams: QParams
    dtype: torch.dtype

    @property
    def by_row(self) -> bool:
        """True where every row has its own scales, or all have one: rows can be dequantized by themselves."""
        axis, group_size = self.qparams.axis, self.qparams.group_size
        return axis is None or (axis in (0, -2) and group_size is None) or (axis in (1, -1) and group_size is not None)


@dataclass(frozen=True)
class Slot:
    """A place in a PointRegion's arguments: input ``index``."""

    index: int


REQUANTIZE = Op("requantize", Kind.UNARY)
"""The row of a requantization, which is no operator of ATen's: there is nothing between its two roundings."""


def requantization(given: QParams, output: QParams) -> PointRegion:
    """The region ``quantize(dequantize(q))`` from one scale, width or type of integers to another: the identity."""
    return PointRegion(REQUANTIZE, torch.ops.aten.alias.default, (given,), (Slot(0),), {}, output)


class Operator:
    """An ATen operator that a leaf calls, and that pickles: torch's own objects do not."""

    def __init__(self, overload: Any) -> None:
        self.overload = overload

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.overload(*args, **kwargs)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _operator, (self.overload._schema.name, self.overload._overloadname)


def _operator(name: str, overload: str) -> Operator:
    namespace, _, packet = name.partition("::")
    return Operator(getattr(getattr(getattr(torch.ops, namespace), packet), overload))


class Leaf(nn.Module):
    """Base of lowered layers.

    ``kernel`` names what runs, for the table. ``weight_only`` leaves pass gradients. ``storage_only``: integers are
    kept and not computed with, the operator is a float one. ``channels_last``: the leaf reads 4-dimensional data
    fastest in that memory format. ``overwrites``: it may write its result over its last input;
    the pass ``reuse-memory`` sets it where nobody reads that input afterwards.
    """

    kernel: str = ""
    weight_only: bool = False
    storage_only: bool = False
    channels_last: bool = False
    overwrites: bool = False

    def extra_repr(self) -> str:
        return self.kernel

    def example(self, *inputs: Tensor) -> Tensor:
        """A tensor of the result's sizes and dtype, whose values do not count; cheap on tensors without data."""
        y: Tensor = self(*inputs)
        return y


@runtime_checkable
class Target(Protocol):
    """A machine that integer regions are lowered for."""

    name: ClassVar[str]

    def unavailable(self, device: str = "cpu") -> str | None:
        """Why the target cannot run here for a model on ``device`` (``cpu``, ``cuda``, ...), or None where it can."""
        ...

    def slow(self) -> str | None:
        """Why integers are likely to lose to float here, or None."""
        ...

    def refuses(self, node: fx.Node, op: Op, qconfig: QConfig) -> str | None:
        """Why the target has no kernel for the node with these specs, or None where it has."""
        ...

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch: ...

    def lower_point(self, region: PointRegion) -> Leaf | NoMatch: ...

    def lower_lookup(self, region: LookupRegion) -> Leaf | NoMatch: ...


def fill(template: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Arguments with their slots replaced by ``tensors``."""
    if isinstance(template, Slot):
        return tensors[template.index]
    if isinstance(template, list | tuple):
        return type(template)(fill(t, tensors) for t in template)
    return template
