"""Real batch-norm statistics for models that were never trained.

With the initial statistics (mean 0, variance 1) the activations of a random network shrink from layer to layer down to
denormal numbers, which are slow and mean nothing. One pass in which batch norm normalises by its batch keeps every
layer at unit variance and leaves the statistics that make evaluation do the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_MOST, _LEAST = 16, 4
_NUMBERS = 2**19  # of inputs: four images of 224 x 224 give each channel of the last stage some two hundred values


@torch.no_grad()
def settle_batch_norm(
    model: M,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> M:
    """Replace the running statistics of every batch norm by those of one random batch; return ``model`` in eval mode.

    ``example`` is what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
    Floating-point inputs are drawn from a standard normal distribution at the example's shape, dtype and device, with
    ``batch_size`` as leading size (None: 16, of large inputs fewer, but 4 at least); the first row of any other input
    is repeated. Only batch norm runs in train mode, so dropout draws nothing, and the global random state stays as it
    was. Momentum keeps its value.

    Raises ``ValueError`` for a ``batch_size`` below 2, of which no variance can be taken.
    """
    several = example.values() if isinstance(example, Mapping) else example
    inputs = (example,) if isinstance(example, Tensor) else tuple(several)
    if batch_size is None:
        batch_size = _enough(inputs)
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}: a variance needs at least 2 examples")
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches, without a trace of the initial values
            norm.train()
        batch = [_batch(x, batch_size, generator) for x in inputs]
        if isinstance(example, Mapping):
            model(**dict(zip(example, batch, strict=True)))
        else:
            model(*batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return model


def _enough(inputs: Sequence[Tensor]) -> int:
    """How many examples give every channel's variance enough values."""
    numbers = max((x[:1].numel() for x in inputs if x.is_floating_point()), default=0)
    return max(_LEAST, min(_MOST, _NUMBERS // numbers)) if numbers else _MOST


def _batch(example: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if example.is_floating_point():
        drawn = torch.randn(size, *example.shape[1:], generator=generator, device="cpu").to(example)
        # Convolutions and batch norms keep the channels last, where CPUs take three quarters of the time.
        return drawn.contiguous(memory_format=torch.channels_last) if drawn.dim() == 4 else drawn
    return example[:1].expand(size, *example.shape[1:])
