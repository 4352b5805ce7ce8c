"""Stories as token ids, in batches of like length, for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qfx.tools.qat_batches import Batch, Epoch, bucketed, padded

IGNORED = -100


def read_texts(path: Path) -> list[Tensor]:
    """All texts, int64 ``[L]`` each, of an npz of ``tokens`` and ``offset`` ``[N + 1]``."""
    with np.load(path) as file:
        tokens, offset = torch.from_numpy(file["tokens"].astype(np.int64)), file["offset"].tolist()
    return [tokens[start:stop] for start, stop in pairwise(offset)]


@dataclass(frozen=True)
class TextBatches:
    """Tokens, int64 ``[N, L]``, and the ones behind them as labels, ``IGNORED`` where a text has ended.

    ``texts`` are int64 ``[L]`` each, of two tokens at least. A causal model needs no mask: padding stands behind.
    """

    texts: Sequence[Tensor]
    size: int
    seed: int

    def epoch(self, number: int) -> Epoch:
        order = bucketed(torch.tensor([len(t) for t in self.texts], device="cpu"), self.size, self.seed, number)
        return Epoch(len(order), lambda position: text_batch([self.texts[i] for i in order[position].tolist()]))


def text_batch(texts: Sequence[Tensor]) -> Batch:
    """Texts as one call of a language model, and its labels."""
    return padded([t[:-1] for t in texts], 0), padded([t[1:] for t in texts], IGNORED)
