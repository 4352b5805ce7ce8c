"""The data of the worked cases: batches that any process makes alike, augmentation, words, texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qfx
from qfx.tools.bench_data import normalised
from qfx.tools.qat_batches import Epoch, bucketed, generator, padded, shuffled
from qfx.tools.qat_images import PAD, ImageBatches, augmented
from qfx.tools.qat_sentences import (
    FIRST,
    UNKNOWN,
    Sentence,
    SentenceBatches,
    Vocabulary,
    by_length,
    held_out,
    read_sentences,
)
from qfx.tools.qat_texts import IGNORED, TextBatches, read_texts, text_batch


def rows_of(lengths: list[int]) -> list[Tensor]:
    return [torch.arange(1, length + 1) for length in lengths]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_generators_differ_by_every_part_of_their_key() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (0,), (0, 0, 0), (1, 1)]
    drawn = [torch.rand(4, generator=generator(*key)) for key in keys]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[1], torch.rand(4, generator=generator(0, 1)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_buckets_hold_every_row_once(lengths: list[int], size: int, seed: int) -> None:
    batches = bucketed(torch.tensor(lengths), size, seed, window=2)
    assert sorted(torch.cat(list(batches)).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size) and all(len(batch) <= size for batch in batches)


def test_buckets_save_padding() -> None:
    lengths = torch.randint(1, 60, (1000,), generator=generator(0))
    batches = bucketed(lengths, 10, 0)
    spent = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert spent < 1.1 * int(lengths.sum())
    assert [batch.tolist() for batch in batches] != [batch.tolist() for batch in bucketed(lengths, 10, 1)]


def test_an_epoch_is_a_sequence() -> None:
    epoch = Epoch(3, lambda position: (position, torch.zeros(0)))
    assert [inputs for inputs, _ in epoch] == [0, 1, 2] and len(epoch) == 3
    with pytest.raises(IndexError):
        epoch[3]


def test_padded() -> None:
    assert padded(rows_of([1, 3]), 9).tolist() == [[1, 9, 9], [1, 2, 3]]


# --- images -----------------------------------------------------------------------------------------------------------


def test_normalised_is_channels_last() -> None:
    x = normalised(torch.full((2, 4, 4, 3), 51, dtype=torch.uint8))
    assert list(x.shape) == [2, 3, 4, 4] and x.is_contiguous(memory_format=torch.channels_last)
    assert x[0, :, 0, 0].tolist() == pytest.approx(
        [(0.2 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    )


def test_every_augmented_image_is_a_window_of_the_padded_one() -> None:
    pixels = torch.randint(1, 256, (40, 8, 8, 3), generator=generator(1), dtype=torch.uint8)
    seen = set()
    for image, made in zip(pixels, augmented(pixels, generator(2)), strict=True):
        wide = torch.zeros(8 + 2 * PAD, 8 + 2 * PAD, 3, dtype=torch.uint8)
        wide[PAD:-PAD, PAD:-PAD] = image
        windows = {
            (down, right, mirror): wide[down : down + 8, right : right + 8].flip([1] if mirror else [])
            for down in range(2 * PAD + 1)
            for right in range(2 * PAD + 1)
            for mirror in (False, True)
        }
        (place,) = [place for place, window in windows.items() if torch.equal(window, made)]
        seen.add(place)
    assert {mirror for *_, mirror in seen} == {False, True} and len({down for down, *_ in seen}) > 5


def test_image_batches_repeat_and_differ() -> None:
    pixels = torch.randint(0, 256, (10, 8, 8, 3), generator=generator(1), dtype=torch.uint8)
    batches = ImageBatches(pixels, torch.arange(10), 4, seed=1)
    (x, labels), (again, _) = batches.epoch(2)[1], batches.epoch(2)[1]
    assert torch.equal(x, again) and len(batches.epoch(0)) == 2
    assert labels.tolist() == shuffled(10, 1, 2)[4:8].tolist() != batches.epoch(3)[1][1].tolist()
    assert ImageBatches(pixels, torch.arange(10), 4, seed=2).epoch(2)[1][1].tolist() != labels.tolist()


# --- sentences --------------------------------------------------------------------------------------------------------


def test_read_sentences(tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("sentence\tlabel\na fine film . \t1\nan é \t0\n", encoding="utf-8")
    assert read_sentences(file) == [Sentence("a fine film .", 1), Sentence("an é", 0)]
    file.write_text("sentence\tlabel\na fine film . 1\n")
    with pytest.raises(qfx.ConfigError, match=r"train\.tsv, line 2 is no sentence, tab and label: 'a fine film"):
        read_sentences(file)


def test_nothing_that_validates_was_trained() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    sentences = [Sentence(text, 1) for text in (long, "two three", "four five six", "three two", "one", "thirteen")]
    rest, chosen = held_out(sentences, 5)
    assert [s.text for s in chosen] == [long]
    assert [s.text for s in rest] == ["three two", "thirteen"]


def test_vocabulary() -> None:
    words = Vocabulary.of([Sentence("a b b", 0), Sentence("c a", 0)], max_length=4)
    assert len(words) == 5
    first, second = words.encode(["b c a", "a a a a a a"])
    assert first.tolist() == [FIRST, words.ids["b"], UNKNOWN, words.ids["a"]] and len(second) == 4


def test_sentence_batches_mask_what_is_padding() -> None:
    rows = rows_of([2, 5, 3])
    inputs, labels = SentenceBatches(rows, torch.tensor([0, 1, 0]), 3, seed=0).epoch(0)[0]
    assert inputs["attention_mask"].sum(1).tolist() == [len(rows[i]) for i in (0, 2, 1)]
    assert inputs["input_ids"].tolist()[0] == [1, 2, 0, 0, 0] and labels.tolist() == [0, 0, 1]


def test_words_are_forgotten_at_random_but_never_the_first() -> None:
    batches = SentenceBatches([torch.full((50,), 7)] * 40, torch.zeros(40), 40, seed=0, forget=0.3)
    ids = batches.epoch(0)[0][0]["input_ids"]
    assert set(ids.unique().tolist()) == {UNKNOWN, 7} and bool((ids[:, 0] == 7).all())
    assert float((ids == UNKNOWN).double().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(ids, batches.epoch(0)[0][0]["input_ids"])
    assert not torch.equal(ids, batches.epoch(1)[0][0]["input_ids"])


def test_by_length_has_every_row() -> None:
    batches = by_length(rows_of([5, 1, 3]), torch.tensor([5, 1, 3]), 2)
    assert [labels.tolist() for _, labels in batches] == [[1, 3], [5]]
    assert batches[0][0]["input_ids"].tolist() == [[1, 0, 0], [1, 2, 3]]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", tokens=np.arange(7, dtype=np.int16), offset=np.array([0, 3, 7]))
    texts = read_texts(tmp_path / "t.npz")
    assert [text.tolist() for text in texts] == [[0, 1, 2], [3, 4, 5, 6]]
    tokens, labels = text_batch(texts)
    assert tokens.tolist() == [[0, 1, 0], [3, 4, 5]] and labels.tolist() == [[1, 2, IGNORED], [4, 5, 6]]
    assert sum(len(labels) for _, labels in TextBatches(texts * 5, 4, seed=0).epoch(0)) == 10
