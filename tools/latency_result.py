"""What one run found out: a row a candidate, and who is the best peer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qfx.tools.bench_timing import Times
from qfx.tools.latency_turns import Outcome


@dataclass(frozen=True)
class Row:
    """A candidate that ran. ``ours``: it is qfx; ``rounds``: the milliseconds of each call of each round."""

    name: str
    ours: bool
    computes: str
    sqnr_db: float
    rounds: tuple[tuple[float, ...], ...]
    note: str = ""

    def percentile(self, percent: float) -> float:
        """Of the milliseconds of all calls."""
        return float(np.percentile(np.concatenate(self.rounds), percent))


@dataclass(frozen=True)
class Result:
    """One model at one batch size. ``reasons``: why the others did not run, by candidate."""

    model: str
    batch: int
    rows: tuple[Row, ...]
    reasons: Mapping[str, str]

    @cached_property
    def times(self) -> Times:
        return Times({row.name: tuple(statistics.median(calls) for calls in row.rounds) for row in self.rows})

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def best_peer(self, computes: str | None = None) -> Row | None:
        """The fastest of those that are not qfx, and that compute in ``computes``; None: there is none."""
        peers = [row for row in self.rows if not row.ours and computes in (None, row.computes)]
        return min(peers, key=lambda row: self.times.ms(row.name), default=None)

    def ratio(self, row: Row, peer: Row) -> float:
        """The time of ``row`` as a fraction of the peer's: the median over the rounds of each round's own."""
        return self.times.speedup(peer.name, over=row.name)


def result(model: str, batch: int, ours: Iterable[str], outcomes: Mapping[str, Outcome]) -> Result:
    """Rows and reasons, in the order of ``outcomes``; ``ours`` are the names of qfx's candidates."""
    mine: Sequence[str] = tuple(ours)
    rows = [
        Row(name, name in mine, of.facts["computes"], of.facts["sqnr_db"], of.rounds, of.facts["note"])
        for name, of in outcomes.items()
        if not of.failed
    ]
    return Result(model, batch, tuple(rows), {name: of.failed for name, of in outcomes.items() if of.failed})
