"""Layers by ``conv_amx.h``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qfx.targets.native.isa import Isa
from qfx.targets.native.layer import Layer
from qfx.targets.native.packing import pack_amx
from qfx.targets.native.panel_layer import conv_struct, panel_rows
from qfx.targets.x86_static import StaticLeaf

ROWS, DEPTH, BLOCK = 16, 64, 32
"""Positions and depth of a tile; positions of a block."""
CHUNK_BYTES = 512 * 1024
"""The data of a chunk stay in the second-level cache, beside the weights of a tile."""
CHUNK = 1024
"""The most positions of a chunk: of each is known where its results go."""
GATHERED = 4
"""What copying 64 bytes of a window costs, counted in products of a row of a tile by 16 channels, a cycle each: a load,
a store, and that a panel is many times as large as the image, so that tiles come from the second-level cache."""


@dataclass(frozen=True)
class Lines:
    """Stretches of output positions whose windows are ``distance`` elements apart: the fields of the C++ ``ConvAmx``.

    ``work``: positions that are computed for one that is wanted.
    """

    line: str
    distance: int = 0
    pitch: int = 0
    work: float = 1.0


def uses_tiles(leaf: StaticLeaf, isa: Isa) -> bool:
    """True where the CPU has tiles; groups would leave them mostly empty."""
    return isa.tiles and (len(leaf.weight_shape) == 2 or leaf.args[3] == 1)


def emit_amx(layer: Layer) -> None:
    program = layer.program
    lines = lines_of(layer)
    runs, length = layer.window()
    weight = layer.weight.permute(0, 2, 3, 1).flatten(1)
    stretches = len(runs) if lines.line != "kNone" else 1
    packed, depth = layer.packed("amx", lambda: pack_amx(weight, stretches, layer.isa))
    tiles = -(-weight.shape[0] // layer.isa.channels)
    per_position = depth + DEPTH
    if lines.line != "kNone":
        length = depth // len(runs)
        per_position = -(-layer.x.strides[0] // layer.positions)
    chunk = max(BLOCK, layer.scaled(min(CHUNK, CHUNK_BYTES // per_position)) // BLOCK * BLOCK)
    conv = conv_struct(layer, runs, length, depth, panel_rows(layer, depth), layer.parts(1, tiles))
    amx = program.declare(
        "ConvAmx", "conv", f"{{{conv}, Line::{lines.line}, {lines.distance}, {lines.pitch}, {chunk}}}"
    )
    call = f"conv_amx(team, {amx}, n, {layer.data}, {packed}, epilogue, scratch);"
    layer.add(call, "conv_amx.h", f"{layer.isa.name} tile", f"amx_scratch({amx})")


def lines_of(layer: Layer) -> Lines:
    """How the data of a layer are read with the least work."""
    runs, length = layer.window()
    tiles = 2 * -(-layer.leaf.weight_shape[0] // layer.isa.channels)
    pieces = len(runs) * -(-length // DEPTH)
    gathered = _rounded(layer.positions) / layer.positions * tiles * -(-len(runs) * length // DEPTH) + GATHERED * pieces
    found = [] if layer.flip else [lines for lines in _candidates(layer) if lines.work * tiles * pieces <= gathered]
    return min(found, key=lambda lines: lines.work, default=Lines("kNone"))


def _rounded(positions: int) -> int:
    return -(-positions // ROWS) * ROWS


def _candidates(layer: Layer) -> Iterator[Lines]:
    height, width = layer.out.sizes[2:]
    down, across = layer.steps
    if width >= ROWS:
        yield Lines("kRow", across, width, _rounded(width) / width)
    distance, pitch = across, width
    if width == 1:
        distance = down if height > 1 else layer.x.strides[0]
    elif height > 1:
        pitch = down // across
        if down % across or pitch < width:
            return
    positions = (height - 1) * pitch + width
    if positions >= ROWS:
        yield Lines("kImage", distance, pitch, _rounded(positions) / layer.positions)
    if layer.x.strides[0] == height * pitch * distance:
        yield Lines("kAll", distance, pitch, pitch / width)
