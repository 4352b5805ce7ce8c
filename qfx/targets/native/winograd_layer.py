"""Layers by ``winograd.h``."""

from __future__ import annotations

from qfx.targets.native.isa import Isa
from qfx.targets.native.layer import Geometry, Layer, geometry_of
from qfx.targets.native.packing import pack_winograd
from qfx.targets.x86_static import StaticLeaf

SQUARES_BYTES = 192 * 1024
"""Transformed data stay in the second-level cache, beside the weights of a tile."""


def uses_winograd(leaf: StaticLeaf, isa: Isa) -> bool:
    """True where the transform is exact, and saves more products than it costs."""
    outputs, inputs, *_ = leaf.weight_shape
    fits = geometry_of(leaf) == Geometry((3, 3), padding=geometry_of(leaf).padding)
    return isa.wide and fits and inputs % 16 == 0 and 32 <= inputs <= 1024 and outputs >= 16


def emit_winograd(layer: Layer) -> None:
    program, isa = layer.program, layer.isa
    outputs, inputs = layer.leaf.weight_shape[:2]
    squares = -(-layer.out.sizes[2] // 2) * -(-layer.out.sizes[3] // 2)
    rows = layer.block(min(SQUARES_BYTES // (inputs * 32), 96), squares, isa.rows)
    parts = layer.parts(-(-squares // rows), -(-outputs // isa.channels))
    fields = f"{{{layer.images}, {layer.first}, {inputs}, {outputs}, {rows}, {parts}, {layer.flip}}}"
    conv = program.declare("Winograd", "conv", fields)
    constant, _ = layer.packed("winograd", lambda: (pack_winograd(layer.weight, isa), 0))
    call = f"conv_winograd(team, {conv}, n, {layer.data}, {constant}, epilogue, scratch);"
    layer.add(call, "winograd.h", f"{isa.name} winograd", f"winograd_scratch({conv})")
