"""Concatenation: producers write into the whole where they can, all else is copied there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import name_of
from qfx.targets.native.copies import copy
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.images import border_fill
from qfx.targets.native.join_places import dim_of, is_join_of_channels, whole_of
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.views import Border, View
from qfx.targets.x86_static import StaticLeaf


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    parts: Any = node.args[0]
    dtypes = {value(n).dtype for n in parts}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.uint8, torch.int8}:
        return "the native engine joins tensors of one type, float32 or bytes"
    return None


def _join(emitter: Emitter, node: fx.Node) -> None:
    parts: Any = node.args[0]
    views = [emitter.view(part) for part in parts]
    if name_of(node) == "stack":
        views = [_unsqueezed(view, emitter.axis(node, dim_of(node, value(node).ndim))) for view in views]
    if is_join_of_channels(node) and all(view.channels_last for view in views):
        whole = whole_of(emitter, node, views[0].element)
        fill = border_fill(whole, _zero(emitter, node))
        if fill:
            emitter.step(fill, [], [whole], node, "border")
    else:
        whole = emitter.new(node, views[0].element)
    emitter.values[node] = whole
    dim = emitter.axis(node, dim_of(node, value(node).ndim))
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


JOIN = Operator(_refusal, _join, by_row=True)
