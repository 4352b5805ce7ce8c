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


@torch.no_grad()
def settle_batch_norm(
    model: M,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> M:
    """Replace the running statistics of every batch norm by those of one random batch; return ``model`` in eval mode.

    ``example`` is what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
    Floating-point inputs are drawn from a standard normal distribution at the example's shape, dtype and device, with
    ``batch_size`` as leading size; the first row of any other input is repeated. Only batch norm runs in train mode,
    so dropout draws nothing, and the global random state stays as it was. Momentum keeps its value.

    Raises ``ValueError`` for a ``batch_size`` below 2, of which no variance can be taken.
    """
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
        if isinstance(example, Mapping):
            model(**{name: _batch(x, batch_size, generator) for name, x in example.items()})
        else:
            inputs = (example,) if isinstance(example, Tensor) else example
            model(*(_batch(x, batch_size, generator) for x in inputs))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return model


def _batch(example: Tensor, size: int, generator: torch.Generator) -> Tensor:
    if example.is_floating_point():
        return torch.randn(size, *example.shape[1:], generator=generator, device="cpu").to(example)
    return example[:1].expand(size, *example.shape[1:])
