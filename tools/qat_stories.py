"""Quantization-aware training of a language model's weights: ``python -m qfx.tools.qat_stories --data DIR``.

The float model stories260K, its linear weights in 4 or 3 bits by plain rounding, and the same after training on other
stories against the float model's logits: the perplexity of each, and how much of plain rounding's gap is left.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from qfx.errors import ConfigError
from qfx.models import load_stories260k
from qfx.recipe import Recipe
from qfx.tools.bench_data import file_of
from qfx.tools.qat_batches import Batch, call
from qfx.tools.qat_case import Case, logits_of
from qfx.tools.qat_program import parser, program
from qfx.tools.qat_recipes import Bits
from qfx.tools.qat_texts import IGNORED, TextBatches, read_texts, text_batch


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("qat_stories", __doc__, bits="4/16,3/16", epochs=4, batch=8, weight_decay=0.0, distill=1.0)
    add = made.add_argument
    add("--group-size", type=int, default=32, metavar="N", help="weights that share a scale")
    add("--test-stories", type=int, default=300, metavar="N", help="the first N are for the perplexity only")
    add("--train-stories", type=int, metavar="N", help="train on the N behind them only")
    add("--length", type=int, default=512, metavar="N", help="tokens of a story, at most, in training")
    return made.parse_args(argv)


def recipe_of(bits: Bits, group_size: int) -> Recipe:
    """Weight-only.

    Raises:
        ConfigError: no such recipe.
    """
    recipes = {Bits(4, None): Recipe.w4a16, Bits(3, None): Recipe.w3a16}
    if bits not in recipes:
        raise ConfigError(f"no recipe of weights only has {bits}", hint="choose --bits 4/16 or 3/16, or both")
    return recipes[bits](group_size)


def case_of(given: argparse.Namespace) -> Case:
    """The model with its stories.

    Raises:
        Skip: a file is missing.
    """
    folder = file_of(given.data, "stories260K")
    file_of(folder, "stories260K.pt")
    texts = read_texts(file_of(folder, "tinystories_tokens.npz"))
    test, rest = texts[: given.test_stories], texts[given.test_stories :][: given.train_stories]
    if not rest:
        raise ConfigError(f"{given.test_stories} stories for the test leave none of {len(texts)} for training")
    rest = [text[: given.length] for text in rest]
    model = load_stories260k(folder)
    batches = by_length(test)
    return Case(
        task="TinyStories",
        name="stories260K",
        model=model,
        metric="perplexity",
        rising=False,
        count=len(test),
        evaluate=partial(perplexity, batches=batches),
        calibration=[text.unsqueeze(0) for text in rest[:32]],
        batches=partial(TextBatches, rest, given.batch),
        lr=lambda bits: 1e-3,
        recipe=partial(recipe_of, group_size=given.group_size),
        ptq_recipes=lambda bits: {"rounding": recipe_of(bits, given.group_size)},
        one=test[0][:-1].unsqueeze(0),
        target=given.target,
    )


def by_length(texts: Sequence[Tensor], size: int = 16) -> list[Batch]:
    """All texts in batches for evaluation, the shortest first."""
    order = sorted(texts, key=len)
    return [text_batch(order[i : i + size]) for i in range(0, len(order), size)]


def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of every token but the first of each text, given those before it."""
    loss, tokens = 0.0, 0
    for inputs, labels in batches:
        logits = logits_of(call(model, inputs)).flatten(0, 1)
        loss += float(F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED))
        tokens += int((labels != IGNORED).sum())
    return math.exp(loss / tokens)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    return program(given, case_of, optimizer="adamw", limit=given.train_stories)


if __name__ == "__main__":
    sys.exit(main())
