"""uint8 x int8 kernels that cannot saturate, for CPUs without VNNI.

There, oneDNN adds two products of a uint8 and an int8 in int16 (``vpmaddubsw``), which saturates where
``x1 * w1 + x2 * w2`` leaves it. Which two weights meet depends on the kernel's layout, so the bound takes the worst two
of each output channel. A layer that breaks it is computed as the sum of two with weights half as large: exact.
Source of the effect: oneDNN developer guide, "Nuances of int8 computations".
"""

from __future__ import annotations

import torch
from torch import Tensor

INT16_MIN, INT16_MAX = -(1 << 15), (1 << 15) - 1


def may_saturate(weight: Tensor, quant_max: int) -> bool:
    """True if a pair sum of some output channel could leave int16.

    Args:
        weight: int8 of ``[O, ...]``.
        quant_max: the largest value of the activations as uint8.
    """
    rows = weight.flatten(1)
    rows = torch.nn.functional.pad(rows, (0, max(0, 2 - rows.shape[1])))  # a lone product is added to zero
    if rows.numel() == 0:
        return False
    values = rows.to(torch.int32)
    most = values.topk(2, dim=1).values.sum(1).amax()
    least = -(-values).topk(2, dim=1).values.sum(1).amax()
    return bool(quant_max * most > INT16_MAX) or bool(quant_max * least < INT16_MIN)


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two int8 weights within [-64, 64] whose sum is ``weight``: ``255 * (64 + 64)`` fits into int16."""
    first = weight >> 1
    return first, weight - first
