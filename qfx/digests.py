"""Short digests of data: enough to recognise what was seen before, too little to tell what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

MOST = 256
"""Samples that are remembered: a model carries no more than a few kilobytes of them."""

_BYTES = 4096  # of a tensor that go into its digest, drawn from all of it at equal distances


def rows_of(tensors: Iterable[Tensor]) -> int:
    """The samples of a call: the rows of its first tensor that has any dimension, or 1."""
    return next((len(t) for t in tensors if t.ndim), 1)


def digests_of(tensors: Iterable[Tensor], most: int = MOST) -> tuple[str, ...]:
    """A digest of 16 hex digits for each of the first ``most`` samples of a call, whatever batch they come in.

    A sample is one row of every tensor with as many rows as the first; other tensors belong to each sample. It does
    not matter in which order the tensors are given, where the first has as many rows.
    """
    tensors = list(tensors)
    rows = rows_of(tensors)
    return tuple(_digest([t[i] if t.ndim and len(t) == rows else t for t in tensors]) for i in range(min(rows, most)))


def _digest(tensors: list[Tensor]) -> str:
    return hashlib.blake2b(b"".join(sorted(map(_content, tensors))), digest_size=8).hexdigest()


def _content(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, -(-flat.numel() * flat.element_size() // _BYTES))
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    if flat.numel():
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.digest()
