"""One option of every group at the least total of one number while totals of others stay within limits.

The multiple-choice knapsack as a 0-1 programme for HiGHS, by ``scipy.optimize.milp``. A solver of floats has absolute
tolerances (1e-6 in a row and in the objective), so numbers come to it as what an option has more than the least of its
group, scaled to about a million; and what it answers is held against the limits by sums that are rounded once.

Most options need not come to it at all. The prices that the linear relaxation puts on the limits give every option a
surplus over the best of its group, and their sum a lower bound (Lagrangean relaxation: Geoffrion, Mathematical
Programming Study 2, 1974). A solution among the few options of small surplus, the core, is an upper bound: an option
whose surplus exceeds the gap between the two is in no better solution (Kellerer, Pferschy and Pisinger, Knapsack
Problems, 2004, section 11.2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qfx.errors import QfxError, QfxWarning

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Choice = tuple[int, ...]
"""The index of an option for every group."""
Column = Sequence[Sequence[float]]
"""One number of every option of every group, finite and not negative."""
Floats = NDArray[np.float64]

_SCALE = 2.0**20  # of the greatest number of a row: then tolerances are 1e-12 of it
_FINER = 2.0**10  # another look pays where the greatest loss in question shrank by this
_CORE = 60  # options besides the best of each group
_CUTS = 20  # choices that exceed a limit within the tolerance and are forbidden one by one
_SECONDS = 20.0


@dataclass(frozen=True)
class Bounded:
    """A column whose total may be at most ``limit``."""

    column: Column
    limit: float

    def holds(self, chosen: Choice) -> bool:
        return total(self.column, chosen) <= self.limit

    @property
    def room(self) -> float:
        """What is left of the limit when every group takes its least; what rounds down to the limit is within it."""
        return _sum([self.limit, math.ulp(self.limit) / 2, *(-min(numbers) for numbers in self.column)])


def total(column: Column, chosen: Sequence[int]) -> float:
    """The sum of the chosen options' numbers, rounded once."""
    return _sum([numbers[i] for numbers, i in zip(column, chosen, strict=True)])


def least(objective: Column, bounded: Sequence[Bounded]) -> Choice | None:
    """The choice of the least total of ``objective`` within all limits; None: no choice is within them.

    An option goes if another of its group is as good in all columns (Sinha and Zoltners, Operations Research 27, 1979),
    so that ties within a group go to the cheaper option, and then to the earlier one. The total may exceed the least by
    1e-12 of the greatest loss that a better choice could have in one group.

    Raises:
        QfxError: HiGHS failed.
    """
    if not all(b.holds(tuple(int(np.argmin(numbers)) for numbers in b.column)) for b in bounded):
        return None
    loss, rooms = _surplus(objective), [b.room for b in bounded]
    more = [_surplus(b.column) for b in bounded]
    places = [
        (g, o)
        for g in range(len(objective))
        for o in _undominated([objective[g], *(b.column[g] for b in bounded)])
        if all(column[g][o] <= room for column, room in zip(more, rooms, strict=True))
    ]
    found: Choice | None = None
    while True:
        unit = max((loss[g][o] for g, o in places), default=0.0) or 1.0
        chosen = _Programme.of(places, len(objective), loss, unit, more, rooms).best(bounded)
        if chosen is None:
            return found
        if found is None or total(objective, chosen) < total(objective, found):
            found = chosen
        gap = total(loss, found)
        places = [(g, o) for g, o in places if loss[g][o] <= gap]
        if gap == 0.0 or max(loss[g][o] for g, o in places) * _FINER > unit:
            return found


