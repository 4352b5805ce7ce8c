"""A graph from a file is run without data: every node gets its example value, or the graph is refused.

Tensors are on torch's meta device: they have sizes, strides and dtypes, and no memory. That is what torch's fake
tensors are made of, which would take several times as long for each operator. Operators check their own arguments on
the way; this module checks what they do not: that sizes are sane, that numbers stay numbers, and what quantization
needs (:mod:`qfx.ops` has loops in C++ behind some of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from qfx import affine
from qfx.attributes import get_tensor
from qfx.calling import codegen_of
from qfx.errors import ArtifactError
from qfx.graph_module import CapturedModule
from qfx.json_values import LARGEST
from qfx.meta import info, set_value, value
from qfx.operators import is_constant, name_of, tensor_inputs
from qfx.ops import choose_qparams, dequantize, quantize, unpack_op
from qfx.plain_results import plain_result
from qfx.rewrite import evaluate

MOST_ELEMENTS = 2**40
"""Of a tensor at the example's sizes."""

MOST_PARTS = 2**12
"""Results of one operator, and steps of a recurrent one: each is made one by one."""

MOST_STEPS = 400
"""Operators that a constant may be computed by, counted once for each time that they are run."""

GROWTH = 64
"""How much larger than all stored tensors a tensor may be that is computed from those alone."""

_INTEGERS = (torch.uint8, torch.int8, torch.int32)


def dry_run(gm: CapturedModule) -> int:
    """Give every node its example value; returns how many results the graph has.

    Raises:
        ArtifactError: an operator refuses its arguments, or a size or a parameter of quantization cannot be meant.
    """
    stored = sum(t.numel() * t.element_size() for t in (*gm.parameters(), *gm.buffers()))
    costs: dict[fx.Node, int] = {}
    inputs = iter(_inputs(gm))
    count = 0
    for node in gm.graph.nodes:
        try:
            if node.op == "placeholder":
                set_value(node, next(inputs, None))
            elif node.op == "get_attr":
                set_value(node, _without_data(get_tensor(gm, str(node.target))))
                costs |= {node: 0} if is_constant(node) else {}
            elif node.op == "output":
                count = _count_results(node)
            else:
                set_value(node, _run(node))
                _check_constant(node, costs, max(GROWTH * stored, 2**20))
                if (check := _CHECKS.get(node.target)) is not None:
                    check(gm, node)
        except ArtifactError as error:
            raise ArtifactError(f"node {node.name}: {error.what}", where=info(node).origin, hint=error.hint) from None
        _check_value(node)
    return count


def _inputs(gm: CapturedModule) -> list[Tensor]:
    """The example's tensors without their data."""
    binder = codegen_of(gm).binder
    sizes = [[binder.examples[s] if isinstance(s, str) else s for s in spec.sizes] for spec in binder.tensors]
    if any(math.prod(shape) > MOST_ELEMENTS or max(shape, default=0) > MOST_ELEMENTS for shape in sizes):
        raise ArtifactError("the example's sizes are absurd")
    placeholders = sum(n.op == "placeholder" for n in gm.graph.nodes)
    if placeholders != len(sizes):
        raise ArtifactError(f"the graph has {placeholders} inputs, the call {len(sizes)} tensors")
    return [
        torch.empty(shape, dtype=spec.dtype, device="meta")
        for shape, spec in zip(sizes, binder.tensors, strict=True)
    ]


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _count_results(node: fx.Node) -> int:
    (results,) = node.args
    assert isinstance(results, tuple | list)
    if not all(isinstance(r, fx.Node) and isinstance(value(r), Tensor | int | float) for r in results):
        raise ArtifactError("a result is neither a tensor nor a number")
    return len(results)


# --- one operator -----------------------------------------------------------------------------------------------------


