"""Float arithmetic, functions and batch norm, element by element, in the order in which the operands lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qfx.meta import value
from qfx.operators import argument, name_of
from qfx.targets.native.copies import dense_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import FUNCTIONS
from qfx.targets.native.floats import float_refusal, natural, result
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import pointer
from qfx.targets.native.views import BATCH, Element, View, numel

SHORT, LONG_ROW = 256, 32
"""Elements. A constant of fewer than ``SHORT`` is stored several times over, so that the loops along its rows are long;
of as many as ``LONG_ROW`` that share one number, this number is stored once."""


@dataclass(frozen=True)
class Order:
    """The dimensions of a result from the outermost in memory, and its sizes in that order."""

    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def natural(self) -> bool:
        return self.dims == tuple(range(len(self.dims)))

    def of(self, view: View) -> View:
        """``view``, of the result's sizes, with its dimensions in this order."""
        return view.permute(self.dims)

    def back(self, view: View) -> View:
        """The reverse."""
        return view.permute(tuple(self.dims.index(i) for i in range(len(self.dims))))


def _order(emitter: Emitter, node: fx.Node, views: list[View]) -> Order:
    """The order of the first view that has all elements of the result of ``node``, side by side."""
    sizes = emitter.size(node)
    if 0 in sizes:
        raise NotNative(f"{node} gives nothing")
    for view in views:
        dims = tuple(sorted(range(len(view.sizes)), key=lambda i: (view.sizes[i] != BATCH, -view.strides[i])))
        if view.sizes == sizes and view.batched and view.permute(dims).contiguous:
            return Order(dims, tuple(sizes[i] for i in dims))
    return Order(tuple(range(len(sizes))), sizes)


def _make(emitter: Emitter, node: fx.Node, order: Order) -> Callable[[Element], View]:
    if order.natural:
        return natural(emitter, node)
    return lambda element: order.back(emitter.program.tensor(element, order.sizes))


# --- two operands -----------------------------------------------------------------------------------------------------

_BINARY = {"add": "Add", "sub": "Subtract", "mul": "Multiply", "div": "Divide"}


def _binary_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    operands = node.args[:2]
    if any(isinstance(n, fx.Node) and not isinstance(value(n), Tensor) for n in operands):
        return "native arithmetic is of tensors and plain numbers"
    if argument(node, 2, "alpha", 1) != 1 or argument(node, 2, "rounding_mode") is not None:
        return "native arithmetic neither scales an operand nor rounds a quotient"
    return float_refusal(gm, node)


def _binary(emitter: Emitter, node: fx.Node) -> None:
    if node in emitter.values:  # a layer has added it already
        return
    known = [emitter.values[n] if isinstance(n, fx.Node) else torch.tensor(n) for n in node.args[:2]]
    order = _order(emitter, node, [x for x in known if isinstance(x, View)])
    operands, reads, cols = [], [], numel(order.sizes)
    for x in known:
        if isinstance(x, Tensor):
            repeated = _repeated(x.float(), order, node)
            operands.append(repeated.operand(emitter))
            cols = min(cols, repeated.cols)
            continue
        view = dense_of(emitter, order.of(_expanded(x, emitter.size(node), node)), str(node))
        reads.append(view)
        operands.append(f"f32::Operand{{{pointer(view.buffer, view.offset)}, rows}}")
    out, made = result(emitter, node, _make(emitter, node, order))
    emitter.program.headers.add("elementwise.h")
    code = (
        f"const int64_t rows = n * {numel(order.sizes) // cols};\n"
        f"f32::binary(team, f32::{_BINARY[name_of(node)]}{{}}, {', '.join(operands)}, {out}, rows, {cols});"
    )
    emitter.step(code, reads, made, node, name_of(node))


def _expanded(view: View, sizes: tuple[int, ...], node: fx.Node) -> View:
    """``view`` repeated to ``sizes``, without a copy."""
    if view.element != "float":
        raise NotNative(f"{node} reads {view.element}")
    if not view.batched or len(view.sizes) != len(sizes):
        raise NotNative(f"{node} repeats a value along the batch")
    return view.expand(sizes)


@dataclass(frozen=True)
class Repeated:
    """A constant operand as it is stored, and the length of the result's rows that it is read by: as one row, which all
    repeat; or, with ``by_row``, as one number for each, over and over."""

    values: Tensor
    cols: int
    by_row: bool

    def operand(self, emitter: Emitter) -> str:
        """A C++ ``Operand``."""
        data = emitter.program.constant(self.values)
        return f"f32::Operand{{{data}, 1, {self.values.numel() if self.by_row else 0}}}"


