"""A graph that was traced in training mode, rewritten to what the model does in eval mode, with marks.

Batch norms read their running statistics, dropout and drop path become ``alias``, attention drops nothing; each bears a
:class:`qfx.training.Mark` that says what it does in training. Passes therefore see the graph that they would see of an
eval capture, and it can be compared with the model in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm

from qfx.attributes import get_tensor
from qfx.errors import CaptureError
from qfx.meta import describe, update, value
from qfx.operators import argument, is_view, name_of
from qfx.origin import layer_path, source_line
from qfx.training import AttentionMark, BatchNormMark, DetachMark, DropoutMark, DropPathMark, Mark

aten = torch.ops.aten

ATTENTION_DROPOUT = 4  # the position of dropout_p in scaled_dot_product_attention


def to_eval_form(gm: fx.GraphModule, user: nn.Module) -> None:
    """Rewrite ``gm`` in place; ``user`` is the model that it was traced from, whose modules tell hyper-parameters.

    Raises:
        CaptureError: training does something that has no such form; the text names the user's line.
    """
    for node in list(gm.graph.nodes):
        rewrite = None if node._erased else _REWRITES.get(name_of(node))
        if rewrite is not None:
            rewrite(gm, node, user)
    for node in gm.graph.nodes:
        if _draws(node):
            raise _refusal(node, f"it draws random numbers in training ({name_of(node)}) in a way that is not known")
    gm.graph.lint()


_DROPS = {
    "dropout": ("p", 1),
    "feature_dropout": ("p", 1),
    "alpha_dropout": ("p", 1),
    "scaled_dot_product_attention": ("dropout_p", ATTENTION_DROPOUT),
    "lstm": ("dropout", 5),
    "gru": ("dropout", 5),
    "rnn_tanh": ("dropout", 5),
    "rnn_relu": ("dropout", 5),
}
"""Operators that draw nothing where this argument is 0, though torch tags them as random: its name and position."""


def _draws(node: fx.Node) -> bool:
    """Whether the node draws random numbers."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    name, position = _DROPS.get(name_of(node), ("", 0))
    live = argument(node, 2, "train", True) if position == 1 else True
    return not name or (live and float(argument(node, position, name, 0.0)) > 0.0)


def _refusal(
    node: fx.Node, what: str, instead: str = "use torch's own modules for dropout and batch norm"
) -> CaptureError:
    return CaptureError(
        what,
        where=layer_path(node),
        source=source_line(node),
        hint=f"{instead}, or quantize after training (mode='ptq')",
    )


def _alias(gm: fx.GraphModule, node: fx.Node, source: fx.Node, mark: Mark) -> None:
    """Put ``alias(source)`` with ``mark`` in the place of ``node``."""
    with gm.graph.inserting_before(node):
        new = gm.graph.create_node("call_function", aten.alias.default, (source,), {}, name=node.name)
    new.meta.update({**describe(node), "val": value(source)})
    update(new, mark=mark)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


# --- batch norm -------------------------------------------------------------------------------------------------------


