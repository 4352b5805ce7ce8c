"""Random example inputs that a seed decides; the global random state is neither read nor written."""

from __future__ import annotations

import torch
from torch import Tensor


def random_images(size: int, *, batch: int = 1, channels: int = 3, seed: int = 0) -> Tensor:
    """Normalised images, float32 ``[batch, channels, size, size]``: standard normal pixels."""
    return torch.randn(batch, channels, size, size, generator=_generator(seed), device="cpu")


def random_tokens(length: int, vocab_size: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Token ids, int64 ``[batch, length]``, uniform in ``[0, vocab_size)``."""
    return torch.randint(vocab_size, (batch, length), generator=_generator(seed), device="cpu")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
