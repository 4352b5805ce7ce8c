"""Convolutions and linear layers on integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qfx.meta import value
from qfx.operators import name_of
from qfx.targets.base import Step
from qfx.targets.native.amx_layer import emit_amx, uses_tiles
from qfx.targets.native.choice import Choice
from qfx.targets.native.copies import image_of, rows_of
from qfx.targets.native.depthwise_layer import emit_depthwise, is_depthwise
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import epilogue_of, refusal
from qfx.targets.native.isa import Isa
from qfx.targets.native.layer import Layer, flip_of, geometry_of, steps_of
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.packing import DEPTHWISE, by_tile
from qfx.targets.native.panel_layer import emit_panel
from qfx.targets.native.program import ELEMENTS
from qfx.targets.native.views import Border, Element, View
from qfx.targets.native.winograd_layer import emit_winograd, uses_winograd
from qfx.targets.x86_static import StaticLeaf, by_output_channel, signed

KERNELS: dict[str, tuple[Callable[[StaticLeaf, Isa], bool], Callable[[Layer], None]]] = {
    "depthwise": (is_depthwise, emit_depthwise),
    "amx": (uses_tiles, emit_amx),
    "winograd": (uses_winograd, emit_winograd),
    "panel": (lambda leaf, isa: not is_depthwise(leaf, isa), emit_panel),
}
"""Which layers a kernel takes, and how it gets into the program; the first that takes a layer computes it, unless
another one is chosen."""


# --- which ------------------------------------------------------------------------------------------------------------


def layer_refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    assert isinstance(leaf, StaticLeaf)
    val, x = value(node), value(node.args[0])  # type: ignore[arg-type]
    dims = len(leaf.weight_shape)
    if leaf.axis != 0 or dims not in (2, 3, 4):
        return f"no native kernel for {leaf.kernel}"
    if dims in (3, 4) and x.ndim != dims:
        return "no native kernel for an image without batch"
    if val.dtype not in ELEMENTS:
        return f"no native kernel gives {val.dtype}"
    return refusal(steps_of(leaf))


# --- how --------------------------------------------------------------------------------------------------------------


def layer_needs(emitter: Emitter, node: fx.Node) -> dict[fx.Node, Border]:
    """The padding, and one more on the far sides where squares of outputs hang over."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    leaf = emitter.module(node)
    return {source: _border(emitter, node, leaf)} if len(leaf.weight_shape) == 4 else {}


def _border(emitter: Emitter, node: fx.Node, leaf: StaticLeaf) -> Border:
    if len(leaf.weight_shape) == 2:
        return Border()
    top, left = geometry_of(leaf).padding
    height, width = emitter.size(node)[-2:]
    over = (height % 2, width % 2) if uses_winograd(leaf, emitter.isa) else (0, 0)
    return Border(top, left, top + over[0], left + over[1])


def _image(
    emitter: Emitter, leaf: StaticLeaf, source: Any, node: fx.Node, border: Border | None = None, zero: int = 0
) -> View:
    """What ``source`` computed as ``leaf`` reads it: an image with a border, or rows; copied if need be."""
    view = emitter.view(source)
    if len(leaf.weight_shape) == 2:
        return rows_of(emitter, view, str(node))
    if len(leaf.weight_shape) == 3:
        line = view.reshape((*view.sizes[:2], 1, view.sizes[2]))
        assert line is not None, "a dimension of one element is always there"
        view = line
    return image_of(emitter, view, str(node), border or Border(), zero)


