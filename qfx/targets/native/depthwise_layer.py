"""Layers by ``depthwise.h``."""

from __future__ import annotations

from qfx.targets.native.isa import Isa
from qfx.targets.native.layer import Layer
from qfx.targets.native.packing import pack_depthwise
from qfx.targets.native.panel_layer import declare_offsets
from qfx.targets.x86_static import StaticLeaf


def is_depthwise(leaf: StaticLeaf, isa: Isa) -> bool:
    """True for a convolution whose groups have one channel in and one out."""
    return len(leaf.weight_shape) == 4 and 1 < leaf.args[3] == leaf.weight_shape[0] and leaf.weight_shape[1] == 1


def emit_depthwise(layer: Layer) -> None:
    program = layer.program
    row, pixel = layer.x.strides[2:]
    (height, width), (down, across) = layer.geometry.kernel, layer.geometry.dilation
    taps = [y * down * row + x * across * pixel for y in range(height) for x in range(width)]
    taps += taps[-1:] * (len(taps) % 2)
    offsets = declare_offsets(program, taps)
    down_step, across_step = layer.steps
    fields = f"{{{layer.images}, {down_step}, {across_step}, {layer.first}, {offsets}, {len(taps)}, {layer.flip}}}"
    conv = program.declare("Depthwise", "conv", fields)
    constant = program.constant(pack_depthwise(layer.weight))
    call = f"conv_depthwise<Dot>(team, {conv}, n, {layer.data}, {constant}, epilogue);"
    layer.add(call, "depthwise.h", "depthwise")
