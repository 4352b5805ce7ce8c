"""Edits of a graph that passes share: insert constants and calls with their example values, tell constants apart."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from qfx.attributes import get_tensor, set_buffer
from qfx.meta import describe, set_value, value
from qfx.operators import mutates, tensor_inputs
from qfx.ops import unpack_op


def insert_buffer(gm: fx.GraphModule, path: str, tensor: Tensor, *, like: fx.Node) -> fx.Node:
    """Register ``tensor`` as a buffer at ``path`` and insert its ``get_attr`` at the graph's insertion point."""
    set_buffer(gm, path, tensor)
    return insert_get(gm, path, like=like)


def insert_get(gm: fx.GraphModule, path: str, *, like: fx.Node) -> fx.Node:
    """Insert a ``get_attr`` of what is at ``path``; it inherits ``like``'s place in the user's model."""
    node = gm.graph.get_attr(path)
    node.meta.update(describe(like))
    set_value(node, _fake(get_tensor(gm, path), like))
    return node


def insert_call(gm: fx.GraphModule, target: Any, *args: Any, like: fx.Node, name: str | None = None) -> fx.Node:
    """Insert ``target(*args)`` at the graph's insertion point, with its example value computed on fake tensors."""
    node = gm.graph.create_node("call_function", target, args, {}, name=name)
    node.meta.update(describe(like))
    set_value(node, propagate(target, args))
    return node


def propagate(target: Any, args: Any, kwargs: Any = MappingProxyType({})) -> Any:
    """``target(*args, **kwargs)`` on the nodes' example values, or None where one has none.

    These are fake tensors, or, in a graph that was loaded, tensors on the meta device.
    """
    values: list[Any] = []

    def example(n: fx.Node) -> Any:
        values.append(value(n))
        return values[-1]

    examples, named = fx.map_arg(args, example), fx.map_arg(dict(kwargs), example)
    mode = detect_fake_mode(values)
    if any(v is None for v in values) or (mode is None and not _without_data(values)):
        return None
    key = _key(target, args, kwargs) if _repeats(target) and all(map(_is_plain, values)) else ""
    known = _EXAMPLES.get((id(mode), key))
    if known is not None:
        return known
    with mode or nullcontext(), torch.no_grad():
        result = target(*examples, **named)
    if key and isinstance(result, FakeTensor):
        _EXAMPLES[id(mode), key] = result
    return result


_EXAMPLES: WeakValueDictionary[tuple[int, str], Tensor] = WeakValueDictionary()
"""By the id of the mode, which the tensor keeps alive, and what was asked for: example values that nodes hold.

One on fake tensors with free sizes takes milliseconds, and networks repeat their sizes from block to block.
"""


def _repeats(target: Any) -> bool:
    """Whether an operator gives a new tensor, whose type and sizes follow from those of what it reads."""
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "qfx") or target._schema.is_mutable:
        return False
    fresh = all(result.alias_info is None for result in target._schema.returns)
    return fresh and not _BY_DATA.intersection(target.tags)


_BY_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _is_plain(val: Any) -> bool:
    return isinstance(val, FakeTensor) and val.layout is torch.strided and val.constant is None


def _key(target: OpOverload, args: Any, kwargs: Any) -> str:
    return f"{target} {fx.map_arg((args, dict(kwargs)), lambda n: _described(value(n)))}"


def _described(t: Tensor) -> Any:
    return tuple(t.shape), t.stride(), t.dtype, t.device


def _without_data(values: Iterable[Any]) -> bool:
    tensors = [v for v in tree_leaves(values) if isinstance(v, Tensor)]
    return bool(tensors) and all(t.is_meta for t in tensors)


def _fake(tensor: Tensor, like: fx.Node) -> Any:
    candidates = [value(like), *(value(n) for n in tensor_inputs(like))]
    mode = detect_fake_mode([c for c in candidates if c is not None])
    if mode is None:
        return None
    key = (id(mode), str(_described(tensor))) if tensor.layout is torch.strided else None
    known = _EXAMPLES.get(key) if key else None
    if known is not None:
        return known
    made = mode.from_tensor(tensor.detach(), static_shapes=True)
    if key:
        _EXAMPLES[key] = made
    return made


def evaluate(gm: fx.GraphModule, node: fx.Node) -> Any:
    """The value of a constant node (see :func:`qfx.operators.is_constant`), computed without gradients."""
    if node.op == "get_attr":
        return get_tensor(gm, str(node.target)).detach()
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: evaluate(gm, n))
    with torch.no_grad():
        return node.target(*args, **kwargs)


def root_of(constant: fx.Node) -> fx.Node:
    """The ``get_attr`` behind reshapes of a weight and products with it, for its name."""
    while constant.op != "get_attr":
        constant = tensor_inputs(constant)[0]
    return constant


def erase_dead(gm: fx.GraphModule, *nodes: fx.Node) -> None:
    """Erase ``nodes`` where nobody reads them, and what only they read; what writes to a tensor stays."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node._erased or node.users or node.op in ("placeholder", "output") or mutates(node):
            continue
        todo += dict.fromkeys(node.all_input_nodes)
        gm.graph.erase_node(node)


def replace_all(old: fx.Node, new: fx.Node) -> None:
    """Let every reader of ``old`` read ``new`` instead, except ``new`` itself."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def stored_bits(integers: Any) -> int:
    """How many bits each of constant ``integers`` has, behind reshapes: of packed ones, what they were packed in."""
    node = integers
    while isinstance(node, fx.Node) and node.target is not unpack_op and node.op != "get_attr":
        node = tensor_inputs(node)[0]
    return int(node.args[1]) if node.target is unpack_op else 8