def _batch_norm(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    mean, var, live = node.args[3], node.args[4], bool(node.args[5])
    if not isinstance(mean, fx.Node) or not isinstance(var, fx.Node):
        return  # without running statistics it does the same in both modes
    path = str(mean.target).rpartition(".")[0] if mean.op == "get_attr" else ""
    module = user.get_submodule(path) if path else user
    if not isinstance(module, _BatchNorm) or mean.op != "get_attr":
        if live:
            raise _refusal(node, "F.batch_norm trains statistics that no batch norm module holds")
        if any(_is_trained(gm, arg) for arg in node.args[1:3]):  # folding would make constants of them
            raise _refusal(node, "F.batch_norm has weights to train that no batch norm module holds")
        return
    if live and isinstance(module, nn.SyncBatchNorm):
        raise _refusal(
            node, "SyncBatchNorm takes its statistics from all ranks, which a graph cannot", "use nn.BatchNorm2d"
        )
    _drop_count(gm, f"{path}.num_batches_tracked")
    # A frozen batch norm does not count, so that its counter is not in the trace.
    gm.get_submodule(path)._buffers["num_batches_tracked"] = module.num_batches_tracked
    tensors = {
        name: str(arg.target)
        for name, arg in zip(("weight", "shift", "mean", "var"), node.args[1:5], strict=True)
        if isinstance(arg, fx.Node)
    }
    update(node, mark=BatchNormMark(path=path, eps=module.eps, momentum=module.momentum, frozen=not live, **tensors))
    node.args = (*node.args[:5], False, *node.args[6:])


def _is_trained(gm: fx.GraphModule, arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr" and get_tensor(gm, str(arg.target)).requires_grad


def _drop_count(gm: fx.GraphModule, path: str) -> None:
    """The module counts its batches itself; one that is called twice counts on with what it counted."""
    counters = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == path]
    chain = list(counters)
    for node in chain:
        chain += [u for u in node.users if name_of(u) == "add_"]
    for node in reversed(chain):
        if not node.users:
            gm.graph.erase_node(node)


# --- dropout ----------------------------------------------------------------------------------------------------------


def _dropout(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    source, p, live = node.args[0], float(argument(node, 1, "p", 0.5)), argument(node, 2, "train", True)
    assert isinstance(source, fx.Node)
    if not live or p == 0.0:
        node.target = getattr(aten, name_of(node).removesuffix("_")).default
        node.args = (source, p, False)
        return
    if name_of(node).endswith("_"):
        others = [u for u in source.users if u is not node]
        if is_view(source) or any(is_view(u) or u > node for u in others):
            raise _refusal(node, "dropout in place changes a tensor that is read under another name")
    _alias(gm, node, source, DropoutMark(name_of(node).removesuffix("_"), p))


def _native_dropout(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    """What tracing behind ``torch.vmap`` makes of dropout: a pair of the result and its mask."""
    source, p, live = node.args[0], float(node.args[1]), node.args[2]  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    for part in list(node.users):
        if part.args[1] == 0:
            _alias(gm, part, source, DropoutMark("dropout", p if live else 0.0))
    if node.users:
        raise _refusal(node, "the mask of dropout is read")
    gm.graph.erase_node(node)


def _attention(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    p = float(argument(node, ATTENTION_DROPOUT, "dropout_p", 0.0))
    if p == 0.0:
        return
    if len(node.args) > ATTENTION_DROPOUT:
        node.args = (*node.args[:ATTENTION_DROPOUT], 0.0, *node.args[ATTENTION_DROPOUT + 1 :])
    else:
        node.kwargs = {**node.kwargs, "dropout_p": 0.0}
    update(node, mark=AttentionMark(p))


# --- drop path --------------------------------------------------------------------------------------------------------


def _drop_path(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    """``x * noise`` where the noise is drawn for whole samples."""
    for x, noise in (node.args[:2], node.args[1::-1]):
        chain = _noise(noise) if isinstance(noise, fx.Node) else []
        if not chain or not isinstance(x, fx.Node) or not isinstance(noise, fx.Node):
            continue
        names = [name_of(n) for n in chain]
        uniform = "floor" in " ".join(names)
        if uniform:  # keep + rand, floored; what is kept was divided before
            keep = next(float(a) for n in chain if name_of(n) == "add" for a in n.args if isinstance(a, float))
            scaled = name_of(x) == "div" and isinstance(x.args[1], float) and x.args[1] == keep
        else:
            keep = next(float(n.args[1]) for n in chain if name_of(n) == "bernoulli_")  # type: ignore[arg-type]
            scaled = any(n.startswith("div") for n in names)
        source = x.args[0] if uniform and scaled else x
        assert isinstance(source, fx.Node)
        shape, full = value(noise).shape, value(node).shape
        if len(shape) != len(full):
            raise _refusal(node, "drop path draws a mask of another rank than what it drops")
        kept = tuple(i for i, size in enumerate(shape) if not isinstance(size, int) or size > 1)
        _alias(gm, node, source, DropPathMark(keep, kept, scaled, uniform))
        for dead in (x, *chain) if source is not x else chain:
            if not dead.users:
                gm.graph.erase_node(dead)
        return


_STEPS = ("div", "div_", "floor", "floor_", "bernoulli_", "add")
_SOURCES = ("new_empty", "empty", "empty_like", "rand", "rand_like")


def _noise(node: fx.Node) -> list[fx.Node]:
    """The nodes that draw the mask ``node``, last first; empty where it is none."""
    chain: list[fx.Node] = []
    while name_of(node) in _STEPS:
        chain.append(node)
        inner = [a for a in node.args if isinstance(a, fx.Node)]
        if len(inner) != 1:
            return []
        (node,) = inner
    drawn = any(name_of(n) == "bernoulli_" for n in chain) or name_of(node).startswith("rand")
    return [*chain, node] if chain and drawn and name_of(node) in _SOURCES else []


def _detach(gm: fx.GraphModule, node: fx.Node, user: nn.Module) -> None:
    update(node, mark=DetachMark())


_REWRITES: Mapping[str, Callable[[fx.GraphModule, fx.Node, nn.Module], Any]] = {
    "batch_norm": _batch_norm,
    **{name + end: _dropout for name in ("dropout", "feature_dropout", "alpha_dropout") for end in ("", "_")},
    "native_dropout": _native_dropout,
    "scaled_dot_product_attention": _attention,
    "mul": _drop_path,
    "detach": _detach,
}
