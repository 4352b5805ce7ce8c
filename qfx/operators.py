"""The table of operators: what qfx knows of each ATen op, and what it quantizes.

One row an op, by its ATen name without the overload. ``kind`` decides how the op takes part:

* ANCHOR: multiply-accumulates; quantizes its inputs wherever they come from, emits integers or float.
* BINARY, OWN: integer in, integer out with a scale of its own; quantized where all inputs come from integer kernels.
* UNARY: one integer in, one out: a table of 256 entries at most.
* SHARE: moves or selects elements (or takes their maximum): the output has its input's scale.
* FLOAT: stays float by rule, with the reason. Its ``table``, where it has one, may be stored in integers all the same.

What has no row is unknown, and stays float with that as its reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from qfx.meta import value


class Kind(Enum):
    ANCHOR = "anchor"
    BINARY = "binary"
    OWN = "own"
    UNARY = "unary"
    SHARE = "share"
    FLOAT = "float"


@dataclass(frozen=True)
class Op:
    """One row. ``channel_axis``: the weight's axis of output channels; ``weight``, ``bias``, ``table``: arguments."""

    name: str
    kind: Kind
    weight: int | None = None
    bias: int | None = None
    channel_axis: int = 0
    table: int | None = None
    reason: str = ""


def _rows(kind: Kind, names: str, **columns: Any) -> Iterable[Op]:
    return (Op(name, kind, **columns) for name in names.split())


_STATISTICS = "its statistics need more than 8 bits"
_LOOKUP = "embeddings stay float: a lookup multiplies nothing"
_FLOAT = {
    "layer_norm native_layer_norm": f"LayerNorm stays float: {_STATISTICS}",
    "rms_norm": f"RMSNorm stays float: {_STATISTICS}",
    "group_norm native_group_norm instance_norm": f"GroupNorm stays float: {_STATISTICS}",
    "batch_norm _native_batch_norm_legit_no_training": "batch norm that no neighbour can absorb stays float",
    "softmax _softmax log_softmax": "Softmax stays float: its exponentials span too many magnitudes",
    "scaled_dot_product_attention": "attention stays float: it contains a Softmax",
    "embedding_bag": _LOOKUP,
    "cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div": "losses stay float",
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell": "recurrent layers stay float: errors add up over time",
    "rsqrt sqrt pow exp log reciprocal erf sin cos div var var_mean std norm linalg_vector_norm sum cumsum sub rsub "
    "neg abs": "no integer kernel: this arithmetic needs float's range",
    "to _to_copy type_as": "a change of dtype or device stays float",
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d grid_sampler": (
        "interpolation with weights has no integer kernel"
    ),
}

OPS: dict[str, Op] = {
    row.name: row
    for rows in (
        _rows(Kind.ANCHOR, "conv1d conv2d conv3d", weight=1, bias=2),
        _rows(Kind.ANCHOR, "conv_transpose1d conv_transpose2d conv_transpose3d", weight=1, bias=2, channel_axis=1),
        _rows(Kind.ANCHOR, "linear", weight=1, bias=2),
        _rows(Kind.ANCHOR, "matmul bmm"),
        _rows(Kind.BINARY, "add mul"),
        _rows(
            Kind.OWN,
            "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean",
        ),
        _rows(
            Kind.UNARY,
            "relu relu6 hardtanh hardswish hardsigmoid silu gelu leaky_relu elu sigmoid tanh clamp clamp_min clamp_max "
            "mish",
        ),
        _rows(
            Kind.SHARE,
            "view reshape _unsafe_view flatten unflatten permute transpose t movedim squeeze unsqueeze expand repeat "
            "slice select narrow split split_with_sizes chunk unbind getitem contiguous clone detach alias flip roll "
            "pixel_shuffle pixel_unshuffle channel_shuffle index_select max_pool1d max_pool2d max_pool3d cat stack "
            "pad constant_pad_nd upsample_nearest1d upsample_nearest2d upsample_nearest3d",
        ),
        _rows(Kind.FLOAT, "embedding", table=0, reason=_LOOKUP),
        *(_rows(Kind.FLOAT, names, reason=reason) for names, reason in _FLOAT.items()),
    )
    for row in rows
}

_PYTHON_OPERATORS: dict[Callable[..., Any], str] = {operator.getitem: "getitem"}


