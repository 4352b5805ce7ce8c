"""Minibatches as a pure function of seed, epoch and position, so that training can go on from anywhere.

A loader that draws from a running generator would have to be wound forward to the place of an interruption. Here every
permutation and every augmentation has a generator of its own, seeded by what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

# What the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), and the labels.
Batch = tuple[Any, Tensor]


class Batches(Protocol):
    """The training data: ``epoch(n)`` gives the same batches whenever it is asked, as many for every ``n``."""

    def epoch(self, number: int) -> Epoch: ...


@dataclass(frozen=True)
class Epoch:
    """The ``length`` batches of one epoch, each made when it is asked for by its position."""

    length: int
    make: Callable[[int], Batch]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Batch:
        if not 0 <= position < self.length:
            raise IndexError(position)
        return self.make(position)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.make, range(self.length))


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on ``inputs``, a tensor, a tuple, or a dict of keywords; gradients as they are."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*((inputs,) if isinstance(inputs, Tensor) else inputs))


def generator(*key: int) -> torch.Generator:
    """A generator that ``key`` decides; keys that differ in one place give unrelated numbers."""
    # Its length too: zeros at the end of a seed sequence change nothing.
    words = np.random.SeedSequence((len(key), *key)).generate_state(2, np.uint32)
    return torch.Generator("cpu").manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def shuffled(count: int, *key: int) -> Tensor:
    """A permutation of ``count`` rows, int64."""
    return torch.randperm(count, generator=generator(*key))


def bucketed(lengths: Tensor, size: int, *key: int, window: int = 50) -> Sequence[Tensor]:
    """Random batches of at most ``size`` rows of like length, so that little is spent on padding.

    The rows are shuffled, each window of ``window`` batches is sorted by length and cut, and the batches are shuffled.
    ``lengths`` is int ``[N]``; returns ``ceil(N / size)`` index tensors.
    """
    rows = shuffled(len(lengths), *key, 0)
    parts = [part[lengths[part].argsort(stable=True)] for part in rows.split(window * size)]
    batches = [batch for part in parts for batch in part.split(size)]
    return [batches[i] for i in shuffled(len(batches), *key, 1).tolist()]


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """1-d tensors as the rows of one, as long as the longest, filled up behind with ``value``."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
