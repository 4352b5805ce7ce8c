"""Padding with one value, in any dimensions but the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from qfx.meta import value
from qfx.targets.native.copies import copy
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import pointer
from qfx.targets.native.views import Border
from qfx.targets.x86_point import LoopLeaf


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    assert isinstance(leaf, LoopLeaf)
    widths: Any = leaf.named["pad"]
    if any(width < 0 for width in widths) or len(widths) >= 2 * value(node).ndim:
        return "the native engine pads, and does not cut, and not the batch"
    return None


def _emit(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    named, output = leaf.named, leaf.output
    view = emitter.view(node.args[0])
    filler = int(output.quantize(output.scale.new_tensor(float(named.get("value") or 0.0)))) & 255
    if len(view.sizes) == 4:  # a whole image, and no place in another: it is filled first, its border as well
        out = emitter.values[node] = emitter.program.image(view.element, emitter.size(node), emitter.border(node))
    else:
        out = emitter.tensor(node, view.element)
    if out.border != Border() and filler != int(output.zero_point) & 255:
        raise NotNative(f"{node} and the padding behind it have two values")
    inside = replace(out, border=Border())
    for i, (before, after) in enumerate(zip(named["pad"][::2], named["pad"][1::2], strict=True)):
        dim = len(view.sizes) - 1 - i
        inside = inside.narrow(dim, before, out.sizes[dim] - before - after)
    emitter.program.headers.add("copy.h")
    emitter.step(f"fill(team, {pointer(out.buffer)}, n * {out.buffer.size}, {filler});", [], [out], node, "fill")
    order = (0, 2, 3, 1) if view.channels_last and out.channels_last else tuple(range(len(view.sizes)))
    copy(emitter.program, view.permute(order), inside.permute(order), str(node))


PAD = Operator(_refusal, _emit)
