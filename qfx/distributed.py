"""What ranks of a ``torch.distributed`` job must agree on: the range of the joint batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def joint_extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The extremes over all ranks, of the shape given; the same tensors where there is one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return low, high
    both = torch.stack([-low, high])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0], both[1]


def joint_mean(values: Tensor) -> Tensor:
    """The mean over all ranks; the same tensor where there is one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