def emit_layer(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    x = _image(emitter, leaf, node.args[0], node, _border(emitter, node, leaf), int(leaf.data.zero_point) & 255)
    element = ELEMENTS[leaf.dtype if leaf.output is None else leaf.output.limits["dtype"]]
    if leaf.output is None and leaf.dtype != torch.float32:
        raise NotNative(f"{node} gives {leaf.dtype}")
    steps = steps_of(leaf)
    addition = _addition(emitter, node, leaf)
    addend = node.args[1] if len(node.args) > 1 else None
    named = node
    if addition is not None:
        named, addend = addition
        steps = (*steps, Step("add", None))
    out = _out(emitter, leaf, named, element)
    other = None if addend is None else _image(emitter, leaf, addend, node)
    epilogue = epilogue_of(emitter.program, leaf, steps, out, other, _constants(emitter, leaf))
    for choice in _choices(emitter, node, leaf):
        assert choice.kernel is not None
        _, emit = KERNELS[choice.kernel]
        emit(Layer(emitter, node, leaf, geometry_of(leaf), x, out, epilogue, choice))


def _out(emitter: Emitter, leaf: StaticLeaf, node: fx.Node, element: Element) -> View:
    """A new image for the value of ``node``, which ``leaf`` writes."""
    if len(leaf.weight_shape) == 4:
        return emitter.image(node, element)
    if len(leaf.weight_shape) == 2:
        return rows_of(emitter, emitter.tensor(node, element), str(node))
    batch, channels, width = emitter.size(node)
    line = emitter.program.image(element, (batch, channels, 1, width), Border())
    emitter.values[node] = line.select(2, 0)
    return line


def _choices(emitter: Emitter, node: fx.Node, leaf: StaticLeaf) -> list[Choice]:
    """How the layer is computed: once, or, where it is tuned, in all ways."""
    kernels = [name for name, (takes, _) in KERNELS.items() if takes(leaf, emitter.isa)]
    vary = emitter.vary
    if vary is None or node.name not in vary.layers:
        made = emitter.choices.get(node.name, Choice())
        if made.kernel in (None, *kernels):
            return [replace(made, kernel=made.kernel or kernels[0])]
        return [Choice(kernels[0])]  # the sizes were for another kernel
    if kernels == ["depthwise"]:
        return [Choice("depthwise")]
    parts = [None] if not vary.parts or emitter.program.threads == 1 else [1, emitter.program.threads]
    return [Choice(kernel, scale, split) for kernel in kernels for scale in vary.scales for split in parts]


def _addition(emitter: Emitter, node: fx.Node, leaf: StaticLeaf) -> tuple[fx.Node, fx.Node] | None:
    """The addition of floats that alone reads the layer's float result, and its other operand, if that is there."""
    if leaf.output is not None or leaf.calls or len(node.users) != 1:
        return None
    (user,) = node.users
    if name_of(user) != "add" or len(user.args) != 2 or user.kwargs or len(leaf.weight_shape) != 2:
        return None
    (other,) = [n for n in user.args if n is not node] or [None]
    known = emitter.values.get(other) if isinstance(other, fx.Node) else None
    if not isinstance(known, View) or not isinstance(other, fx.Node):
        return None
    fits = known.element == "float" and known.sizes == emitter.size(node) and known.contiguous
    return (user, other) if fits else None


def _constants(emitter: Emitter, leaf: StaticLeaf) -> tuple[str, str, str]:
    """Bias, with what the data's zero point adds to the sums; scale; and a float bias or null."""
    zero_point = int(leaf.data.zero_point) + flip_of(leaf)
    sums = signed(leaf).long().flatten(1).sum(1)
    bias = -zero_point * sums
    shift = "nullptr"
    if leaf.bias is not None and leaf.integer_bias:
        bias = bias + leaf.bias.long()
    scale = leaf.data.scale * by_output_channel(leaf)
    tile = (1, DEPTHWISE) if is_depthwise(leaf, emitter.isa) else (geometry_of(leaf).groups, emitter.isa.channels)

    def put(values: Tensor) -> str:
        return emitter.program.constant(by_tile(values, *tile))

    if leaf.bias is not None and not leaf.integer_bias:
        shift = put(leaf.bias.float())
    return put(bias.to(torch.int32)), put(scale.float()), shift


CONVOLUTION = Operator(layer_refusal, emit_layer, layer_needs)
LINEAR = Operator(layer_refusal, emit_layer, layer_needs, by_row=True)
