"""Layers by ``conv.h``: any geometry, in every instruction set."""

from __future__ import annotations

from qfx.targets.native.layer import Layer
from qfx.targets.native.packing import pack_panel
from qfx.targets.native.program import Program

PANEL_BYTES = 64 * 1024
"""A panel stays in the second-level cache, beside the weights of a tile."""


def emit_panel(layer: Layer) -> None:
    program, isa, weight = layer.program, layer.isa, layer.weight
    groups, tiles = layer.geometry.groups, -(-weight.shape[0] // layer.geometry.groups // isa.channels)
    packed, depth = layer.packed("panel", lambda: pack_panel(weight.permute(0, 2, 3, 1).flatten(1), groups, isa))
    rows = panel_rows(layer, depth)
    blocks = -(-layer.positions // rows) * groups
    runs, length = layer.window()
    value = conv_struct(layer, runs, length, depth, rows, layer.parts(blocks, tiles))
    conv = program.declare("Conv", "conv", value)
    call = f"conv<Dot>(team, {conv}, n, {layer.data}, {packed}, epilogue, scratch);"
    layer.add(call, "conv.h", f"{isa.name} panel", f"PanelScratch<Dot>::size({conv})")


def panel_rows(layer: Layer, depth: int) -> int:
    """Output positions of a panel."""
    return layer.block(PANEL_BYTES // (depth * 2 + 256), layer.positions, layer.isa.rows)


def conv_struct(layer: Layer, runs: list[int], length: int, depth: int, rows: int, parts: int) -> str:
    """A C++ ``Conv``."""
    outputs, inputs = layer.leaf.weight_shape[:2]
    groups = layer.geometry.groups
    offsets = declare_offsets(layer.program, runs)
    return (
        f"{{{layer.images}, {layer.steps[0]}, {layer.steps[1]}, {layer.first}, "
        f"{offsets}, {len(runs)}, {length}, {depth}, {groups}, {outputs // groups}, "
        f"{inputs}, {rows}, {parts}, {layer.flip}}}"
    )


def declare_offsets(program: Program, offsets: list[int]) -> str:
    return program.declare("int32_t", "offsets", f"[] = {{{', '.join(map(str, offsets))}}}")
