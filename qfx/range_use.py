"""How data use the range that integers cover: what is clipped, what is left over, how far out outliers lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qfx import affine

BULK = 0.999
"""The share of values that is called the bulk: a thousandth is what a range may lose without being wrong."""

_SHIFT = 18  # of a float32's bits: its exponent and the first 5 bits of its fraction are left
_BINS = 1 << 31 - _SHIFT


class ValueCounts:
    """The extremes of all values shown, and how many there are of each magnitude.

    Magnitudes are counted in bins of equal relative width, 1/32 of a power of two: deterministic, of one size for any
    number of values, and right within 3 % for any scale of the data.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64)  # of positive values, then of negative ones

    def add(self, x: Tensor) -> None:
        """Count a floating-point tensor of any shape, without NaN and infinity; an empty one changes nothing."""
        if not x.numel():
            return
        x = x.detach().float().reshape(-1)
        low, high = (float(end) for end in x.aminmax())
        first = not self.total
        self.low, self.high = (low, high) if first else (min(self.low, low), max(self.high, high))
        bins = (x.abs().view(torch.int32) >> _SHIFT) + (x < 0) * _BINS
        self.counts += torch.bincount(bins, minlength=2 * _BINS).cpu()

    @property
    def total(self) -> int:
        """How many values were counted, zeros included."""
        return int(self.counts.sum())

    @property
    def extremes(self) -> tuple[float, float]:
        """Lowest and highest value, and zero where they leave it out: integers always cover it."""
        return min(self.low, 0.0), max(self.high, 0.0)

    @property
    def outliers(self) -> float:
        """The greatest magnitude over the magnitude that :data:`BULK` of the values do not exceed; at least 1.

        Exact zeros are left out: no scale rounds them. 1 where nothing else was seen.
        """
        magnitudes = self.counts[:_BINS] + self.counts[_BINS:]
        greatest = max(abs(self.low), abs(self.high))
        found = _quantile(_nonzero(magnitudes), BULK)
        return max(greatest / found, 1.0) if found else 1.0

    def bulk(self) -> tuple[float, float]:
        """The ends between which all values lie but a thousandth at either, extended to zero as ranges are.

        Exact zeros are left out, as in :attr:`outliers`.
        """
        positive, negative = _nonzero(self.counts[:_BINS]), _nonzero(self.counts[_BINS:])
        total = int(positive.sum() + negative.sum())
        tail = int((1.0 - BULK) * total)  # values that may lie beyond each end
        high = _beyond(positive, tail)
        low = -_beyond(negative, tail)
        return max(low, self.extremes[0]), min(high, self.extremes[1])


def _nonzero(counts: Tensor) -> Tensor:
    """The counts without those of zeros, which the first bin holds."""
    return torch.cat([counts.new_zeros(1), counts[1:]])


def _magnitude(index: int) -> float:
    """The middle of a bin."""
    edges = torch.tensor([index << _SHIFT, (index + 1 << _SHIFT) - 1], dtype=torch.int32).view(torch.float32)
    return float(edges.double().mean())


def _quantile(counts: Tensor, share: float) -> float:
    """The magnitude that ``share`` of the counted values do not exceed; 0 where there are none."""
    total = int(counts.sum())
    return _beyond(counts, total - math.ceil(share * total)) if total else 0.0


def _beyond(counts: Tensor, tail: int) -> float:
    """The magnitude that no more than ``tail`` of the counted values exceed; 0 where there are no more than that."""
    above = counts.flip(0).cumsum(0)
    if int(above[-1]) <= tail:
        return 0.0
    place = int(torch.searchsorted(above, tail, right=True))
    return _magnitude(len(counts) - 1 - place)


class RangeUse:
    """What values do with the range ``[low, high]`` of integers from ``quant_min`` to ``quant_max``, per tensor.

    Args:
        scale: float32 ``[]``.
        zero_point: int32 ``[]``.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> None:
        self.scale, offset = float(scale), int(zero_point)
        self.lowest, self.highest = quant_min - offset, quant_max - offset  # in steps
        self.low, self.high = self.lowest * self.scale, self.highest * self.scale
        self.values = ValueCounts()
        self._below = self._above = 0

    def add(self, x: Tensor) -> None:
        """Take in a floating-point tensor of any shape, without NaN and infinity."""
        self.values.add(x)
        steps = x.detach().float() / self.scale
        self._below += int((steps < self.lowest - 0.5).sum())
        self._above += int((steps > self.highest + 0.5).sum())

    @property
    def below(self) -> float:
        """The share of values in [0, 1] that lie more than half a step below the range, and are clipped to its end."""
        return self._below / max(self.values.total, 1)

    @property
    def above(self) -> float:
        """The same of values above the range."""
        return self._above / max(self.values.total, 1)

    @property
    def used(self) -> float:
        """From the lowest to the highest value seen, both extended to zero, in widths of the range.

        1 is all of it, 0.25 means that two bits are never used, and more than 1 that values lie outside.
        """
        low, high = self.values.extremes
        return (high - low) / self._width

    @property
    def drift(self) -> float:
        """How far the bulk of the values reaches beyond the range, in widths of the range.

        The bulk is all but a thousandth of the values at either end, so that single outliers, which a range may leave
        out for good reason, do not count. Of the two ends the one that is farther out counts; negative: both ends are
        inside, the nearer by so much.
        """
        low, high = self.values.bulk()
        return max(self.low - low, high - self.high) / self._width

    @property
    def reach(self) -> float:
        """How much of the range serves outliers: ``values.outliers``, cut where the range ends.

        The greatest magnitude that is not clipped, over that of the bulk.
        """
        greatest = max(abs(self.values.low), abs(self.values.high))
        kept = min(greatest, max(-self.low, self.high))
        return self.values.outliers * kept / greatest if greatest else 1.0

    @property
    def _width(self) -> float:
        return max(self.high - self.low, affine.MIN_SCALE)
