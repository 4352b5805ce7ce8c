"""SST-2: sentences with a label, as ids of words, in batches of like length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qfx.errors import ConfigError
from qfx.tools.qat_batches import Batch, Epoch, bucketed, generator, padded, shuffled

PAD, UNKNOWN, FIRST = 0, 1, 2
SPECIAL = ("<pad>", "<unk>", "[CLS]")


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int


def read_sentences(path: Path) -> list[Sentence]:
    """The rows of a file with a header line and, on each line, a sentence, a tab and a label.

    Raises:
        ConfigError: a line is not of this form; the text names it.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        text, tab, label = line.rpartition("\t")
        if not tab or not label.isdigit():
            raise ConfigError(f"{path}, line {number} is no sentence, tab and label: {line[:60]!r}")
        found.append(Sentence(text.strip(), int(label)))
    return found


def held_out(
    sentences: Sequence[Sentence], count: int, *, least: int = 12, seed: int = 0
) -> tuple[list[Sentence], list[Sentence]]:
    """Training and validation sentences, without a word sequence in common.

    The file holds sentences and phrases that were cut out of them: a random split would validate on what was trained.
    ``count`` sentences of at least ``least`` words are drawn, and whatever is part of one of them leaves the training
    set. Returns what is left, and the drawn ones.
    """
    long = [i for i, s in enumerate(sentences) if len(s.text.split()) >= least]
    drawn = {long[i] for i in shuffled(len(long), seed).tolist()[:count]}
    parts = {part for i in drawn for part in _parts(sentences[i].text.split())}
    rest = [s for s in sentences if s.text not in parts]
    return rest, [sentences[i] for i in sorted(drawn)]


def _parts(words: Sequence[str]) -> Iterable[str]:
    """Every run of words, the whole too."""
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield " ".join(words[start:stop])


@dataclass(frozen=True)
class Vocabulary:
    """Words and their ids; what is not in it is ``<unk>``. ``max_length`` ids at most, the first one ``[CLS]``."""

    ids: dict[str, int]
    max_length: int

    @classmethod
    def of(cls, sentences: Iterable[Sentence], *, max_length: int, least: int = 2) -> Vocabulary:
        """All words that occur at least ``least`` times: the rarest teach what an unknown word means."""
        counts = Counter(word for s in sentences for word in s.text.split())
        words = sorted(word for word, count in counts.items() if count >= least)
        return cls({word: i for i, word in enumerate((*SPECIAL, *words))}, max_length)

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """The ids of every text, int64 ``[L]`` each."""
        rows = [[FIRST, *(self.ids.get(word, UNKNOWN) for word in text.split())] for text in texts]
        return [torch.tensor(row[: self.max_length], device="cpu") for row in rows]


@dataclass(frozen=True)
class SentenceBatches:
    """Batches of like length: ``input_ids`` and ``attention_mask``, int64 ``[N, L]``, and labels, int64 ``[N]``.

    ``forget`` is the share of words that become ``<unk>``, other ones in every epoch: against learning by heart.
    """

    rows: Sequence[Tensor]
    labels: Tensor
    size: int
    seed: int
    pad: int = PAD
    forget: float = 0.0

    def epoch(self, number: int) -> Epoch:
        order = bucketed(torch.tensor([len(row) for row in self.rows], device="cpu"), self.size, self.seed, number)

        def make(position: int) -> Batch:
            picked = order[position]
            inputs = inputs_of([self.rows[i] for i in picked.tolist()], self.pad)
            if self.forget:
                ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
                drawn = torch.rand(ids.shape, generator=generator(self.seed, number, position), device="cpu")
                lost = (drawn < self.forget) & mask
                lost[:, 0] = False
                inputs["input_ids"] = ids.masked_fill(lost, UNKNOWN)
            return inputs, self.labels[picked]

        return Epoch(len(order), make)


def inputs_of(rows: Sequence[Tensor], pad: int = PAD) -> dict[str, Tensor]:
    """A call of a BERT with these rows, padded behind to the longest and masked there."""
    return {
        "input_ids": padded(rows, pad),
        "attention_mask": padded([torch.ones_like(row) for row in rows], 0),
    }


def by_length(rows: Sequence[Tensor], labels: Tensor, size: int, pad: int = PAD) -> list[Batch]:
    """All rows in batches for evaluation, the shortest first."""
    order = torch.tensor([len(row) for row in rows], device="cpu").argsort(stable=True)
    return [(inputs_of([rows[i] for i in part.tolist()], pad), labels[part]) for part in order.split(size)]