def name_of(node: fx.Node) -> str:
    """The ATen name without overload (``conv2d``, ``add``), ``getitem``, or ``""`` for what is no known call."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name().split("::")[-1].split(".")[0] if node.target.namespace == "aten" else ""
    return _PYTHON_OPERATORS.get(node.target, "") if callable(node.target) else ""


def lookup(node: fx.Node) -> Op | None:
    """The node's row, or None for an unknown operator."""
    return OPS.get(name_of(node))


def tensor_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes among the arguments, nested lists included, in order and with repetitions; keyword arguments last.

    ``NodeInfo.inputs`` is aligned with it.
    """
    found: list[fx.Node] = []

    def note(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.map_arg((node.args, node.kwargs), note)
    return tuple(found)


def activations(node: fx.Node) -> tuple[int, ...]:
    """Positions, in :func:`tensor_inputs`, of the floating-point data: not weight, bias, sizes or indices."""
    op = lookup(node)
    places = (op.weight, op.bias, op.table) if op else ()
    fixed = {id(node.args[p]) for p in places if p is not None and p < len(node.args)}
    return tuple(i for i, n in enumerate(tensor_inputs(node)) if id(n) not in fixed and _carries_data(value(n)))


def _carries_data(val: Any) -> bool:
    if isinstance(val, tuple | list):
        return any(_carries_data(v) for v in val)
    return isinstance(val, torch.Tensor) and val.dtype.is_floating_point


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument at ``position``, given by place or by ``name``."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_constant(node: fx.Node) -> bool:
    """True for parameters, buffers, and calls on nothing else: values that no input, write or chance changes."""
    todo, seen = [node], {node}
    while todo:  # no recursion: deep models are deeper than Python's stack
        current = todo.pop()
        if current.op == "get_attr":
            if is_written(current):
                return False
            continue
        if current.op != "call_function" or mutates(current) or _draws(current) or _varies(value(current)):
            return False
        inputs = set(tensor_inputs(current))
        if not inputs:
            return False
        todo += inputs - seen
        seen |= inputs
    return True


def is_written(node: fx.Node) -> bool:
    """True where an operator writes to the node's memory, through a view of it too: a buffer that holds state."""
    touching = (u for u in node.users if u.args and u.args[0] is node)
    return any(mutates(u) or (is_view(u) and is_written(u)) for u in touching)


def _varies(val: Any) -> bool:
    """True for a symbolic size, which only an input can have: a short cut past all that is before the node."""
    if isinstance(val, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in val.shape)
    return isinstance(val, torch.SymInt)


def _draws(node: fx.Node) -> bool:
    """True where the operator draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_view(node: fx.Node) -> bool:
    """True where the result may share memory with an argument: views, ``getitem`` of them, in-place operators."""
    if name_of(node) == "getitem":
        return isinstance(node.args[0], fx.Node) and is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases = any(r.alias_info is not None for r in node.target._schema.returns)
    return aliases or name_of(node) in _UNDECLARED_VIEWS


_UNDECLARED_VIEWS = {"dropout", "feature_dropout", "alpha_dropout", "type_as", "broadcast_tensors", "meshgrid"}
"""Operators that may give back their argument, or a view of it, though their schema does not say so."""


def mutates(node: fx.Node) -> bool:
    """True where the call writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def is_floating(node: fx.Node) -> bool:
    """True where the node's value is a floating-point tensor (or its value is not recorded)."""
    val = value(node)
    return val.dtype.is_floating_point if isinstance(val, torch.Tensor) else True


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of an anchor at the example's sizes; 0 for all else."""
    op = lookup(node)
    if op is None or op.kind is not Kind.ANCHOR:
        return 0
    out, inputs = value(node), tensor_inputs(node)
    if not isinstance(out, torch.Tensor):
        return 0
    if op.weight is None:
        per_output = value(inputs[0]).shape[-1]
    elif op.name.startswith("conv_transpose"):  # every input element meets every weight of its channel
        return _numel(value(inputs[0])) * _numel(value(inputs[1])) // int(value(inputs[1]).shape[0])
    else:
        weight = value(inputs[1])
        per_output = _numel(weight) // int(weight.shape[0])
    return _numel(out) * int(per_output)


def _numel(val: torch.Tensor) -> int:
    """Elements at the example's sizes, symbolic ones replaced by their hints."""
    total = 1
    for size in val.shape:
        total *= size.node.hint if isinstance(size, torch.SymInt) else int(size)
    return total
