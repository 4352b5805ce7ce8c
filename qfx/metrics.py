"""How far a quantized result is from the float one: pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``20 * log10(|x| / |x - y|)``; higher is better, inf where equal.

    Tensors of one shape and any numeric dtype; the norms are taken in float64. A zero reference with noise is -inf.
    """
    x, y = reference.detach().double(), actual.detach().double()
    signal, noise = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(x - y))
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 20.0 * math.log10(signal / noise)


def cosine(reference: Tensor, actual: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors, in [-1, 1]; 1 where both are zero."""
    x, y = reference.detach().double().flatten(), actual.detach().double().flatten()
    norms = float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    if norms == 0.0:
        return 1.0 if torch.equal(x, y) else 0.0
    return float(torch.dot(x, y)) / norms


def top1_agreement(reference: Tensor, actual: Tensor) -> float:
    """Share of rows (last axis = classes) on which both tensors have the same largest entry, in [0, 1]."""
    return float((reference.argmax(-1) == actual.argmax(-1)).double().mean())
