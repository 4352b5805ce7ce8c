"""Weights in the order in which the kernels of ``csrc/native`` read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qfx.targets.native.isa import Isa

DEPTHWISE = 16
"""Channels that ``depthwise.h`` computes at a time."""


def pack_panel(weight: Tensor, groups: int, isa: Isa) -> tuple[Tensor, int]:
    """Weights for ``conv.h``.

    Args:
        weight: int8, ``[O, K]``, the elements of a window in the order of the panel.
        groups: of output channels.

    Returns:
        int8 ``[groups, tiles, depth / unit, channels, unit]`` and ``depth``, K rounded up to the unit.
    """
    outputs, length = weight.shape
    depth = -(-length // isa.unit) * isa.unit
    by_tile = _tiles(weight.reshape(groups, outputs // groups, length), isa.channels)
    filled = torch.nn.functional.pad(by_tile, (0, depth - length))
    return filled.unflatten(-1, (depth // isa.unit, isa.unit)).transpose(2, 3).contiguous(), depth


def pack_amx(weight: Tensor, runs: int, isa: Isa) -> tuple[Tensor, int]:
    """Weights for ``conv_amx.h``: as for a panel, each of the ``runs`` of a window filled to whole tiles of 64 bytes.

    ``weight``: int8 ``[O, K]``. A tile of weights is 16 rows of 64 bytes in every other line of ``[depth / 4, 32, 4]``.
    """
    by_run = weight.unflatten(1, (runs, -1))
    filled = torch.nn.functional.pad(by_run, (0, -by_run.shape[2] % 64))
    return pack_panel(filled.flatten(1), 1, isa)


def pack_winograd(weight: Tensor, isa: Isa) -> Tensor:
    """The kernel's transform for ``winograd.h``, four times the usual one: int16 ``[tiles, 16, C / 2, channels, 2]``.

    ``weight``: int8 ``[O, C, 3, 3]``. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016:
    G g G^T with G doubled.
    """
    transform = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float32)
    both = torch.kron(transform, transform)  # G g G^T of the nine elements of g; floats this small are exact integers
    points = (both @ weight.flatten(2).flatten(0, 1).float().T).unflatten(1, weight.shape[:2])
    tiles: Tensor = _tiles(points.to(torch.int16), isa.channels).transpose(0, 1).unflatten(-1, (-1, 2))
    return tiles.transpose(2, 3).contiguous()


def pack_depthwise(weight: Tensor, taps: Sequence[int | None]) -> Tensor:
    """Weights for ``depthwise.h``: int16 ``[blocks, taps / 2, 16, 2]``.

    Of 16 channels, 4 to 7 and 8 to 11 change places: so does interleaving two vectors of 256 bits.

    ``weight``: int8 ``[C, 1, kh, kw]``; ``taps``: an even number of places in ``kh * kw``, None for a zero.
    """
    by_channel = weight.flatten(1).to(torch.int16)
    channels, none = by_channel.shape
    filled = torch.nn.functional.pad(by_channel, (0, 1, 0, -channels % DEPTHWISE))
    ordered = filled[:, [none if tap is None else tap for tap in taps]]
    blocks: Tensor = ordered.reshape(-1, DEPTHWISE, len(taps) // 2, 2).unflatten(1, (2, 2, 4))
    return blocks.transpose(1, 2).flatten(1, 3).transpose(1, 2).contiguous()


def by_tile(values: Tensor, groups: int, channels: int) -> Tensor:
    """``[O]`` filled with zeros to whole tiles of ``channels`` within each group, flat."""
    return _tiles(values.reshape(groups, -1, 1), channels).flatten()


def _tiles(rows: Tensor, channels: int) -> Tensor:
    """``[G, O, K]`` to ``[G, tiles, channels, K]``, filled with zeros."""
    missing = -rows.shape[1] % channels
    tiles: Tensor = torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(1, (-1, channels))
    return tiles
