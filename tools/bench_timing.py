"""Wall-clock times of several candidates that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 3


@dataclass(frozen=True)
class Candidate:
    """``call`` is timed."""

    name: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds by candidate: the median of each round."""

    rounds: Mapping[str, tuple[float, ...]]

    def ms(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds[name])

    def speedup(self, name: str, over: str) -> float:
        """How many times faster ``name`` is than ``over``: the median of the rounds' own ratios."""
        pairs = zip(self.rounds[over], self.rounds[name], strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    def __str__(self) -> str:
        """Medians, and the quietest round beside them: far apart, the machine was busy."""
        return ", ".join(f"{name} {self.ms(name):.3g} ms (best {min(of):.3g})" for name, of in self.rounds.items())


def take_turns(
    candidates: Sequence[Candidate], *, rounds: int = 9, seconds: float = 0.25, warm_ups: int = WARM_UPS
) -> Times:
    """Each round gives every candidate of this process one burst of calls, in rotating order. Gradients are off.

    :func:`qfx.tools.latency_turns.processes_in_turns` does so with candidates that need a process of their own.
    """
    found: dict[str, list[float]] = {c.name: [] for c in candidates}
    with torch.inference_mode():
        for round_ in range(rounds):
            for candidate in rotated(candidates, round_):
                found[candidate.name].append(statistics.median(burst(candidate.call, seconds, warm_ups)))
    return Times({name: tuple(times) for name, times in found.items()})


def rotated(candidates: Sequence[T], round_: int) -> list[T]:
    """The order of a round: each begins with another one."""
    shift = round_ % len(candidates) if candidates else 0
    return [*candidates[shift:], *candidates[:shift]]


def burst(call: Callable[[], object], seconds: float, warm_ups: int = WARM_UPS) -> list[float]:
    """The milliseconds of each of at least three calls, or of as many as fit into ``seconds``.

    Before them come ``warm_ups`` calls that do not count, which bring the weights back into the cache.
    """
    for _ in range(warm_ups):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times
