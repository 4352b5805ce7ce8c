"""The benchmark ``latency``: how many times faster at batch 1 than float eager and torch's FX mode, in one run each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qfx.targets import choose
from qfx.tools.bench_figures import Bar, Figure, Options, at_least
from qfx.tools.latency_candidates import qfx_on
from qfx.tools.latency_result import Result
from qfx.tools.latency_run import chosen, measured


@dataclass(frozen=True)
class Case:
    """One model of the table. ``bars`` by the candidate to beat; ``against``: groups of candidates beside eager."""

    model: str
    bars: Mapping[str, Bar]
    against: tuple[str, ...] = ("torch_fx",)


CASES = (
    Case("resnet18", {"torch_fx onednn": at_least(1.0)}),
    Case("bert_base", {"fp32 eager": at_least(3.0)}, ()),
    Case("mobilenet_v2", {}),
    Case("resnet50", {}),
    Case("vit_s16", {}),
)


def latency(
    options: Options, *, cases: Sequence[Case] = CASES, measure: Callable[..., Result] = measured
) -> Iterator[Figure]:
    """How many times faster than each peer: the median over the rounds of each round's ratio of medians.

    Raises:
        RuntimeError: qfx itself did not run.
    """
    target = choose(options.target).name
    for case in cases:
        found = measure(case.model, 1, chosen([target], case.against), threads=torch.get_num_threads())
        yield from figures(case, qfx_on(target), found)


def figures(case: Case, ours: str, found: Result) -> Iterator[Figure]:
    """Of one model; the first has everyone's times as its note."""
    for name, reason in found.reasons.items():
        if name == ours:
            raise RuntimeError(f"{case.model} on {name}: {reason}")
        yield Figure.skip(f"{case.model} over {name}", reason)
    note = str(found.times)
    for name in found.times.rounds:
        if name != ours:
            yield Figure(f"{case.model} over {name}", found.times.speedup(ours, name), "x", case.bars.get(name), note)
            note = ""
