"""Float operators over rows, between layers: norms, attention, softmax, with the rounding of their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qfx.meta import value
from qfx.operators import argument, is_constant, name_of
from qfx.ops import quantize
from qfx.targets.native.copies import dense_of, samples_of
from qfx.targets.native.crossings import quantize_refusal
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import number
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
    """A view, or the value of ``node``, as floats in the natural order, copied if need be."""
    view = node if isinstance(node, View) else emitter.view(node)
    if view.element != "float":
        raise NotNative(f"{what} reads {view.element}")
    if 0 in view.sizes:
        raise NotNative(f"{what} reads nothing")
    return dense_of(emitter, view, str(what))


def float_refusal(gm: fx.GraphModule, node: fx.Node, *others: fx.Node) -> str | None:
    """Why ``node`` has no float kernel, or None; ``others`` are inputs of another type."""
    vals = [value(n) for n in (node, *node.all_input_nodes) if n not in others]
    if any(v.dtype != torch.float32 for v in vals if isinstance(v, Tensor)):
        return "the native float kernels take float32"
    return None


# --- norms ------------------------------------------------------------------------------------------------------------


def _norm_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    shape: Any = node.args[1]
    if len(shape) > 1 or value(node).ndim < 2:
        return "natively, norms are over the last dimension, not the batch"
    return float_refusal(gm, node)


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
    if mask is not None and value(mask).dtype not in (torch.float32, torch.bool):
        return "native attention takes masks of float32 or bool"
    if query.ndim < 4 or query.ndim != key.ndim:
        return "native attention takes [batch, ..., heads, tokens, features]"
    if query.shape[:-2] != key.shape[:-2]:
        return "native attention takes as many heads of keys as of queries"
    return float_refusal(gm, node, *([mask] if mask is not None and value(mask).dtype == torch.bool else []))


def _attention(emitter: Emitter, node: fx.Node) -> None:
    *outer, heads, q_len, value_dim = emitter.size(node)
    samples = numel(tuple(outer))

    def one_batch(view: View) -> View:
        return samples_of(emitter, view, 3, str(node))

    views = [one_batch(_heads(emitter, emitter.view(n), node)) for n in node.args[:3]]
    head_dim, kv_len = views[0].sizes[3], views[1].sizes[2]
    causal = bool(argument(node, 5, "is_causal", False))
    given: Any = node.kwargs.get("scale")
    scale = 1 / math.sqrt(head_dim) if given is None else float(given)

    def by_token(element: Element) -> View:
        tensor = emitter.program.tensor(element, (*outer, q_len, heads, value_dim))
        return tensor.permute((*range(len(outer)), *(len(outer) + i for i in (1, 0, 2))))

    out, made = result(emitter, node, by_token)
    walked = (*views, one_batch(made[0]))
    strides = ", ".join(f"{{{view.strides[0]}, {view.strides[1]}, {view.strides[2]}}}" for view in walked)

    added, reads = _mask(emitter, argument(node, 3, "attn_mask"), node, kv_len)

    def shape(batch: str, added: str) -> str:
        mask = f"{{{added}, {str(causal).lower()}, 0}}"
        sizes = f"{batch}, {heads}, {heads}, {q_len}, {kv_len}, {head_dim}, {value_dim}"
        return f"f32::AttentionShape{{{sizes}, {strides}, {number(scale)}, {mask}}}"

    emitter.program.headers.add("attention.h")
    pointers = ", ".join(pointer(view.buffer, view.offset) for view in views)
    whole = shape(f"n * {samples}", added)
    call = f"f32::attention(team, {pointers}, {out}, {whole}, reinterpret_cast<float*>(scratches));"
    scratch = f"f32::AttentionScratch({shape('1', 'nullptr, 0, 0, 0')}).size * 4 + 64"
    macs = samples * heads * q_len * kv_len * (head_dim + value_dim)
    emitter.step(call, [*views, *reads], made, node, "attention", scratch=scratch, macs=macs)


def _mask(emitter: Emitter, mask: Any, node: fx.Node, keys: int) -> tuple[str, list[View]]:
    """Pointer and strides of what is added to the scores, in C++, and the tensor behind it."""
    if mask is None:
        return "nullptr, 0, 0, 0", []
    known = emitter.values[mask]
    if isinstance(known, Tensor) and known.dtype == torch.bool:
        known = torch.zeros(known.shape).masked_fill(~known, -torch.inf)
    view = emitter.program.constant_view(known) if isinstance(known, Tensor) else emitter.view(mask)
    if view.element == "bool":
        view = _additive(emitter, view, node)
    if view.sizes[-1] != keys or view.strides[-1] != 1:
        raise NotNative(f"{node} adds a mask that is the same for all keys, or not adjacent")
    *outer, heads, queries, _ = emitter.size(node)
    if BATCH in view.sizes[1:] or (view.batched and len(view.sizes) < len(outer) + 3):
        raise NotNative(f"{node} adds a mask with samples in another dimension")
    whole = view.expand((*outer, heads, queries, keys))
    if any(whole.strides[: len(outer)]):
        whole = samples_of(emitter, whole, 3, str(node))
    sample, head, query, _ = whole.strides[-4:]
    return f"{pointer(whole.buffer, whole.offset)}, {sample}, {head}, {query}", [whole]


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
    beside = view.batched and view.strides[-1] == 1
    return view if beside else dense_of(emitter, view, str(node))


# --- softmax ----------------------------------------------------------------------------------------------------------


def _softmax_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    dims = value(node).ndim
    if dims < 2 or argument(node, 1, "dim") not in (-1, dims - 1):
        return "natively, softmax is over the last dimension, not the batch"
    return float_refusal(gm, node)


def _softmax(emitter: Emitter, node: fx.Node) -> None:
    x = dense(emitter, node.args[0], node)
    out, made = result(emitter, node, natural(emitter, node))
    emitter.program.headers.add("softmax.h")
    keys = x.sizes[-1]
    sizes = f"n, 1, {numel(x.sizes) // keys}, {keys}"
    call = f"f32::softmax(team, {pointer(x.buffer, x.offset)}, {out}, f32::Mask{{}}, {sizes}, 1.0f);"
    emitter.step(call, [x], made, node, "softmax")


# --- means ------------------------------------------------------------------------------------------------------------


def _mean_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    dims: Any = argument(node, 1, "dim")
    count = value(node.args[0]).ndim  # type: ignore[arg-type]
    if not dims or 0 in {dim % count for dim in dims}:
        return "natively, means of floats are of each sample"
    return float_refusal(gm, node)


def _mean(emitter: Emitter, node: fx.Node) -> None:
    """Over dimensions that lie side by side behind all others, where they are copied to if need be."""
    source, dims = node.args[0], argument(node, 1, "dim")
    assert isinstance(source, fx.Node)
    given = emitter.view(source)
    over = sorted(emitter.axis(source, dim) for dim in dims)
    kept = [axis for axis in range(len(given.sizes)) if axis not in over]
    x = dense(emitter, given.permute((*kept, *over)), node)
    out, made = result(emitter, node, natural(emitter, node))
    emitter.program.headers.add("elementwise.h")
    cols = numel(x.sizes[len(kept) :])
    call = f"f32::mean(team, {pointer(x.buffer, x.offset)}, {out}, n * {numel(x.sizes) // cols}, {cols});"
    emitter.step(call, [x], made, node, "mean")


# --- embeddings -------------------------------------------------------------------------------------------------------


def _embedding_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    table, indices = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(indices, fx.Node)
    if value(indices).dtype != torch.int64 or not is_constant(table):
        return "native tables are constant, and read by int64"
    return float_refusal(gm, node, indices)


def _embedding(emitter: Emitter, node: fx.Node) -> None:
    table = emitter.parameter(node.args[0])
    indices = dense_of(emitter, emitter.view(node.args[1]), str(node))
    out = emitter.tensor(node, "float")
    held = emitter.program.table(table)
    emitter.program.headers.add("embedding.h")
    sizes = f"n * {numel(indices.sizes)}, {table.shape[0]}, {table.shape[1]}"
    given = ", ".join(pointer(buffer) for buffer in (indices.buffer, held, out.buffer))
    code = f"if (!f32::embedding(team, {given}, {sizes})) wrong = 1;"
    emitter.step(code, [indices, View(held, tuple(table.shape), table.stride())], [out], node, "embedding")


NORM = Operator(_norm_refusal, _norm, by_row=True)
ATTENTION = Operator(_attention_refusal, _attention, by_row=True)
SOFTMAX = Operator(_softmax_refusal, _softmax, by_row=True)
MEAN = Operator(_mean_refusal, _mean, by_row=True)
EMBEDDING = Operator(_embedding_refusal, _embedding, by_row=True)

FLOATS: dict[str, Operator] = {
    **dict.fromkeys(PARAMETERS, NORM),
    "scaled_dot_product_attention": ATTENTION,
    "softmax": SOFTMAX,
    "mean": MEAN,
    "embedding": EMBEDDING,
}
"""By their ATen names."""
