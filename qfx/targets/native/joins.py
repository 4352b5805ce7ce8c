"""Concatenation: producers write into the whole where they can, all else is copied there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import argument, name_of
from qfx.targets.native.emitter import Emitter, NotNative, Operator
from qfx.targets.native.images import border_fill
from qfx.targets.native.moves import copy
from qfx.targets.native.views import Border, Element, View
from qfx.targets.x86_static import StaticLeaf


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    parts: Any = node.args[0]
    dtypes = {value(n).dtype for n in parts}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.uint8, torch.int8}:
        return "the native engine joins tensors of one type, float32 or bytes"
    return None


def _dim(node: fx.Node, dims: int) -> int:
    dim = argument(node, 1, "dim", 0)
    assert isinstance(dim, int)
    return dim % dims


def is_join_of_channels(node: fx.Node) -> bool:
    """True for a concatenation of images of bytes along their channels."""
    if name_of(node) != "cat" or not isinstance(value(node), torch.Tensor):
        return False
    return value(node).ndim == 4 and not value(node).dtype.is_floating_point and _dim(node, 4) == 1


def place_in_join(emitter: Emitter, node: fx.Node, element: Element) -> View | None:
    """Where ``node`` writes its image, if all that reads it is a concatenation; else None."""
    if len(node.users) != 1:
        return None
    (join,) = node.users
    if not is_join_of_channels(join):
        return None
    whole = _whole(emitter, join, element)
    return _part(emitter, join, whole, node)


def _whole(emitter: Emitter, join: fx.Node, element: Element) -> View:
    if join not in emitter.joins:
        emitter.joins[join] = emitter.program.image(element, emitter.size(join), emitter.border(join))
    return emitter.joins[join]


def _part(emitter: Emitter, join: fx.Node, whole: View, node: fx.Node) -> View:
    """The channels of ``node`` within the whole, at its first place there."""
    parts: Any = join.args[0]
    start = sum(emitter.size(n)[1] for n in parts[: parts.index(node)])
    return replace(whole.narrow(1, start, emitter.size(node)[1]), border=Border())


def _join(emitter: Emitter, node: fx.Node) -> None:
    parts: Any = node.args[0]
    views = [emitter.view(part) for part in parts]
    if name_of(node) == "stack":
        views = [_unsqueezed(view, _dim(node, len(view.sizes) + 1)) for view in views]
    if is_join_of_channels(node) and all(view.channels_last for view in views):
        whole = _whole(emitter, node, views[0].element)
        fill = border_fill(whole, _zero(emitter, node))
        if fill:
            emitter.step(fill, [], [whole], node, "border")
    else:
        whole = emitter.new(node, views[0].element)
    emitter.values[node] = whole
    dim = _dim(node, len(whole.sizes))
    if any(not view.batched for view in views) or dim == 0:
        raise NotNative(f"{node} joins along the batch")
    start = 0
    for view in views:
        place = replace(whole.narrow(dim, start, view.sizes[dim]), border=Border())
        start += view.sizes[dim]
        if place != view:
            order = (0, 2, 3, 1) if view.channels_last and place.channels_last else tuple(range(len(view.sizes)))
            copy(emitter.program, view.permute(order), place.permute(order), str(node))


def _unsqueezed(view: View, dim: int) -> View:
    sizes, strides = list(view.sizes), list(view.strides)
    sizes.insert(dim, 1)
    strides.insert(dim, 0)
    return replace(view, sizes=tuple(sizes), strides=tuple(strides))


def _zero(emitter: Emitter, node: fx.Node) -> int:
    """The integer that stands for zero, which a reader's padding is."""
    leaves = (emitter.module(user) for user in node.users if user.op == "call_module")
    return next((int(leaf.data.zero_point) & 255 for leaf in leaves if isinstance(leaf, StaticLeaf)), 0)


JOIN = Operator(_refusal, _join)
