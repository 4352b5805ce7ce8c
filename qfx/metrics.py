"""How far a quantized result is from the float one: pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qfx.errors import ConfigError


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``20 * log10(|x| / |x - y|)``; higher is better, inf where equal.

    Tensors of one shape and any numeric dtype; the norms are taken in float64. A zero reference with noise is -inf,
    and so is infinite noise on a finite reference; a NaN in either gives NaN.

    Raises:
        ConfigError: the shapes differ.
    """
    if reference.dtype == actual.dtype == torch.float32 and reference.shape == actual.shape:
        x, y = reference.detach(), actual.detach()  # a difference of neighbours is exact: no float64 copies are needed
    else:
        x, y = _pair(reference, actual)
    signal, noise = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (x, x - y))
    if noise == 0.0:
        return math.inf
    if math.isnan(noise):
        return math.nan
    if signal == 0.0 or math.isinf(noise):
        return -math.inf
    return 20.0 * (math.log10(signal) - math.log10(noise))


def cosine(reference: Tensor, actual: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors, in [-1, 1]; 1 where both are zero, 0 where one is.

    Raises:
        ConfigError: the shapes differ.
    """
    x, y = (t.flatten() for t in _pair(reference, actual))
    norms = float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    if norms == 0.0:
        return 1.0 if torch.equal(x, y) else 0.0
    ratio = float(torch.dot(x, y)) / norms
    return ratio if math.isnan(ratio) else min(max(ratio, -1.0), 1.0)


def top1_agreement(reference: Tensor, actual: Tensor) -> float:
    """Share of rows (last axis = classes) on which both tensors have the same largest entry, in [0, 1]."""
    return float((reference.argmax(-1) == actual.argmax(-1)).double().mean())


def _pair(reference: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != actual.shape:
        raise ConfigError(
            f"cannot compare tensors of shapes {list(reference.shape)} and {list(actual.shape)}",
            hint="compare tensors of one shape: broadcasting would hide a mistake",
        )
    return reference.detach().double(), actual.detach().double()