def _repeated(constant: Tensor, order: Order, node: fx.Node) -> Repeated:
    """How a constant operand is repeated to the result's sizes, in the order of memory."""
    whole = constant.reshape([1] * (len(order.dims) - constant.ndim) + list(constant.shape)).permute(order.dims)
    varying = [i for i, size in enumerate(whole.shape) if size != 1] or [len(order.sizes)]
    first, behind = varying[0], varying[-1] + 1
    if BATCH in order.sizes[first:]:
        raise NotNative(f"{node} reads a constant that differs from sample to sample")
    if behind < len(order.sizes) and numel(order.sizes[behind:]) >= LONG_ROW:
        lines = order.sizes[:behind]
        begin = lines.index(BATCH) + 1 if BATCH in lines else 0
        values = whole.reshape(whole.shape[begin:behind]).expand(lines[begin:]).contiguous()
        return Repeated(values, numel(order.sizes[behind:]), by_row=True)
    while first and order.sizes[first - 1] != BATCH and numel(order.sizes[first:]) < SHORT:
        first -= 1
    values = whole.reshape(whole.shape[first:]).expand(order.sizes[first:]).contiguous()
    return Repeated(values, values.numel(), by_row=False)


# --- one operand ------------------------------------------------------------------------------------------------------


def _activation(emitter: Emitter, node: fx.Node) -> None:
    x = emitter.view(node.args[0])
    if x.element != "float":
        raise NotNative(f"{node} reads {x.element}")
    order = _order(emitter, node, [x])
    given = dense_of(emitter, order.of(x), str(node))
    function = _ACTIVATIONS[name_of(node)](*node.args[1:], **node.kwargs)
    out, made = result(emitter, node, _make(emitter, node, order))
    emitter.program.headers.add("activations.h")
    data = pointer(given.buffer, given.offset)
    call = f"f32::activate(team, f32::{function}, {data}, {out}, n * {numel(order.sizes)});"
    emitter.step(call, [given], made, node, name_of(node))


def _function_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if name_of(node) == "pow" and node.args[1] not in _POWERS:
        return "native powers are squares and cubes"
    return float_refusal(gm, node)


_POWERS = {2: "Square{}", 3: "Cube{}"}

_ACTIVATIONS: dict[str, Callable[..., str]] = {
    **FUNCTIONS,
    "relu": lambda: "Relu{}",
    "pow": lambda exponent: _POWERS[exponent],
    "sqrt": lambda: "Sqrt{}",
    "rsqrt": lambda: "Rsqrt{}",
    "neg": lambda: "Negate{}",
    "abs": lambda: "Absolute{}",
}


# --- batch norm -------------------------------------------------------------------------------------------------------


def _batch_norm_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if argument(node, 5, "training") or any(argument(node, i, name) is None for i, name in _STATISTICS.items()):
        return "native batch norms have statistics and do not train"
    return float_refusal(gm, node)


_STATISTICS = {3: "running_mean", 4: "running_var"}


def _batch_norm(emitter: Emitter, node: fx.Node) -> None:
    """One factor and one term for each channel, as ATen computes it too."""
    x = emitter.view(node.args[0])
    mean, variance = (emitter.parameter(argument(node, i, name)) for i, name in _STATISTICS.items())
    weight, bias = (argument(node, i, name) for i, name in ((1, "weight"), (2, "bias")))
    scale = torch.rsqrt(variance + argument(node, 7, "eps"))
    scale = scale if weight is None else scale * emitter.parameter(weight)
    shift = -mean * scale if bias is None else emitter.parameter(bias) - mean * scale
    sizes = emitter.size(node)
    order = _order(emitter, node, [x])
    given = dense_of(emitter, order.of(_expanded(x, sizes, node)), str(node))
    channels = emitter.axis(node, 1)
    by_channel = [-1 if i == channels else 1 for i in range(len(sizes))]
    rows = [_repeated(values.float().reshape(by_channel), order, node) for values in (scale, shift)]
    out, made = result(emitter, node, _make(emitter, node, order))
    emitter.program.headers.add("elementwise.h")
    operands, cols = ", ".join(row.operand(emitter) for row in rows), rows[0].cols
    data = pointer(given.buffer, given.offset)
    call = f"f32::scale_and_shift(team, {data}, {operands}, {out}, n * {numel(order.sizes) // cols}, {cols});"
    emitter.step(call, [given], made, node, "batch_norm")


_ARITHMETIC = Operator(_binary_refusal, _binary, by_row=True)
_FUNCTION = Operator(_function_refusal, _activation, by_row=True)

ELEMENTWISE: dict[str, Operator] = {
    **dict.fromkeys(_BINARY, _ARITHMETIC),
    **dict.fromkeys(_ACTIVATIONS, _FUNCTION),
    "batch_norm": Operator(_batch_norm_refusal, _batch_norm, by_row=True),
}
"""By their ATen names."""
