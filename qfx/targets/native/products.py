"""Products of two activations on integers, as attention has them where its steps are written out."""

from __future__ import annotations

import math

from torch import fx

from qfx.meta import value
from qfx.targets.native.copies import dense_of, samples_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import epilogue_of, refusal
from qfx.targets.native.layer import steps_of
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS, pointer
from qfx.targets.native.views import View
from qfx.targets.reference import MatmulLeaf, QParamsBuffers

LONGEST = 1 << 14
"""Terms of a sum: with more, the parts that zero points add could leave int32."""

PANEL_BYTES = 32 * 1024


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    assert isinstance(leaf, MatmulLeaf)
    left, right = (value(n) for n in node.args[:2])  # type: ignore[arg-type]
    if left.ndim < 3 or left.shape[:-2] != right.shape[:-2]:
        return "native products are of [batch, ..., rows, columns], without repetition"
    if any(value(n).shape != value(node).shape for n in node.args[2:]):  # type: ignore[arg-type]
        return "natively, what is added to a product is of its shape"
    if value(node).dtype not in ELEMENTS:
        return f"no native kernel gives {value(node).dtype}"
    if isinstance(left.shape[-1], int) and left.shape[-1] > LONGEST:
        return "it sums more than int32 holds"
    return refusal(steps_of(leaf))


def _emit(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    left, right = (emitter.view(n) for n in node.args[:2])
    outer = emitter.size(node)[1:-2]
    if not left.batched or left.strides[-1] != 1:
        left = dense_of(emitter, left, str(node))
    if not right.batched:
        right = dense_of(emitter, right, str(node))
    left, right = (samples_of(emitter, view, 2 + bool(outer), str(node)) for view in (left, right))
    out = emitter.tensor(node, ELEMENTS[leaf.dtype if leaf.output is None else leaf.output.limits["dtype"]])
    other = dense_of(emitter, emitter.view(node.args[2]), str(node)) if len(node.args) > 2 else None
    *_, rows, length = left.sizes
    if length > LONGEST:
        raise NotNative(f"{node} sums more than int32 holds")
    columns, heads, samples = right.sizes[-1], outer[-1] if outer else 1, math.prod(outer[:-1])
    unit, tile = emitter.isa.unit, emitter.isa.channels
    depth = -(-length // unit) * unit
    block = max(1, min(rows, PANEL_BYTES // (2 * depth + 256)))
    factors = ", ".join((_factor(left, leaf.left, unsigned=True), _factor(right, leaf.right, unsigned=False)))
    sizes = f"{heads}, {rows}, {columns}, {length}, {depth}, {block}"
    product = emitter.program.declare("Matmul", "product", f"{{{factors}, {sizes}}}")
    scale = (leaf.left.scale * leaf.right.scale).float().expand(-(-columns // tile) * tile)
    constants = ("nullptr", emitter.program.constant(scale), "nullptr")
    epilogue = epilogue_of(emitter.program, leaf, steps_of(leaf), out, other, constants)
    emitter.program.headers.add("matmul.h")
    data = ", ".join(pointer(view.buffer, view.offset) for view in (left, right))
    code = f"{epilogue.code}\nmatmul<Dot>(team, {product}, n * {samples}, {data}, epilogue, scratch);"
    macs = samples * heads * rows * columns * length
    kernel = "+".join([f"{emitter.isa.name} matmul", *(step.name for step in steps_of(leaf))])
    reads = [left, right] if other is None else [left, right, other]
    emitter.step(code, reads, [out], node, kernel, scratch=f"MatmulScratch<Dot>({product}).size", macs=macs)


def _factor(view: View, qparams: QParamsBuffers, *, unsigned: bool) -> str:
    """A C++ ``Factor``: bytes are read as uint8, or as int8."""
    sample, *middle, row, column = view.strides
    head = middle[0] if middle else 0
    flip = 0 if (view.element == "uint8_t") == unsigned else 128
    zero_point = int(qparams.zero_point) + (flip if unsigned else -flip)
    return f"{{{sample}, {head}, {row}, {column}, {flip}, {zero_point}}}"


PRODUCT = Operator(_refusal, _emit, by_row=True)
