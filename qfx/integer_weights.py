"""What integer weights do with their range: channels that are lost, and values at its ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qfx import affine


@dataclass(frozen=True)
class WeightUse:
    """``zero_channels``: all integers are the zero point, though the scale is not degenerate.

    ``at_ends``: a share of all ``count``. One integer for every scale lies at an end because the scale was chosen by
    it: those do not count, nor do channels all of whose integers lie there, such as signs or a constant.
    """

    zero_channels: tuple[int, ...]
    at_ends: float
    count: int


def weight_use(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, *, bits: int, channels: int
) -> WeightUse:
    """Look at the integers ``q`` of any shape, with scale and zero point as in :mod:`qfx.affine`.

    A scale at its smallest, :data:`qfx.affine.MIN_SCALE` or float16's, belongs to a channel that was zero in float too.

    Args:
        bits: of an element; int8 and uint8 may hold fewer.
        channels: the axis of the output channels.
    """
    offset = affine.expand_qparam(zero_point, q, axis, group_size)
    steps = affine.expand_qparam(scale, q, axis, group_size)
    least = affine.representable_scale(scale.new_tensor(affine.MIN_SCALE), torch.float16)
    zero, nothing = (_all(t, q, channels) for t in (q == offset, (steps <= affine.MIN_SCALE) | (steps == least)))
    lost = torch.nonzero(zero & ~nothing).flatten().tolist()
    return WeightUse(tuple(lost), _at_ends(q, scale.numel(), bits, channels), q.numel())


def _all(condition: Tensor, q: Tensor, channels: int) -> Tensor:
    """For every channel, whether the condition holds throughout: bool ``[C]``."""
    return condition.expand(q.shape).movedim(channels, 0).flatten(1).all(1)


def _at_ends(q: Tensor, scales: int, bits: int, channels: int) -> float:
    signed = q.dtype is torch.int8
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    # A signed range may leave out its lowest integer, so that the next one is its end.
    at_end = (q <= lowest + signed) | (q >= highest)
    at_end = at_end & ~_all(at_end, q, channels).reshape([-1 if d == channels else 1 for d in range(q.ndim)])
    return max(int(at_end.sum()) - scales * (1 if signed else 2), 0) / max(q.numel(), 1)
