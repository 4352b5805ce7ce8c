"""The integers that a CONVERTED graph holds: what its ``dequantize`` nodes read of weights, tables and biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qfx.attributes import drop_unused, free_path
from qfx.meta import describe, set_value
from qfx.operators import is_constant
from qfx.ops import dequantize
from qfx.rewrite import erase_dead, evaluate, insert_buffer, propagate, replace_all, root_of, stored_bits


@dataclass(frozen=True)
class IntegerConstant:
    """Integers of a ``dequantize`` node: int8 or uint8, one an element, or int32 (a bias).

    ``path``: where the user's model has the tensor. ``scale``, ``zero_point``, ``axis`` and ``group_size`` are as in
    :mod:`qfx.affine`, one group a row said as scales per axis; ``bits`` is the width that the integers need.
    """

    node: fx.Node
    path: str
    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    group_size: int | None
    bits: int

    @property
    def is_bias(self) -> bool:
        return self.integers.dtype == torch.int32

    @property
    def symmetric(self) -> bool:
        return not bool(self.zero_point.any())


def integer_constants(gm: fx.GraphModule) -> Iterator[IntegerConstant]:
    """Every one of the graph, evaluated as it is asked for; the graph may be edited between."""
    for node in list(gm.graph.nodes):
        if node.target is dequantize and is_constant(node.args[0]):
            yield _read(gm, node)


def _read(gm: fx.GraphModule, node: fx.Node) -> IntegerConstant:
    source, scale, zero_point, axis, group_size = node.args[:5]
    assert isinstance(source, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    integers = evaluate(gm, source)
    if axis is not None:
        assert isinstance(axis, int)
        axis = axis % integers.ndim
    path = str(root_of(source).target).removesuffix("_packed")
    qparams = [evaluate(gm, scale), evaluate(gm, zero_point)]
    if axis is not None and isinstance(group_size, int) and integers.ndim == 2 and integers.shape[axis] <= group_size:
        qparams, axis, group_size = [p.flatten() for p in qparams], 1 - axis, None
    assert isinstance(group_size, int | None)
    return IntegerConstant(node, path, integers, qparams[0], qparams[1], axis, group_size, stored_bits(source))


def to_float(gm: fx.GraphModule, found: IntegerConstant) -> None:
    """Put a float buffer of the values that it stands for in place of ``found``."""
    with gm.graph.inserting_before(found.node):
        path = free_path(gm, found.path.removesuffix("_int32"))
        new = insert_buffer(gm, path, evaluate(gm, found.node), like=found.node)
    replace_all(found.node, new)
    erase_dead(gm, found.node)


def store(gm: fx.GraphModule, found: IntegerConstant) -> fx.Node:
    """Let a new ``dequantize`` node stand for that of ``found``, which reads its integers unpacked.

    They are a buffer at ``path``, or next to it where another reader keeps that. The zero point, in their dtype, is a
    buffer of its own.
    """
    old, dtype = found.node, found.node.args[5]
    with gm.graph.inserting_before(old):
        new = gm.graph.create_node("call_function", dequantize, (), {}, name=f"{old.name}_stored")
    new.meta.update(describe(old))
    old.replace_all_uses_with(new)
    erase_dead(gm, old)
    drop_unused(gm)  # so that the path is free
    tensors = {"": found.integers, "_scale": found.scale, "_zero_point": found.zero_point.to(found.integers.dtype)}
    with gm.graph.inserting_before(new):
        constants = [
            insert_buffer(gm, free_path(gm, found.path + what), tensor, like=new) for what, tensor in tensors.items()
        ]
    new.args = (*constants, found.axis, found.group_size, dtype)
    set_value(new, propagate(dequantize, new.args))
    return new
