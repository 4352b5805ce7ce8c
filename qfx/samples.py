"""What sensitivity is measured on: a few calls of a calibrated graph, in parts that fit into memory."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qfx.calling import codegen_of
from qfx.errors import CalibrationError, ConfigError
from qfx.structure import Container, Leaf, Structure

ROWS = 8
"""Rows of a part, at least: a replay keeps every value of the graph for them."""

_MOST_ROWS, _ELEMENTS = 32, 2**17  # small images go through in larger parts


@dataclass(frozen=True)
class Sample:
    """Flat ``inputs`` of one call, the data ``item`` that they come from, and how flat outputs become a ``result``.

    ``logits``: which of the flat outputs is called so; None where none is.
    """

    inputs: tuple[Any, ...]
    item: Any
    result: Callable[[tuple[Any, ...]], Any] = field(compare=False)
    logits: int | None = None

    def scored(self, outputs: Sequence[Any]) -> Tensor:
        """The output that classes are read from: the one called ``logits``, or the first floating-point one.

        Raises:
            ConfigError: the model returns no floating-point tensor, or one class, whose probability is always 1.
        """
        named = [] if self.logits is None else [outputs[self.logits]]
        for output in (*named, *outputs):
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
                if output.shape[-1] == 1:
                    raise ConfigError(
                        "the model returns one number a row, and no classes to compare",
                        hint="choose score='sqnr', or give a loss of your own",
                    )
                return output
        raise ConfigError(
            "the model returns no floating-point tensor to score", hint="score a model that returns its logits"
        )


def samples_of(
    gm: fx.GraphModule, calls: Iterable[tuple[tuple[Any, ...], Any]], *, rows: int, split: bool
) -> tuple[Sample, ...]:
    """The first ``rows`` rows of ``(flat inputs, item)`` calls; ``split``: in parts of some rows.

    A call is split, and cut short, where all its inputs have one free batch size; else it counts as a whole.

    Raises:
        CalibrationError: there is none.
    """
    codegen = codegen_of(gm)
    make = partial(Sample, result=codegen.process_outputs, logits=_logits(codegen.result))
    found: list[Sample] = []
    left = rows
    for inputs, item in calls:
        if left <= 0:
            break
        count = _batch(gm, inputs)
        if not split or count is None:
            found.append(make(inputs, item))
            left -= count or 1
            continue
        part = _part(inputs)
        for start in range(0, min(count, left), part):
            stop = min(start + part, count, left)
            found.append(make(tuple(t[start:stop] for t in inputs), item))
        left -= count
    if not found:
        raise CalibrationError(
            "there are no data to measure sensitivity on",
            hint="a generator is exhausted after one use: pass a list, a DataLoader, or a fresh generator",
        )
    return tuple(found)


def _part(inputs: tuple[Any, ...]) -> int:
    """Rows of a part: as many as have some 100,000 numbers; tokens say nothing of what is made of them."""
    numbers = sum(t[0].numel() for t in inputs if t.is_floating_point())
    return max(ROWS, min(_MOST_ROWS, _ELEMENTS // numbers)) if numbers else ROWS


def _logits(result: Structure) -> int | None:
    """The flat output that the model's result calls ``logits``."""
    named = dict(zip(result.keys, result.children, strict=True)) if isinstance(result, Container) else {}
    found = named.get("logits")
    return found.index if isinstance(found, Leaf) else None


def _batch(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> int | None:
    """The batch size, where every input has it as a free leading size."""
    free = all(spec.sizes and isinstance(spec.sizes[0], str) for spec in codegen_of(gm).binder.tensors)
    sizes = {t.shape[0] if isinstance(t, Tensor) and t.dim() else -1 for t in inputs}
    return int(next(iter(sizes))) if free and len(sizes) == 1 and -1 not in sizes else None


def rows_of(gm: fx.GraphModule, samples: Iterable[Sample]) -> int:
    """How many rows the samples have; one without a batch size counts as a row."""
    return sum(count if (count := _batch(gm, sample.inputs)) is not None else 1 for sample in samples)


def few_rows(gm: fx.GraphModule, inputs: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """The first rows of every input, where all have one free batch size."""
    count = _batch(gm, inputs)
    return inputs if count is None or count <= rows else tuple(t[:rows] for t in inputs)


def labels(samples: Iterable[Sample]) -> str:
    """A digest of the data items, with what a loss reads of them beside the inputs; their addresses if need be."""
    items = [sample.item for sample in samples]
    written = io.BytesIO()
    try:
        _ByContent(written).dump(items)
    except Exception:  # pickle raises what the items' own classes raise
        return repr([id(item) for item in items])
    return hashlib.sha256(written.getvalue()).hexdigest()


class _ByContent(pickle.Pickler):
    """Writes equal tensors equally, which torch's own pickles do not."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        plain = value.detach().cpu().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return tuple, ((str(plain.dtype), *plain.shape, content),)


def tensors(samples: Iterable[Sample]) -> Iterator[Tensor]:
    """All input tensors, for a hash of the content."""
    return (t for sample in samples for t in sample.inputs if isinstance(t, torch.Tensor))