def _run(node: fx.Node) -> Any:
    if isinstance(node.target, OpOverload):
        return _run_operator(node, node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    leaves = tree_leaves((args, kwargs))
    if name_of(node) == "getitem":
        container, index = args[0], args[1]
        if not isinstance(container, tuple | list) or type(index) is not int:
            raise ArtifactError("it takes an item of what is no list")
    elif not all(type(leaf) in (int, float, bool) for leaf in leaves):
        raise ArtifactError("it computes with what is no number")
    return _called(node, args, kwargs)


def _run_operator(node: fx.Node, target: OpOverload) -> Any:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    by_place = [a for a in target._schema.arguments if not a.kwarg_only]
    needed = sum(not a.has_default_value() for a in by_place)
    if len(args) < needed:
        raise ArtifactError(f"{target} takes {needed} arguments by place")
    for i, a in enumerate(target._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(a.name)
        if (i < len(args) or a.name in kwargs) and not _fits(given, a.real_type):
            raise ArtifactError(f"argument {a.name} of {target} is a {type(given).__name__}, not {a.real_type}")
    _check_count(name_of(node), (*args, *(kwargs.get(a.name, a.default_value) for a in by_place[len(args) :])))
    args, kwargs = map_aggregate((args, kwargs), lambda a: torch.device("meta") if isinstance(a, torch.device) else a)
    makes = any(a.name == "device" and a.kwarg_only for a in target._schema.arguments)
    return _called(node, args, {**kwargs, "device": torch.device("meta")} if makes else kwargs)


_NUMBERS = (int, float)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "TensorType": (Tensor, bool, *_NUMBERS, complex),  # operators take numbers for tensors without dimensions
    **dict.fromkeys(("IntType", "SymIntType"), (int,)),
    "FloatType": _NUMBERS,
    "NumberType": (bool, *_NUMBERS, complex),
    "BoolType": (bool,),
    "StringType": (str,),
    "DeviceObjType": (torch.device,),
    "ScalarTypeType": (torch.dtype,),
    "LayoutType": (torch.layout,),
    "MemoryFormatType": (torch.memory_format,),
}


def _fits(given: Any, wanted: Any) -> bool:
    """Whether an argument is of the schema's type; the dispatcher would take a dtype for an integer."""
    kind = wanted.kind()
    if kind == "OptionalType":
        return given is None or _fits(given, wanted.getElementType())
    if kind == "ListType" and isinstance(given, list | tuple):
        return all(_fits(item, wanted.getElementType()) for item in given)
    if kind == "ListType":  # one number for all
        return not isinstance(given, Tensor) and _fits(given, wanted.getElementType())
    types = _TYPES.get(kind, ())
    return isinstance(given, types) and (type(given) is not bool or bool in types)


def _called(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the operator gives. Where it refuses the strides that others gave here, unlike on a real device: of copies.

    Attention lays out its result as its kernels like it, and on the meta device there are none.
    """
    assert callable(node.target)
    if (plain := plain_result(node.target, args, kwargs)) is not None:
        return plain
    with torch.no_grad():
        try:
            return node.target(*args, **kwargs)
        except Exception as error:  # whatever operators raise: no two check their arguments in one way
            why = error
        try:
            return node.target(*map_aggregate(args, _contiguous), **kwargs)
        except Exception:
            first = next(iter(str(why).strip().splitlines()), type(why).__name__)
            hint = "a model with results whose size depends on the data cannot be saved" if "data" in first else ""
            raise ArtifactError(f"{node.target} refuses its arguments: {first[:300]}", hint=hint) from why


def _contiguous(arg: Any) -> Any:
    return arg.contiguous() if isinstance(arg, Tensor) else arg


def _check_count(name: str, args: tuple[Any, ...]) -> None:
    """Raise where an operator would make more results, or take more steps, than are sane."""
    count = _COUNTS[name](args) if name in _COUNTS else 0
    if count > MOST_PARTS:
        raise ArtifactError(f"{name} would make {count} parts")


def _size_at(args: Any, position: int, otherwise: int = 0) -> int:
    dim = args[position] if len(args) > position else otherwise
    shape = args[0].shape if isinstance(args[0], Tensor) else ()
    return shape[dim] if type(dim) is int and -len(shape) <= dim < len(shape) else 0


def _pieces(args: Any) -> int:
    size = args[1] if len(args) > 1 else None
    return _size_at(args, 2) // size if type(size) is int and size > 0 else 0


def _number(args: Any) -> int:
    return args[1] if len(args) > 1 and type(args[1]) is int else 0


def _steps(args: Any) -> int:
    return max(args[0].shape, default=0) if isinstance(args[0], Tensor) else 0


_COUNTS: Mapping[str, Callable[[Any], int]] = {
    "unbind": lambda args: _size_at(args, 1),
    **dict.fromkeys(("split", "unsafe_split"), _pieces),
    **dict.fromkeys(("chunk", "unsafe_chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "diff"), _number),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _steps),
}


# --- values -----------------------------------------------------------------------------------------------------------


def _check_value(node: fx.Node) -> None:
    for leaf in tree_leaves(value(node)):
        if isinstance(leaf, Tensor):
            if leaf.numel() > MOST_ELEMENTS:
                shape = list(leaf.shape)
                raise ArtifactError(f"node {node.name} has the absurd shape {shape}", where=info(node).origin)
        elif isinstance(leaf, int) and not -LARGEST <= leaf < LARGEST:
            raise ArtifactError(f"node {node.name} is a number beyond 64 bits", where=info(node).origin)


def _check_constant(node: fx.Node, costs: dict[fx.Node, int], most_bytes: int) -> None:
    """Raise where a constant, which lowering computes, takes too much time or memory.

    ``costs``: of every constant, how many operators run when it is asked for: one that is read twice runs twice.
    """
    inputs = tensor_inputs(node)
    if not all(n in costs for n in inputs) or not is_constant(node):
        return
    costs[node] = 1 + sum(costs[n] for n in inputs)
    size = sum(t.numel() * t.element_size() for t in tree_leaves(value(node)) if isinstance(t, Tensor))
    if size > most_bytes:
        raise ArtifactError(f"it is a constant of {size} bytes, far more than the file holds")
    if costs[node] > MOST_STEPS:
        raise ArtifactError("it is a constant that takes too many operators to compute")


# --- quantization -----------------------------------------------------------------------------------------------------


def _check_quantize(gm: CapturedModule, node: fx.Node) -> None:
    x, _, _, axis, group_size, low, high, dtype = node.args[:8]
    _check_layout(value(x), axis, group_size)  # type: ignore[arg-type]
    if dtype not in _INTEGERS:
        raise ArtifactError(f"it quantizes to {dtype}")
    limits = torch.iinfo(dtype)  # type: ignore[arg-type]
    if not limits.min <= low < high <= limits.max:  # type: ignore[operator]
        raise ArtifactError(f"the range {low} to {high} is none of {dtype}")
    if not value(x).dtype.is_floating_point:  # type: ignore[arg-type]
        raise ArtifactError("it quantizes what is no float")
    _check_parameters(gm, node, low, high)  # type: ignore[arg-type]


def _check_dequantize(gm: CapturedModule, node: fx.Node) -> None:
    q, _, _, axis, group_size, dtype = node.args[:6]
    _check_layout(value(q), axis, group_size)  # type: ignore[arg-type]
    if value(q).dtype not in _INTEGERS or not dtype.is_floating_point:  # type: ignore[arg-type, union-attr]
        raise ArtifactError(f"it dequantizes {value(q).dtype} to {dtype}")  # type: ignore[arg-type]
    limits = torch.iinfo(value(q).dtype)  # type: ignore[arg-type]
    _check_parameters(gm, node, limits.min, limits.max)


def _check_choose(gm: CapturedModule, node: fx.Node) -> None:
    x, axis, group_size, _, low, high = node.args[:6]
    _check_layout(value(x), axis, group_size)  # type: ignore[arg-type]
    if not -128 <= low < high <= 255:  # type: ignore[operator]
        raise ArtifactError(f"the range {low} to {high} is none of 8 bits")


def _check_unpack(gm: CapturedModule, node: fx.Node) -> None:
    packed, bits, _, length = node.args[:4]
    if bits not in range(2, 8) or value(packed).dtype is not torch.uint8 or value(packed).ndim == 0:  # type: ignore[arg-type]
        raise ArtifactError(f"it unpacks {value(packed).dtype} of {bits} bits")  # type: ignore[arg-type]
    needed = -(-length * bits // 8)  # type: ignore[operator]
    if length < 0 or value(packed).shape[-1] != needed:  # type: ignore[operator, arg-type]
        raise ArtifactError(f"{length} integers of {bits} bits do not fill rows of {value(packed).shape[-1]} bytes")  # type: ignore[arg-type]


def _check_layout(x: Tensor, axis: int | None, group_size: int | None) -> None:
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ArtifactError(f"axis {axis} is none of a tensor of {x.ndim} dimensions")
    if group_size is not None and (axis is None or (group_size < 1 and group_size != -1)):
        raise ArtifactError(f"its groups have {group_size} elements along axis {axis}")


def _check_parameters(gm: CapturedModule, node: fx.Node, low: int, high: int) -> None:
    """Scale and zero point fit the tensor; constant ones have values that can be meant, others are chosen from data."""
    x, scale, zero_point, axis, group_size = node.args[:5]
    shapes = (torch.Size(affine.scale_shape(value(x), axis, group_size)), torch.Size([]))  # type: ignore[arg-type]
    for what, p, dtype in (("scale", scale, torch.float32), ("zero point", zero_point, torch.int32)):
        if not isinstance(p, fx.Node) or value(p).dtype is not dtype or value(p).shape not in shapes:
            found = f"{value(p).dtype}{list(value(p).shape)}" if isinstance(p, fx.Node) else str(p)
            raise ArtifactError(f"its {what} is {found}, not {dtype}{list(shapes[0])}")
        if not is_constant(p) and not (name_of(p) == "getitem" and p.args[0].target is choose_qparams):  # type: ignore[union-attr]
            raise ArtifactError(f"its {what} is neither constant nor chosen from the data")
    if is_constant(scale):  # type: ignore[arg-type]
        values = evaluate(gm, scale)  # type: ignore[arg-type]
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ArtifactError("its scale is not positive and finite")
    if is_constant(zero_point):  # type: ignore[arg-type]
        values = evaluate(gm, zero_point)  # type: ignore[arg-type]
        if not bool(((values >= low) & (values <= high)).all()):
            raise ArtifactError(f"its zero point is none of {low} to {high}")


_CHECKS: dict[Any, Callable[[CapturedModule, fx.Node], None]] = {
    quantize: _check_quantize,
    dequantize: _check_dequantize,
    choose_qparams: _check_choose,
    unpack_op: _check_unpack,
}
