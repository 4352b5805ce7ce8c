"""The scan of a network: every trial's score on all samples, kept as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, fx
from tqdm import tqdm

from qfx.divergence import Score
from qfx.fisher import estimate
from qfx.layers import Layer
from qfx.replay import Changes, Read, Replay
from qfx.samples import Sample
from qfx.score_cache import ScoreCache
from qfx.widths import Rounders, Trial

Mode = Literal["only", "all_but"]
"""What a trial rounds: only its own tensor, or all tensors of its part at its width but that one."""

_OFTEN = 10.0  # seconds between saves


def scan(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    trials: Sequence[Trial],
    samples: Sequence[Sample],
    score: Score,
    *,
    mode: Mode = "only",
    cache: ScoreCache | None = None,
    rounders: Rounders | None = None,
) -> dict[Trial, float]:
    """The score of every trial, each by a replay of what follows its layer.

    Whatever ends it early (Ctrl-C, a loss that fails), ``cache`` has the sums that were finished.
    """
    kept = cache if cache is not None else ScoreCache()
    rounders = rounders or Rounders(gm)
    changes = {trial: changes_of(layers, trial, rounders) for trial in trials}
    settings = _settings(layers, trials, rounders, mode)
    with _Progress("sensitivity", len(samples) * len(trials), kept) as done:
        for number, sample in enumerate(samples):
            for base, group in settings:
                missing = [trial for trial in group if _entry(number, trial, mode) not in kept]
                done(len(group) - len(missing))
                if not missing:
                    continue
                replay = Replay(gm, sample.inputs, base)
                wanted = replay.outputs if mode == "only" else Replay(gm, sample.inputs).outputs
                for trial in missing:
                    trialled = changes[trial] if mode == "only" else _without(base, changes[trial])
                    outputs = replay.run(trialled)
                    kept[_entry(number, trial, mode)] = score.compare(wanted, outputs, sample)
                    done(1)
    return {
        trial: score.value(_total(kept[_entry(number, trial, mode)] for number in range(len(samples))))
        for trial in trials
    }


def scan_fisher(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    trials: Sequence[Trial],
    samples: Sequence[Sample],
    *,
    cache: ScoreCache | None = None,
    rounders: Rounders | None = None,
) -> dict[Trial, float]:
    """The second-order estimate of every trial's Kullback-Leibler divergence (:mod:`qfx.fisher`), in nats a row."""
    kept = cache if cache is not None else ScoreCache()
    rounders = rounders or Rounders(gm)
    with _Progress("sensitivity", len(samples), kept) as done:
        for number, sample in enumerate(samples):
            missing = [trial for trial in trials if _entry(number, trial, "only") not in kept]
            for trial, sums in estimate(gm, layers, missing, sample, rounders, number).items() if missing else ():
                kept[_entry(number, trial, "only")] = sums
            done(1)
    totals = {t: _total(kept[_entry(number, t, "only")] for number in range(len(samples))) for t in trials}
    return {trial: total / rows if rows else 0.0 for trial, (total, rows) in totals.items()}


class _Progress:
    """A progress bar that shows itself after two seconds, and saves what was computed now and then, and at the end."""

    def __init__(self, what: str, steps: int, cache: ScoreCache) -> None:
        self._bar = tqdm(total=steps, desc=what, delay=2.0, leave=False, unit="trial")
        self._cache = cache
        self._saved = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, steps: int) -> None:
        self._bar.update(steps)
        if time.monotonic() - self._saved > _OFTEN:
            self._cache.save()
            self._saved = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._cache.save()
        self._bar.close()


def changes_of(layers: Sequence[Layer], trial: Trial, rounders: Rounders) -> Changes:
    """What the trial's layer reads, rounded."""
    layer = next(layer for layer in layers if layer.key == trial.key)
    if trial.part == "weight":
        assert layer.weight is not None
        read: Read = _Rounded(rounders, layer, trial.bits)
        return {call: {layer.weight: read} for call in layer.calls}
    return {call: {i: rounders.data(call, i, trial.bits) for i in layer.data} for call in layer.calls}


class _Rounded:
    """Reads the rounded weight, made when it is asked for: all weights at all widths would be too much to keep."""

    def __init__(self, rounders: Rounders, layer: Layer, bits: int) -> None:
        self._rounders, self._layer, self._bits = rounders, layer, bits

    def __call__(self, weight: Tensor) -> Tensor:
        return self._rounders.weight(self._layer, self._bits)


def _settings(
    layers: Sequence[Layer], trials: Sequence[Trial], rounders: Rounders, mode: Mode
) -> list[tuple[Changes, list[Trial]]]:
    """The runs that trials start from, with the trials of each."""
    if mode == "only":
        return [({}, list(trials))]
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.part, trial.bits), []).append(trial)
    return [(together(changes_of(layers, t, rounders) for t in group), group) for group in groups.values()]


def together(all_changes: Iterable[Changes]) -> Changes:
    """Several changes at once."""
    joined: dict[fx.Node, dict[int, Read]] = {}
    for changes in all_changes:
        for call, reads in changes.items():
            joined.setdefault(call, {}).update(reads)
    return joined


def _without(base: Changes, taken: Changes) -> Changes:
    """The base less what the layer itself changes in it."""
    return {
        call: {i: read for i, read in reads.items() if i not in taken.get(call, ())} for call, reads in base.items()
    }


def _total(all_sums: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) for column in zip(*all_sums, strict=True))


def _entry(number: int, trial: Trial, mode: Mode) -> str:
    return f"{number} {mode} {trial}"

