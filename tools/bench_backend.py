"""``torch.compile(model, backend="qfx")`` against ``qfx.quantize`` with the same calibration: bit-identical or not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import qfx
from qfx.dynamo import reports
from qfx.models import MODELS, ModelFactory
from qfx.structure import flatten
from qfx.tools.bench_calls import call, resized
from qfx.tools.bench_figures import Figure, Options, at_most, brief

NONE = at_most(0)
STEPS = 2


def backend(options: Options, *, models: Mapping[str, ModelFactory] = MODELS) -> Iterator[Figure]:
    """Results that differ, of calls at the calibrated batch of 4 and, which compiles anew, at 2."""
    for name, make in models.items():
        torch._dynamo.reset()
        try:
            yield _compared(name, *make(), target=options.target)
        except Exception as error:  # a model that fails is a figure, and the others still count
            yield Figure.fail(name, brief(error), NONE)


def _compared(name: str, model: nn.Module, example: Any, *, target: str) -> Figure:
    data = [resized(example, 4, seed=seed) for seed in range(STEPS)]
    compiled: Any = torch.compile(model, backend=qfx.backend(target=target, calibration_steps=STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)  # so few samples
        start = time.perf_counter()
        floats = [_differing(call(model, item), call(compiled, item)) for item in data]
        seconds = time.perf_counter() - start
        qmodel = qfx.quantize(model, example, calibration=data, target=target, verbose=False)
        fresh = [resized(example, rows, seed=STEPS) for rows in (4, 2)]
        differ = sum(floats) + sum(_differing(call(qmodel, item), call(compiled, item)) for item in fresh)
    made = reports(compiled)
    states = sorted({region.state if not region.reason else f"float: {region.reason}" for region in made})
    note = f"{len(made)} compiled, {' and '.join(states)}; calibration and conversion took {seconds:.1f} s"
    return Figure(f"{name}, tensors that differ", differ, "", NONE, note)


def _differing(want: Any, got: Any) -> int:
    pairs = zip(flatten(want)[0], flatten(got)[0], strict=True)
    return sum(1 for x, y in pairs if isinstance(x, Tensor) and not torch.equal(x, y))
