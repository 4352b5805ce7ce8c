"""Latency at batch 1 against torch FX mode int8 and fp32 eager, in one process, the candidates taking turns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

import qfx
from qfx.models import MODELS, ModelFactory
from qfx.tools.bench_calls import call, resized
from qfx.tools.bench_figures import Bar, Figure, Options, at_least, brief
from qfx.tools.bench_fx_mode import engine, quantize_fx
from qfx.tools.bench_timing import Candidate, Times, take_turns

FLOAT, QFX = "fp32 eager", "qfx"


@dataclass(frozen=True)
class Case:
    """One model of the table. ``engines``: FX mode by these engines of torch's; ``bars`` by the candidate to beat."""

    model: str
    bars: Mapping[str, Bar]
    engines: tuple[str, ...] = ()


CASES = (
    Case("resnet18", {"FX onednn": at_least(1.0)}, ("onednn", "x86")),
    Case("bert_base", {FLOAT: at_least(3.0)}),
    Case("mobilenet_v2", {}, ("onednn", "x86")),
    Case("resnet50", {}, ("onednn", "x86")),
    Case("vit_s16", {}, ("onednn",)),
)


def latency(
    options: Options,
    *,
    cases: Sequence[Case] = CASES,
    models: Mapping[str, ModelFactory] = MODELS,
    rounds: int = 9,
    seconds: float = 0.25,
) -> Iterator[Figure]:
    """How many times faster than each peer: the median over the rounds of each round's ratio of medians."""
    for case in cases:
        model, example = models[case.model]()
        candidates, failed = _candidates(case, model, example, options.target)
        for name, error in failed.items():
            yield Figure.skip(f"{case.model} over {name}", error)
        times = take_turns(candidates, rounds=rounds, seconds=seconds)
        yield from _ratios(case, times)


def _candidates(
    case: Case, model: nn.Module, example: Any, target: str
) -> tuple[list[Candidate], dict[str, str]]:
    batches = [resized(example, 4, seed=seed) for seed in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        qmodel = qfx.quantize(model, example, calibration=batches, target=target, verbose=False)
    found = [Candidate(QFX, partial(call, qmodel, example)), Candidate(FLOAT, partial(call, model, example))]
    failed = {}
    for name in case.engines:
        try:
            peer = quantize_fx(model, [_single(batch) for batch in batches], name)
            with engine(name):
                call(peer, example)
        except Exception as error:  # the peer's failure is its own
            failed[f"FX {name}"] = brief(error)
        else:
            found.append(Candidate(f"FX {name}", partial(call, peer, example), partial(engine, name)))
    return found, failed


def _single(inputs: Any) -> Tensor:
    """The one tensor of a convolutional model's call."""
    (tensor,) = inputs
    assert isinstance(tensor, Tensor)
    return tensor


def _ratios(case: Case, times: Times) -> Iterator[Figure]:
    note = str(times)
    for name in times.rounds:
        if name != QFX:
            yield Figure(f"{case.model} over {name}", times.speedup(QFX, name), "x", case.bars.get(name), note)
            note = ""
