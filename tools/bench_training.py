"""What quantization-aware training costs beside float training, and whether conversion keeps what was trained."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence

import qfx
from qfx.models import MODELS, ModelFactory
from qfx.tools.bench_calls import call, resized
from qfx.tools.bench_child import fresh
from qfx.tools.bench_figures import Bar, Figure, Options, Skip, at_most, brief
from qfx.tools.bench_learners import BATCHES, Step, learner

LEARNERS: Mapping[str, tuple[Bar | None, Bar | None]] = {
    "int8": (at_most(1.6), at_most(1.5)),
    "w4a4_lsq": (at_most(1.6), at_most(1.5)),
    "fx": (None, None),
}
"""Who is compared with float, and the bars of its time and of its memory."""


def training(options: Options, *, names: Sequence[str] = tuple(BATCHES), rounds: int = 7) -> Iterator[Figure]:
    """The time and the peak memory of a training step, in units of the float model's, all learners in turns.

    Memory is the peak of resident memory over what is resident before the model is built, in processes of their own.
    """
    for name in names:
        steps: dict[str, Step] = {"float": learner(name, "float")}
        for what in LEARNERS:
            try:
                steps[what] = learner(name, what)
            except Skip as reason:
                yield Figure.skip(f"{name}, {what}: step time", str(reason))
        times = _take_turns(steps, rounds)
        for what in [w for w in LEARNERS if w in steps]:
            ratio = statistics.median(a / b for a, b in zip(times[what], times["float"], strict=True))
            note = ", ".join(f"{w} {min(times[w]) * 1e3:.0f} ms" for w in ("float", what))
            yield Figure(f"{name}, {what}: step time", ratio, "x float", LEARNERS[what][0], f"best rounds {note}")
        present = list(steps)
        steps.clear()
        yield from _memory(name, present)


def _take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step each, in rotating order; a first round does not count."""
    times: dict[str, list[float]] = {what: [] for what in steps}
    names = list(steps)
    for round_ in range(rounds + 1):
        shift = round_ % len(names)
        for what in (*names[shift:], *names[:shift]):
            start = time.perf_counter()
            steps[what]()
            times[what].append(time.perf_counter() - start)
    return {what: found[1:] for what, found in times.items()}


def _memory(name: str, learners: Sequence[str]) -> Iterator[Figure]:
    if sys.platform != "linux":
        yield Figure.skip(f"{name}: memory", "reads /proc, which Linux has")
        return
    gc.collect()
    rises = {}
    for what in learners:
        runs = [fresh("training-memory", name, what) for _ in range(3)]
        rises[what] = statistics.median(run["peak"] - run["before"] for run in runs)
    for what in learners[1:]:
        note = ", ".join(f"{w} {rises[w] / 2**20:.0f} MiB" for w in ("float", what))
        bar = LEARNERS[what][1]
        yield Figure(f"{name}, {what}: peak memory", rises[what] / rises["float"], "x float", bar, note)


def agreement(
    options: Options,
    *,
    models: Mapping[str, ModelFactory] = MODELS,
    recipes: Sequence[str] = ("int8", "w8a8_lsq", "w4a8_lsq", "w4a4_lsq", "w3a3_lsq", "w2a2_lsq"),
) -> Iterator[Figure]:
    """Prepared for training and calibrated, in eval, against converted: the worst layer on the same inputs, in LSB."""
    for name, make in models.items():
        for recipe in recipes:
            what = f"{name}, {recipe}"
            model, example = make()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", qfx.QfxWarning)
                    prepared = qfx.prepare(model, example, recipe=recipe, target=options.target, mode="qat")
                    qfx.calibrate(prepared, [resized(example, 4)])
                    call(prepared, resized(example, 2, seed=1))  # a batch in training mode moves ranges and statistics
                    found = qfx.report(qfx.convert(prepared.eval())).agreement
            except Exception as error:  # a model that fails is a figure, and the others still count
                yield Figure.fail(what, brief(error), at_most(1))
                continue
            worst = max(layer.lsb or 0 for layer in found)
            apart = sum(layer.lsb == 1 for layer in found)
            yield Figure(what, worst, "LSB", at_most(1), f"{len(found)} comparisons, {apart} of them 1 LSB apart")
