"""Quantization-aware training of a BERT on SST-2: ``python -m qfx.tools.qat_sst2 --data DIR``.

Without ``--model`` the small BERT of ``qfx.models`` is first trained on SST-2 from scratch, over the words of the
training set; with it a Hugging Face directory gives classifier and tokenizer. LayerNorm, Softmax and embeddings stay
float. The dev set is for the table only: whatever is chosen is chosen on held-out training sentences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qfx
from qfx.models import BERT_SMALL, Bert
from qfx.tools.bench_data import file_of
from qfx.tools.bench_figures import need
from qfx.tools.qat_batches import Batch, call
from qfx.tools.qat_case import Case, Tuning, logits_of, train_float, tried_observers
from qfx.tools.qat_loop import Plan, cosine
from qfx.tools.qat_program import float_checkpoint, parser, program
from qfx.tools.qat_recipes import Bits, static_recipe
from qfx.tools.qat_sentences import PAD, Sentence, SentenceBatches, Vocabulary, by_length, held_out, read_sentences

ROWS = 32  # sentences of a batch that is only evaluated


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("qat_sst2", __doc__, bits="8,4/8", epochs=1, batch=32, weight_decay=0.01)
    add = made.add_argument
    add("--model", type=Path, metavar="DIR", help="a Hugging Face directory of a classifier and its tokenizer")
    add("--train-sentences", type=int, metavar="N", help="train on N only")
    add("--held-out", type=int, default=600, metavar="N", help="training sentences that choose the float model")
    add("--max-length", type=int, default=64, metavar="N", help="tokens of a sentence, at most")
    add("--dropout", type=float, default=0.1, metavar="P", help="of the BERT that is trained from scratch")
    add("--forget", type=float, default=0.1, metavar="P", help="words that it is not shown in training")
    add("--float-epochs", type=int, metavar="N", help="of float training; None: 3 from scratch, 0 with --model")
    add("--float-lr", type=float, default=1e-4, help="learning rate of the same")
    add("--embedding-storage", type=int, metavar="BITS", help="keep embeddings in 8 or 4 bits; None: float")
    return made.parse_args(argv)


@dataclass(frozen=True)
class Classifier:
    """A model with what makes its input: ``encode`` gives the ids of every text, ``pad`` the id behind them."""

    name: str
    model: nn.Module
    encode: Callable[[Sequence[str]], list[Tensor]]
    pad: int
    epochs: int
    forget: float = 0.0

    def rows(self, sentences: Sequence[Sentence]) -> tuple[list[Tensor], Tensor]:
        """Ids, int64 ``[L]`` each, and labels, int64 ``[N]``."""
        labels = torch.tensor([s.label for s in sentences], device="cpu")
        return self.encode([s.text for s in sentences]), labels


def from_scratch(train: Sequence[Sentence], given: argparse.Namespace) -> Classifier:
    """The small BERT, untrained, over the words of the training sentences."""
    words = Vocabulary.of(train, max_length=given.max_length)
    torch.manual_seed(0)
    model = Bert(replace(BERT_SMALL, vocab_size=len(words), max_length=given.max_length, dropout=given.dropout))
    model.apply(_initialise)
    return Classifier("bert_small", model, words.encode, PAD, 3, given.forget)


def _initialise(module: nn.Module) -> None:
    """BERT's own: normal with a standard deviation of 0.02, biases zero (Devlin et al., 2018)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def from_directory(folder: Path, max_length: int) -> Classifier:
    """A Hugging Face sequence classifier and its tokenizer.

    Raises:
        Skip: the package transformers is not installed.
    """
    transformers = need("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        ids: list[Any] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        return [torch.tensor(row, device="cpu") for row in ids]

    return Classifier(folder.name, model, encode, int(tokenizer.pad_token_id), 0)


def case_of(given: argparse.Namespace) -> Case:
    """The classifier, trained, with its data.

    Raises:
        Skip: a file is missing, or the package transformers.
    """
    everything = read_sentences(file_of(given.data, "sst2/train.tsv"))
    dev = read_sentences(file_of(given.data, "sst2/dev.tsv"))
    train, chooses = held_out(everything, given.held_out)
    train = train[: given.train_sentences]
    found = from_directory(given.model, given.max_length) if given.model else from_scratch(train, given)
    rows, labels = found.rows(train)
    batches = partial(SentenceBatches, rows, labels, given.batch, pad=found.pad)
    epochs = found.epochs if given.float_epochs is None else given.float_epochs
    if epochs:
        plan = Plan(epochs, cosine, given.clip_norm, early_stop=epochs)
        options = ("float_epochs", "float_lr", "batch", "clip_norm", "train_sentences", "held_out", "max_length")
        train_float(
            found.model,
            batches(0, forget=found.forget),
            Tuning(plan, given.float_lr, 0.01, "adamw"),
            partial(accuracy, batches=by_length(*found.rows(chooses), ROWS, found.pad)),
            checkpoint=float_checkpoint(given, found.name, (*options, "dropout", "forget")),
            what=f"{found.name} float",
        )
    test = by_length(*found.rows(dev), ROWS, found.pad)
    longest = {name: x[-1:] for name, x in test[-1][0].items()}

    def recipe(bits: Bits) -> qfx.Recipe:
        return static_recipe(bits).with_embedding_storage(given.embedding_storage)

    return Case(
        task="SST-2",
        name=found.name,
        model=found.model.eval(),
        metric="accuracy, %",
        rising=True,
        count=len(dev),
        evaluate=partial(accuracy, batches=test),
        calibration=[inputs for inputs, _ in by_length(rows[:512], labels[:512], ROWS, found.pad)],
        batches=batches,
        recipe=recipe,
        lr=lambda bits: 2e-5 if bits.weight == 8 else 5e-5,
        ptq_recipes=lambda bits: tried_observers(recipe(bits)),
        one=longest,
        target=given.target,
    )


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Per cent of rows whose greatest logit is their label's."""
    right = [(logits_of(call(model, inputs)).argmax(1) == labels).sum() for inputs, labels in batches]
    return 100 * int(torch.stack(right).sum()) / sum(len(labels) for _, labels in batches)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    return program(given, case_of, optimizer="adamw", limit=given.train_sentences)


if __name__ == "__main__":
    sys.exit(main())