@dataclass(frozen=True)
class _Programme:
    """Minimise ``cost @ x`` with one x of every group and ``rows @ x <= rooms``, each x 0 or 1.

    ``groups``: of every x, ascending; ``options``: likewise. ``unit``: the loss that a cost of ``_SCALE`` stands for.
    """

    groups: NDArray[np.intp]
    options: NDArray[np.intp]
    count: int
    cost: Floats
    rows: Floats
    rooms: Floats
    unit: float

    @classmethod
    def of(
        cls,
        places: Sequence[tuple[int, int]],
        count: int,
        loss: Column,
        unit: float,
        more: Sequence[Column],
        rooms: Sequence[float],
    ) -> _Programme:
        groups, options = (np.array([place[i] for place in places], np.intp) for i in range(2))
        cost = np.array([loss[g][o] for g, o in places]) / unit * _SCALE
        rows = np.array([[column[g][o] for g, o in places] for column in more]).reshape(len(more), len(places))
        units = np.array([min(room, row.max(initial=0.0)) or 1.0 for room, row in zip(rooms, rows, strict=True)])
        limits = np.minimum(np.array(rooms) / units.reshape(-1), count + 1.0)
        return cls(groups, options, count, cost, rows / units[:, None] * _SCALE, limits * _SCALE, unit)

    def best(self, bounded: Sequence[Bounded]) -> Choice | None:
        """The choice of least cost; None: there is none."""
        if len(set(self.groups.tolist())) < self.count:
            return None
        surplus, bound = self._surplus()
        core = np.zeros(len(surplus), bool)
        core[np.argsort(surplus, kind="stable")[: self.count + _CORE]] = True
        chosen = self._only(core).solve(bounded)
        if chosen is not None:
            taken = np.array(chosen)[self.groups] == self.options
            near = surplus <= self.cost[taken].sum() - bound + 1e-6
            if not (near & ~core).any():
                return chosen
            core |= near
        return chosen if core.all() else (self._only(core) if chosen else self).solve(bounded)

    def _only(self, kept: NDArray[np.bool_]) -> _Programme:
        return replace(
            self, groups=self.groups[kept], options=self.options[kept], cost=self.cost[kept], rows=self.rows[:, kept]
        )

    def _surplus(self) -> tuple[Floats, float]:
        """What every x costs more than the best of its group at the relaxation's prices; and a bound of the cost."""
        from scipy.optimize import linprog

        prices = np.zeros(len(self.rooms))
        if len(self.rooms):
            answer = linprog(self.cost, A_ub=self.rows, b_ub=self.rooms, A_eq=self._one, b_eq=np.ones(self.count))
            if answer.status == 0:
                prices = np.maximum(0.0, -answer.ineqlin.marginals)
        priced = self.cost + prices @ self.rows
        best = np.full(self.count, np.inf)
        np.minimum.at(best, self.groups, priced)
        return priced - best[self.groups], float(best.sum() - prices @ self.rooms)

    @property
    def _one(self) -> csr_array:
        """The rows that sum the x of each group."""
        from scipy.sparse import csr_array

        n = len(self.groups)
        return csr_array((np.ones(n), (self.groups, np.arange(n))), shape=(self.count, n))

    def solve(self, bounded: Sequence[Bounded]) -> Choice | None:
        """As :meth:`best`, by the whole programme."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        rooms = self.rooms.copy()
        cuts: list[csr_array] = []
        while True:
            free = np.full(len(rooms) + len(cuts), -np.inf)
            answer = milp(
                self.cost,
                integrality=np.ones_like(self.cost),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(
                    vstack([self._one, csr_array(self.rows), *cuts], format="csr"),
                    np.concatenate([np.ones(self.count), free]),
                    np.concatenate([np.ones(self.count), rooms, np.full(len(cuts), self.count - 1.0)]),
                ),
                options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
            )
            if answer.status == 2:
                return None
            if answer.x is None:
                raise QfxError(f"HiGHS could not solve the integer programme: {answer.message}")
            if answer.status == 1:
                _warn((answer.fun - answer.mip_dual_bound) * self.unit / _SCALE)
            x = np.round(answer.x)
            chosen = tuple(self.options[x == 1].tolist())
            broken = [i for i, b in enumerate(bounded) if not b.holds(chosen)]
            if not broken:
                return chosen
            if len(cuts) < _CUTS:
                cuts.append(csr_array(x[None, :]))
            else:
                for i in broken:
                    rooms[i] = min(rooms[i], float(self.rows[i] @ x)) - 1e-5


def _warn(gap: float) -> None:
    text = f"the search of bits ended after {_SECONDS:.0f} s: its damage may exceed the least by {gap:.1e}"
    warnings.warn(QfxWarning(text), stacklevel=2)


def _undominated(columns: Sequence[Sequence[float]]) -> list[int]:
    """The options of a group, by the numbers in each column, but for those that another one is as good as."""
    rows = list(zip(*columns, strict=True))
    kept: list[int] = []
    for o in sorted(range(len(rows)), key=lambda o: (rows[o], o)):
        if not any(all(a <= b for a, b in zip(rows[k], rows[o], strict=True)) for k in kept):
            kept.append(o)
    return sorted(kept)


def _surplus(column: Column) -> Column:
    return [[n - min(numbers) for n in numbers] for numbers in column]


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf
