"""Float operators between layers: norms, attention, arithmetic, activations, with the rounding of their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qfx.meta import value
from qfx.operators import argument, name_of
from qfx.ops import quantize
from qfx.targets.native.copies import dense_of
from qfx.targets.native.crossings import quantize_refusal
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import FUNCTIONS, number
from qfx.targets.native.moves import MOVES
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS, pointer
from qfx.targets.native.views import BATCH, Element, View, numel

# --- results ----------------------------------------------------------------------------------------------------------


def rounding_of(emitter: Emitter, node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The quantize operator that rounds the value of ``node``, and whether nobody else reads the floats.

    Between the two may stand moves, as long as each has one reader.
    """
    direct = [user for user in node.users if _rounds(emitter.gm, user)]
    if direct and len(node.users) > 1:
        return direct[0], False
    current = node
    while len(current.users) == 1:
        (user,) = current.users
        if _rounds(emitter.gm, user):
            return user, True
        if name_of(user) not in MOVES or name_of(user) == "getitem":
            break
        current = user
    return None, False


def _rounds(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.target is quantize and quantize_refusal(gm, node) is None


def result(emitter: Emitter, node: fx.Node, make: Callable[[Element], View]) -> tuple[str, list[View]]:
    """A C++ ``Output`` for the value of ``node``, and the tensors behind it, which ``make`` makes.

    The value becomes floats, or integers where nobody reads the floats, or both.
    """
    rounding, alone = rounding_of(emitter, node)
    if rounding is None:
        floats = emitter.values[node] = make("float")
        return f"f32::Output<uint8_t>{{{pointer(floats.buffer)}, nullptr, {{}}}}", [floats]
    low, high, dtype = rounding.args[5:8]
    assert isinstance(low, int) and isinstance(high, int) and isinstance(dtype, torch.dtype)
    scale, zero_point = (emitter.parameter(n) for n in rounding.args[1:3])
    ends = (float(torch.reciprocal(scale.float())), float(zero_point), float(low), float(high))
    element = ELEMENTS[dtype]
    integers = make(element)
    made, to = [integers], ", ".join(number(v) for v in ends)
    floats_at = "nullptr"
    if alone:
        emitter.values[node] = integers
    else:
        floats = emitter.values[node] = make("float")
        emitter.rounded[rounding] = integers
        floats_at = pointer(floats.buffer)
        made.append(floats)
    return f"f32::Output<{element}>{{{floats_at}, {pointer(integers.buffer)}, {{{to}}}}}", made


def natural(emitter: Emitter, node: fx.Node) -> Callable[[Element], View]:
    """Makes tensors in the natural order for the value of ``node``."""

    def make(element: Element) -> View:
        if element == "float":
            return emitter.new(node, element)
        return emitter.program.tensor(element, emitter.size(node))

    return make


def dense(emitter: Emitter, node: Any, what: fx.Node) -> View:
    """The value of ``node`` as floats in the natural order, copied if need be."""
    view = emitter.view(node)
    if view.element != "float":
        raise NotNative(f"{what} reads {view.element}")
    return dense_of(emitter, view, str(what))


def _float_refusal(gm: fx.GraphModule, node: fx.Node, *others: fx.Node) -> str | None:
    """Why ``node`` has no float kernel, or None; ``others`` are inputs of another type."""
    vals = [value(n) for n in (node, *node.all_input_nodes) if n not in others]
    if any(v.dtype != torch.float32 for v in vals if isinstance(v, Tensor)):
        return "the native float kernels take float32"
    return None


# --- norms ------------------------------------------------------------------------------------------------------------


def _norm_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    shape: Any = node.args[1]
    return _float_refusal(gm, node) or (None if len(shape) == 1 else "natively, norms are over the last dimension")


def _norm(emitter: Emitter, node: fx.Node) -> None:
    name = name_of(node)
    x = dense(emitter, node.args[0], node)
    parameters = [_parameter(emitter, argument(node, i, p)) for i, p in enumerate(PARAMETERS[name], 2)]
    given = argument(node, 2 + len(parameters), "eps", None if name == "rms_norm" else 1e-5)
    eps = torch.finfo(torch.float32).eps if given is None else given
    out, made = result(emitter, node, natural(emitter, node))
    cols = x.sizes[-1]
    emitter.program.headers.add("norm.h")
    call = (
        f"f32::{name}(team, {pointer(x.buffer, x.offset)}, nullptr, {', '.join(parameters)}, {out}, nullptr, "
        f"n * {numel(x.sizes) // cols}, {cols}, {number(eps)});"
    )
    emitter.step(call, [x], made, node, name)


PARAMETERS = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",)}
"""Of the norms, as they come behind the shape; eps follows."""


def _parameter(emitter: Emitter, node: Any) -> str:
    return "nullptr" if node is None else emitter.program.constant(emitter.parameter(node).float())


# --- attention --------------------------------------------------------------------------------------------------------


def _attention_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    query, key = value(node.args[0]), value(node.args[1])  # type: ignore[arg-type]
    mask = argument(node, 3, "attn_mask")
    if argument(node, 4, "dropout_p", 0.0):
        return "native attention takes no dropout"
    if mask is not None and (value(mask).dtype not in (torch.float32, torch.bool) or value(mask).ndim != 4):
        return "native attention takes masks of float32 or bool, [batch, heads, queries, keys]"
    if query.ndim != 4 or key.ndim != 4:
        return "native attention takes [batch, heads, tokens, features]"
    if query.shape[1] != key.shape[1]:
        return "native attention takes as many heads of keys as of queries"
    return _float_refusal(gm, node, *([mask] if mask is not None and value(mask).dtype == torch.bool else []))


def _attention(emitter: Emitter, node: fx.Node) -> None:
    views = [_heads(emitter, emitter.view(n), node) for n in node.args[:3]]
    q, k, v = views
    _, heads, q_len, head_dim = q.sizes
    value_dim, kv_len = v.sizes[3], k.sizes[2]
    causal = bool(argument(node, 5, "is_causal", False))
    given: Any = node.kwargs.get("scale")
    scale = 1 / math.sqrt(head_dim) if given is None else float(given)

    def by_token(element: Element) -> View:
        return emitter.program.tensor(element, (BATCH, q_len, heads, value_dim)).permute((0, 2, 1, 3))

    out, made = result(emitter, node, by_token)
    strides = ", ".join(f"{{{view.strides[0]}, {view.strides[1]}, {view.strides[2]}}}" for view in (*views, made[0]))

    added, reads = _mask(emitter, argument(node, 3, "attn_mask"), node, kv_len)

    def shape(batch: str, added: str) -> str:
        mask = f"{{{added}, {str(causal).lower()}, 0}}"
        sizes = f"{batch}, {heads}, {heads}, {q_len}, {kv_len}, {head_dim}, {value_dim}"
        return f"f32::AttentionShape{{{sizes}, {strides}, {number(scale)}, {mask}}}"

    emitter.program.headers.add("attention.h")
    pointers = ", ".join(pointer(view.buffer, view.offset) for view in views)
    call = f"f32::attention(team, {pointers}, {out}, {shape('n', added)}, reinterpret_cast<float*>(scratches));"
    scratch = f"f32::AttentionScratch({shape('1', 'nullptr, 0, 0, 0')}).size * 4 + 64"
    macs = heads * q_len * kv_len * (head_dim + value_dim)
    emitter.step(call, [*views, *reads], made, node, "attention", scratch=scratch, macs=macs)


def _mask(emitter: Emitter, mask: Any, node: fx.Node, keys: int) -> tuple[str, list[View]]:
    """Pointer and strides of what is added to the scores, in C++, and the tensor behind it."""
    if mask is None:
        return "nullptr, 0, 0, 0", []
    view = emitter.view(mask)
    if view.element == "bool":
        view = _additive(emitter, view, node)
    if view.sizes[3] != keys or view.strides[3] != 1:
        raise NotNative(f"{node} adds a mask that is the same for all keys, or not adjacent")
    repeats = [size == 1 for size in view.sizes[:3]]
    strides = [0 if repeat else stride for repeat, stride in zip(repeats, view.strides, strict=False)]
    return f"{pointer(view.buffer, view.offset)}, {', '.join(map(str, strides))}", [view]


def _additive(emitter: Emitter, keep: View, node: fx.Node) -> View:
    """A mask of booleans as floats: 0 where a key is seen, else -inf. Layers that share one share the floats."""
    key = ("mask", keep)
    if key not in emitter.arranged:
        whole = dense_of(emitter, keep, str(node))
        added = emitter.arranged[key] = emitter.program.tensor("float", keep.sizes)
        emitter.program.headers.add("elementwise.h")
        bytes_ = f"reinterpret_cast<const uint8_t*>({pointer(whole.buffer)})"
        call = f"f32::additive_mask(team, {bytes_}, {pointer(added.buffer)}, n * {added.buffer.size});"
        emitter.step(call, [whole], [added], node, "mask")
    return emitter.arranged[key]


def _heads(emitter: Emitter, view: View, node: fx.Node) -> View:
    """A view whose features lie side by side."""
    beside = view.batched and view.strides[3] == 1
    return view if beside else dense_of(emitter, view, str(node))


# --- element by element -----------------------------------------------------------------------------------------------

_BINARY = {"add": "Add", "sub": "Subtract", "mul": "Multiply", "div": "Divide"}


def _binary_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    left, right = node.args[:2]
    of_tensors = all(isinstance(n, fx.Node) and isinstance(value(n), Tensor) for n in (left, right))
    if not of_tensors or argument(node, 2, "alpha", 1) != 1:
        return "native arithmetic is of two tensors"
    shape = value(node).shape
    for n in node.all_input_nodes:
        ends = tuple(value(n).shape)
        while ends and ends[0] == 1:
            ends = ends[1:]
        if ends != tuple(shape)[len(shape) - len(ends) :]:
            return "natively, the smaller operand is repeated as a whole"
    return _float_refusal(gm, node)


def _binary(emitter: Emitter, node: fx.Node) -> None:
    if node in emitter.values:  # a layer has added it already
        return
    size = numel(emitter.size(node))
    operands, reads, cols = [], [], size
    for n in node.all_input_nodes if len(node.all_input_nodes) == 2 else node.all_input_nodes * 2:
        known = emitter.values[n]
        if isinstance(known, Tensor):
            operands.append((emitter.program.constant(known.float()), "1"))
            cols = min(cols, known.numel())
            continue
        view = dense(emitter, n, node)
        if numel(view.sizes) != size:
            raise NotNative(f"{node} repeats a value that depends on the batch")
        reads.append(view)
        operands.append((pointer(view.buffer, view.offset), "rows"))
    out, made = result(emitter, node, natural(emitter, node))
    emitter.program.headers.add("elementwise.h")
    given = ", ".join(f"f32::Operand{{{data}, {rows}}}" for data, rows in operands)
    code = (
        f"const int64_t rows = n * {size // cols};\n"
        f"f32::binary(team, f32::{_BINARY[name_of(node)]}{{}}, {given}, {out}, rows, {cols});"
    )
    emitter.step(code, reads, made, node, name_of(node))


def _activation_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    return _float_refusal(gm, node)


def _activation(emitter: Emitter, node: fx.Node) -> None:
    x = dense(emitter, node.args[0], node)
    function = _ACTIVATIONS[name_of(node)](*node.args[1:], **node.kwargs)
    out, made = result(emitter, node, natural(emitter, node))
    emitter.program.headers.add("activations.h")
    call = f"f32::activate(team, f32::{function}, {pointer(x.buffer, x.offset)}, {out}, n * {numel(x.sizes)});"
    emitter.step(call, [x], made, node, name_of(node))


_ACTIVATIONS: dict[str, Callable[..., str]] = {**FUNCTIONS, "relu": lambda: "Relu{}"}


NORM = Operator(_norm_refusal, _norm)
ATTENTION = Operator(_attention_refusal, _attention)
FLOAT_BINARY = Operator(_binary_refusal, _binary)
ACTIVATION = Operator(_activation_refusal, _activation)

FLOATS: dict[str, Operator] = {
    **dict.fromkeys(PARAMETERS, NORM),
    "scaled_dot_product_attention": ATTENTION,
    **dict.fromkeys(_BINARY, FLOAT_BINARY),
    **dict.fromkeys(_ACTIVATIONS, ACTIVATION),
}
"""By their ATen names."""
