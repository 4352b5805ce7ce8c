"""What ranks of a ``torch.distributed`` job must agree on: the range of the joint batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def joint_extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The extremes over all ranks, of the shape given; the same tensors where there is one rank.

    Every rank has to call it; one without data gives ``inf`` and ``-inf``.
    """
    if not several_ranks():
        return low, high
    both = torch.stack([-low, high])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0], both[1]


def joint_mean(values: Tensor) -> Tensor:
    """The mean over all ranks whose values are finite, NaN where none are; the same tensor where there is one rank.

    Every rank has to call it.
    """
    if not several_ranks():
        return values
    known = torch.isfinite(values).all()
    total = torch.stack([values.nan_to_num() * known, torch.ones_like(values) * known])
    dist.all_reduce(total)
    return total[0] / total[1]
