"""Quantize weights once, at compile time, and store the integers; narrow ones packed.

Before::

    %q = qfx.quantize(@weight, @weight_scale, @weight_zero_point, 0, None, -128, 127, i8)

After (8 bits, and 4 bits)::

    %q = @weight                                     # i8[out, in]
    %q = qfx.unpack(@weight_packed, 4, True, in)     # u8[out, in / 2]

Declines for quantize operators on anything that depends on an input.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qfx.attributes import exists, free_path
from qfx.errors import QfxWarning
from qfx.meta import add_notes
from qfx.operators import is_constant, tensor_inputs
from qfx.ops import pack, quantize, unpack_op
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, root_of
from qfx.stage import Stage


@dataclass(frozen=True)
class FoldWeights:
    """Evaluates every ``quantize`` of a constant; frees each float weight before it touches the next."""

    name: ClassVar[str] = "fold-weights"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CONVERTED, Stage.CONVERTED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        constant = [n for n in gm.graph.nodes if n.target is quantize and is_constant(n.args[0])]
        for node in constant:
            _fold(gm, node)
        products = [n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor and is_constant(n)]
        for node in products:
            _fold_product(gm, node)
        return len(constant) + len(products)


def _fold_product(gm: fx.GraphModule, node: fx.Node) -> None:
    """Multiply out a batch norm's factor where the layer stays float."""
    root = root_of(tensor_inputs(node)[0])
    with gm.graph.inserting_before(node):
        product = evaluate(gm, node)
        new = insert_buffer(gm, free_path(gm, f"{root.target}_folded"), product, like=node)
    node.replace_all_uses_with(new)
    erase_dead(gm, node)


def _fold(gm: fx.GraphModule, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight: Tensor = evaluate(gm, source)
    integers: Tensor = quantize(weight, *fx.map_arg(node.args[1:], lambda n: evaluate(gm, n)))
    root = root_of(source)
    base = str(root.target)
    _warn_zero_filters(gm, weight, integers, node, base)
    del weight  # the float copy goes before its integers are stored
    with gm.graph.inserting_before(node):
        new = _store(gm, base, integers, _bits(node), replacing=_only_reader(gm, node, base), like=node)
    node.replace_all_uses_with(new)
    erase_dead(gm, node)
    if root._erased and not _readers(gm, base) and exists(gm, base) and new.target != base:
        owner, _, name = base.rpartition(".")
        delattr(gm.get_submodule(owner), name)


class ZeroFilterWarning(QfxWarning):
    """Output channels whose weights all became 0: what they compute is lost."""


def _warn_zero_filters(gm: fx.GraphModule, weight: Tensor, integers: Tensor, node: fx.Node, path: str) -> None:
    """Tell of output channels (axis 0) that rounding wiped out."""
    if weight.ndim < 2 or not weight.numel():
        return
    zero_point = evaluate(gm, node.args[2])  # type: ignore[arg-type]  # a node, as in every quantize
    if zero_point.ndim > 1 or (zero_point.ndim == 1 and zero_point.numel() != weight.shape[0]):
        return
    filters, zeros = integers.flatten(1), zero_point.reshape(-1).expand(len(integers))
    begins = (filters[:, 0] == zeros).nonzero().flatten()  # few filters begin with a zero, and only these may be lost
    silent = (filters[begins] == zeros[begins, None]).all(1)
    lost = int((silent & weight.flatten(1)[begins].ne(0).any(1)).sum())
    if lost:
        text = f"{path}: {lost} of {weight.shape[0]} filters became 0"
        add_notes(gm, "warning", [text])
        way_out = "their weights are tiny beside the others. Use scales per channel or more bits."
        warnings.warn(ZeroFilterWarning(f"{text}: {way_out}"), stacklevel=2)


def _readers(gm: fx.GraphModule, path: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == path]


def _only_reader(gm: fx.GraphModule, node: fx.Node, path: str) -> bool:
    """True where ``path`` is read by nothing but the chain that ends in ``node``."""
    readers = _readers(gm, path)
    if len(readers) != 1:
        return False
    current = readers[0]
    while current is not node:
        if len(current.users) != 1:
            return False
        (current,) = current.users
    return True


def _bits(node: fx.Node) -> int:
    quant_min, quant_max = node.args[5], node.args[6]
    assert isinstance(quant_min, int) and isinstance(quant_max, int)
    return max((quant_max - quant_min).bit_length(), 2)


def _store(gm: fx.GraphModule, base: str, integers: Tensor, bits: int, *, replacing: bool, like: fx.Node) -> fx.Node:
    """Store the integers, under the weight's own name where nobody else reads it; returns the node that reads them."""
    if bits == 8:
        return insert_buffer(gm, base if replacing else free_path(gm, base), integers, like=like)
    shape = list(integers.shape)
    rows = integers.reshape(shape[0], -1)
    packed = insert_buffer(gm, free_path(gm, f"{base}_packed"), pack(rows, bits), like=like)
    new = insert_call(gm, unpack_op, packed, bits, integers.dtype == torch.int8, rows.shape[1], like=like)
    return insert_call(gm, torch.ops.aten.view.default, new, shape, like=like) if len(shape) > 2 else new
