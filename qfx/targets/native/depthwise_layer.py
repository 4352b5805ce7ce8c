"""Layers by ``depthwise.h``."""

from __future__ import annotations

from qfx.targets.native.isa import Isa
from qfx.targets.native.layer import Layer
from qfx.targets.native.packing import pack_depthwise
from qfx.targets.native.panel_layer import declare_offsets
from qfx.targets.x86_static import StaticLeaf

_MOST = 7
"""Height and width of the windows that are computed several at once: the code for them is unrolled."""


def is_depthwise(leaf: StaticLeaf, isa: Isa) -> bool:
    """True for a convolution whose groups have one channel in and one out."""
    return len(leaf.weight_shape) == 4 and 1 < leaf.args[3] == leaf.weight_shape[0] and leaf.weight_shape[1] == 1


def emit_depthwise(layer: Layer) -> None:
    program = layer.program
    row, pixel = layer.x.strides[2:]
    (height, width), (down, across), (_, stride) = layer.geometry.kernel, layer.geometry.dilation, layer.geometry.stride
    side_by_side = 2 <= height <= _MOST and 2 <= width <= _MOST and across == 1 and stride <= 2
    taps = _by_rows(height, width) if side_by_side else _in_order(height * width)
    windows = f"Windows<{height}, {width}, {stride}>{{}}" if side_by_side else "Windows<0, 0, 0>{}"
    places = (divmod(tap or 0, width) for tap in taps)
    offsets = declare_offsets(program, [y * down * row + x * across * pixel for y, x in places])
    down_step, across_step = layer.steps
    fields = f"{{{layer.images}, {down_step}, {across_step}, {layer.first}, {offsets}, {len(taps)}, {layer.flip}}}"
    conv = program.declare("Depthwise", "conv", fields)
    constant = program.constant(pack_depthwise(layer.weight, taps))
    call = f"conv_depthwise<Dot>(team, {windows}, {conv}, n, {layer.data}, {constant}, epilogue);"
    layer.add(call, "depthwise.h", "depthwise")


def _by_rows(height: int, width: int) -> list[int | None]:
    """Pairs of one column and two rows; where the last row is alone, beside nothing."""
    pairs = [(y * width + x, (y + 1) * width + x) for y in range(0, height, 2) for x in range(width)]
    return [tap if tap < height * width else None for pair in pairs for tap in pair]


def _in_order(taps: int) -> list[int | None]:
    return [*range(taps), *[None] * (taps % 2)]
