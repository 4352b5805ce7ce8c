"""Which models go through ``quantize`` from an example of batch 1 and run at other sizes, and how much is integer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import qfx
from qfx.models import MODELS, MODELS_SMALL
from qfx.tools.bench_calls import call, mismatch, resized, token_length, worst_sqnr_db
from qfx.tools.bench_figures import Bar, Figure, Options, Skip, at_least, brief
from qfx.tools.bench_zoo import (
    CONVOLUTIONAL,
    TIMM,
    TORCHVISION,
    TRANSFORMER,
    TRANSFORMERS,
    timm_model,
    torchvision_model,
    transformers_model,
)

BATCHES = (1, 3, 8)


@dataclass(frozen=True)
class Case:
    """A model to try. ``share``: the least share of multiply-accumulates in integer, attention products aside."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    share: float | None

    @property
    def bar(self) -> Bar | None:
        return None if self.share is None else at_least(100 * self.share)


CONVOLUTIONAL_NAMES = ("resnet", "mobilenet")


def own_cases() -> Iterator[Case]:
    """The reference models, at their published size and small."""
    for table, suffix in ((MODELS, ""), (MODELS_SMALL, " (small)")):
        for name, make in table.items():
            yield Case(name + suffix, make, CONVOLUTIONAL if name.startswith(CONVOLUTIONAL_NAMES) else TRANSFORMER)


def coverage(options: Options, *, cases: Iterable[Case] | None = None) -> Iterator[Figure]:
    """The reference models: share of multiply-accumulates in integer of each, and how many of them ran."""
    ran = tried = 0
    for case in own_cases() if cases is None else cases:
        figure = _try(case, options.target)
        tried += 1
        ran += not figure.failed
        yield figure
    yield Figure("models that run", ran, f"of {tried}", at_least(tried))


def torchvision(options: Options) -> Iterator[Figure]:
    """Models of torchvision."""
    yield from coverage(options, cases=[Case(e.name, partial(torchvision_model, e), e.share) for e in TORCHVISION])


def timm(options: Options) -> Iterator[Figure]:
    """Models of timm."""
    yield from coverage(options, cases=[Case(e.name, partial(timm_model, e), e.share) for e in TIMM])


def transformers(options: Options) -> Iterator[Figure]:
    """Models of transformers, built from tiny configurations."""
    cases = [Case(e.model, partial(transformers_model, e), e.share) for e in TRANSFORMERS]
    yield from coverage(options, cases=cases)


def _try(case: Case, target: str) -> Figure:
    try:
        model, example = case.make()
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qmodel = qfx.quantize(model, example, target=target, verbose=False)
        seconds = time.perf_counter() - start
        sqnr = [_compare(model, qmodel, inputs) for inputs in _calls(example)]
    except Skip:
        raise
    except Exception as error:  # a model that fails is a figure, and the others still count
        return Figure.fail(case.name, brief(error), case.bar)
    report = qfx.report(qmodel)
    note = f"SQNR {min(sqnr):.1f} dB in {len(sqnr)} calls; quantize {seconds:.1f} s"
    parts = f"; float by capture: {len(report.float_parts)} parts" if report.float_parts else ""
    return Figure(case.name, 100 * report.integer_macs, "% MACs", case.bar, note + parts)


def _calls(example: Any) -> Iterator[Any]:
    """Inputs at batches 1, 3 and 8; of token models at two other lengths too."""
    for batch in BATCHES:
        yield resized(example, batch, seed=batch)
    length = token_length(example)
    if length is not None:
        yield resized(example, 3, length=length // 2 + 1)
        yield resized(example, 1, length=length + 3)


class OutputError(Exception):
    """The quantized model's output is not of the float model's structure."""


def _compare(model: nn.Module, qmodel: nn.Module, inputs: Any) -> float:
    want, got = call(model, inputs), call(qmodel, inputs)
    if problem := mismatch(want, got):
        sizes = [list(t.shape) for t in (inputs.values() if isinstance(inputs, dict) else inputs)]
        raise OutputError(f"{problem}, called with {sizes}")
    return worst_sqnr_db(want, got)
