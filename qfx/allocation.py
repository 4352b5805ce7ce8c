"""One option for every group, at the least total loss within budgets: the multiple-choice knapsack, solved exactly.

The groups are layers and the options their bit widths, but nothing here knows of either. Every number counts as the
exact value of the float that it is, and every decision falls in integers: a solver of floats has tolerances (HiGHS:
1e-7 in a row, 1e-6 in the objective), so that it may exceed a budget, or stop short of the least loss. HiGHS solves
the linear relaxation, whose prices are good whatever their rounding; the rest is proved from them:

1. An option goes if another of its group is no dearer and better (Sinha and Zoltners, Operations Research 27, 1979), or
   if a budget has no room for it.
2. With a price for each resource, the groups fall apart: the sum of their cheapest options is a lower bound of any
   solution, at any prices (Lagrangean relaxation: Geoffrion, Mathematical Programming Study 2, 1974). A solution at
   hand is an upper bound. An option that costs more than the best of its group by more than the gap between the bounds
   goes; the relaxation is solved again, on the scale of what is left, until little more goes.
3. What is left is enumerated group by group. A partial choice ends where it exceeds the gap or a budget, or where
   another one uses no more of any budget and comes first (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
   sections 2.3 and 2.6, and chapter 11). So the first choice in order survives.
4. Where too many survive, one group is split: 1 to 3 again with each of its options.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qfx.errors import ConfigError, QfxWarning

Choice = tuple[int, ...]
"""The index of an option for every group."""
Numbers = tuple[int, ...]
"""An option in whole units: the column that is minimised, then those by which ties are broken, in this order."""
Rows = Sequence[Sequence[Numbers]]
Limits = Mapping[int, int]
"""The greatest total that a column may have, for some columns."""
Alive = Sequence[Sequence[int]]
"""The options of each group that are still in question, ascending."""

_START = 40  # options besides the best of each group, among which a first choice is sought
_BEAM = 200  # partial choices that are followed in that search
_WIDTH = 5_000  # partial choices that are followed in a proof before a group is split
_SPLITS = 300  # before the proof is given up
_FEW = 100  # partial choices that are not worth comparing
_DIGIT = 62  # bits: the sum of two digits is a 64-bit integer
_ROUNDING = 1e-9  # more than rounding can add to a sum of non-negative floats, relative: pruning leaves it
_PENALTIES = (1e4, 1e8)  # for exceeding the limits by all their room, as multiples of the greatest loss of a group


@dataclass(frozen=True)
class Option:
    """One choice of one group: the loss it causes and what it costs, by the name of the resource."""

    loss: float
    costs: Mapping[str, float] = field(hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", MappingProxyType(dict(self.costs)))

    def __reduce__(self) -> tuple[object, ...]:
        return Option, (self.loss, dict(self.costs))


class InfeasibleBudget(ConfigError):
    """No choice keeps to the budgets.

    ``budgets``: what was asked for. ``least``: for each of them the smallest value that leaves a solution while the
    others hold; where the others already contradict each other, the smallest value alone. ``alone``: the smallest
    values when no other budget counts.
    """

    def __init__(self, budgets: Mapping[str, float], least: Mapping[str, float], alone: Mapping[str, float]) -> None:
        self.budgets, self.least, self.alone = dict(budgets), dict(least), dict(alone)
        super().__init__(
            _infeasible(self.budgets, self.least, self.alone),
            hint="raise a budget to what can be had, or offer cheaper options",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return InfeasibleBudget, (self.budgets, self.least, self.alone)


def solve(groups: Sequence[Sequence[Option]], budgets: Mapping[str, float]) -> Choice:
    """The index of one option for every group: of the choices within all budgets the one of least total loss.

    A budget holds when :func:`total_cost` is no greater; losses are compared as exact sums of the floats given. Ties go
    to the lower total cost, resource by resource: those of ``budgets`` in their order, then the others by name; then to
    the choice that has the earlier option in the first group that differs. A group whose options do not name a resource
    costs none of it. Without budgets each group takes its least loss.

    The proof is short where options differ as those of layers do. Where so many choices are so nearly alike that it is
    given up, the answer is the best that was found, and a ``QfxWarning`` says by how much another one could be better.
    Among thousands of choices of the very same loss the order of ties is not promised.

    Raises:
        ConfigError: no groups, or a group without options; a loss, cost or budget that is negative or not finite;
            options of one group that name different resources; a budget for a resource that no option names.
        InfeasibleBudget: no choice is within the budgets; ``least`` says what could be had.
    """
    exact = _exact(groups, budgets)
    limits = exact.limits(budgets)
    best = _best(exact.rows, limits)
    if best is None:
        raise _refusal(exact, budgets)
    return best


def pareto(
    groups: Sequence[Sequence[Option]], resource: str, *, points: int = 20, budgets: Mapping[str, float] | None = None
) -> tuple[Choice, ...]:
    """Choices that trade ``resource`` against loss, within ``budgets``: from the cheapest to the one of least loss.

    At most ``points`` of them, fewer where there are no more between equally spaced budgets. Each is what :func:`solve`
    finds for a budget of its own cost, so that no choice is both as cheap and better, or as good and cheaper.

    Raises:
        ConfigError: as :func:`solve`; or fewer than two points.
        InfeasibleBudget: no choice is within ``budgets``.
    """
    if points < 2:
        raise ConfigError(f"a trade-off has at least two points, got points={points}")
    budgets = dict(budgets or {})
    exact = _exact(groups, [resource, *budgets])
    limits = exact.limits(budgets)
    column = exact.column(resource)
    costliest = _best(exact.rows, limits)
    cheapest = _least(exact.rows, limits, column)
    if costliest is None or cheapest is None:
        raise _refusal(exact, budgets)
    low, high = (_total(exact.rows, chosen)[column] for chosen in (cheapest, costliest))
    found = [costliest]
    for step in reversed(range(points - 1)):
        limit = low + (high - low) * step // (points - 1)
        if limit < _total(exact.rows, found[-1])[column]:  # otherwise the last choice is the best for this limit too
            chosen = _best(exact.rows, {**limits, column: limit})
            if chosen is not None:  # else the proof was given up
                found.append(chosen)
    return tuple(reversed(found))


def total_loss(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    """The sum of the chosen options' losses, rounded once."""
    return _sum(options[i].loss for options, i in zip(groups, chosen, strict=True))


def total_cost(groups: Sequence[Sequence[Option]], chosen: Sequence[int], resource: str) -> float:
    """The sum of the chosen options' costs, rounded once; a group that does not name the resource costs none of it.

    Raises:
        ConfigError: no option names the resource.
    """
    _known(resource, {name for options in groups for option in options for name in option.costs})
    return _sum(options[i].costs.get(resource, 0) for options, i in zip(groups, chosen, strict=True))


def _sum(numbers: Iterable[float]) -> float:
    return float(sum((Fraction(*_ratio(number)) for number in numbers), Fraction(0)))


# --- from floats to whole units ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exact:
    """The options as whole numbers: column 0 is the loss, column ``i + 1`` the resource ``names[i]``."""

    rows: Rows
    names: tuple[str, ...]
    units: tuple[int, ...]  # how many units of a column make one

    def column(self, name: str) -> int:
        return self.names.index(name) + 1

    def limits(self, budgets: Mapping[str, float]) -> dict[int, int]:
        """The greatest total in units that rounds to no more than the budget."""
        for name, budget in budgets.items():
            if not _sound(budget):
                raise ConfigError(f"the budget of {name} is {budget!r}: it is no finite number >= 0")
        return {self.column(name): self._limit(self.column(name), budget) for name, budget in budgets.items()}

    def _limit(self, column: int, budget: float) -> int:
        below = float(budget)
        if below > budget:  # an integer that no float is
            below = math.nextafter(below, 0)
        ulp = math.ulp(below)
        limit = (Fraction(below) + Fraction(ulp) / 2) * self.units[column]  # half-way to the next float: rounds to even
        return math.floor(limit) if below / ulp % 2 == 0 else math.ceil(limit) - 1

    def value(self, column: int, total: int) -> float:
        return total / self.units[column]


def _exact(groups: Sequence[Sequence[Option]], first: Iterable[str]) -> _Exact:
    """Check every number; ``first``: the resources that come first where ties are broken."""
    if not groups:
        raise ConfigError("there are no groups to choose for")
    first = list(first)
    known: set[str] = set()
    for g, options in enumerate(groups):
        if not options:
            raise ConfigError(f"group {g} has no options: there is nothing to choose")
        names = options[0].costs.keys()
        known |= names
        for o, option in enumerate(options):
            if option.costs.keys() != names:
                raise ConfigError(
                    f"option {o} of group {g} names other resources than option 0: {_list(option.costs)} and not "
                    f"{_list(names)}",
                    hint="let all options of a group name the same resources; 0 is a cost",
                )
            for what, number in (("loss", option.loss), *option.costs.items()):
                if not _sound(number):
                    raise ConfigError(f"{what} of option {o} of group {g} is {number!r}: it is no finite number >= 0")
    for name in first:
        _known(name, known)
    ordered = tuple(dict.fromkeys([*first, *sorted(known)]))
    ratios = [
        [[_ratio(n) for n in (o.loss, *(o.costs.get(name, 0) for name in ordered))] for o in options]
        for options in groups
    ]
    # Denominators of floats are powers of two: the greatest is a multiple of all.
    units = tuple(max(o[c][1] for options in ratios for o in options) for c in range(len(ordered) + 1))
    rows = [
        [tuple(n * (unit // d) for (n, d), unit in zip(option, units, strict=True)) for option in options]
        for options in ratios
    ]
    return _Exact(rows, ordered, units)


def _sound(number: object) -> bool:
    return isinstance(number, Real) and 0 <= float(number) < math.inf


def _ratio(number: float) -> tuple[int, int]:
    return (int(number), 1) if isinstance(number, Integral) else float(number).as_integer_ratio()


def _known(name: str, known: set[str]) -> None:
    if name not in known:
        raise ConfigError(f"no option names the resource {name!r}", hint=f"those named are {_list(known)}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


# --- infeasible budgets -----------------------------------------------------------------------------------------------


def _refusal(exact: _Exact, budgets: Mapping[str, float]) -> InfeasibleBudget:
    limits = exact.limits(budgets)
    least, alone = {}, {}
    for name in budgets:
        column = exact.column(name)
        alone[name] = exact.value(column, sum(min(o[column] for o in options) for options in exact.rows))
        chosen = _least(exact.rows, limits, column)
        least[name] = alone[name] if chosen is None else exact.value(column, _total(exact.rows, chosen)[column])
    return InfeasibleBudget(budgets, least, alone)


def _infeasible(budgets: Mapping[str, float], least: Mapping[str, float], alone: Mapping[str, float]) -> str:
    short = [name for name, budget in budgets.items() if alone[name] > budget]
    if short:
        return "; ".join(
            f"{name} {_show(budgets[name])} is too small: the least that these layers can have is {_show(alone[name])}"
            + (f", and {_show(least[name])} within the other budgets" if least[name] > alone[name] else "")
            for name in short
        )
    together = " and ".join(f"{name} {_show(budget)}" for name, budget in budgets.items())
    ways = "; ".join(
        f"within the other budgets the least {name} is {_show(least[name])}, alone {_show(alone[name])}"
        for name, budget in budgets.items()
        if least[name] > budget
    )
    return f"{together} cannot be met together" + (f": {ways}" if ways else ", though each can alone")


def _show(number: float) -> str:
    return repr(int(number)) if float(number).is_integer() else repr(float(number))


# --- the search -------------------------------------------------------------------------------------------------------


def _best(rows: Rows, limits: Limits) -> Choice | None:
    """The choice within the limits whose total comes first in lexicographic order; None: no choice is within them."""
    search = _Search(rows)
    search.explore([range(len(options)) for options in rows], limits)
    return search.best


def _least(rows: Rows, limits: Limits, column: int) -> Choice | None:
    """The choice of the smallest total of ``column`` within the limits of the other columns."""
    column_first = [[(numbers[column], *numbers) for numbers in options] for options in rows]
    return _best(column_first, {c + 1: limit for c, limit in limits.items() if c != column})


class _Search:
    """``best``: the first in order of the choices explored, None as long as there is none."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.best: Choice | None = None
        # Totals of column 0 differ by multiples of this.
        self.step = max(1, math.gcd(*(o[0] - options[0][0] for options in rows for o in options)))
        self.root: _Relaxed | None = None  # of what was split first
        self.splits = 0

    def explore(self, alive: Alive, limits: Limits) -> None:
        """All choices of the options that are alive, but for those that cannot be better than ``best``."""
        size = math.inf
        while True:
            reduced = _reduced(self.rows, alive, limits)
            if reduced is None:
                return
            alive, limits = reduced
            if all(len(kept) == 1 for kept in alive):
                self._offer(tuple(kept[0] for kept in alive))
                return
            if 2 * sum(map(len, alive)) > size:
                break
            size = sum(map(len, alive))
            relaxed = _relax(self.rows, alive, limits)
            if self.best is not None and relaxed.gap(self.rows, self.best) < 0:
                return
            self._offer(_near(self.rows, alive, limits, relaxed, _START))
            if self.best is None:
                self._offer(_any(self.rows, alive, limits, relaxed))
            if self.best is None:
                return
            gap = relaxed.gap(self.rows, self.best)
            alive = relaxed.within(alive, gap)
        enumeration = _Enumeration(self.rows, alive, limits, relaxed, gap)
        self._offer(enumeration.run(_WIDTH))
        if not enumeration.complete and gap >= self.step << relaxed.shift:
            self._split(alive, limits, relaxed)

    def _split(self, alive: Alive, limits: Limits, relaxed: _Relaxed) -> None:
        self.root = self.root or relaxed
        split = max((g for g, kept in enumerate(alive) if len(kept) > 1), key=lambda g: relaxed.split[g])
        for option in sorted(alive[split], key=lambda o: relaxed.surplus[split][o]):
            self.splits += 1
            if self.splits == _SPLITS:
                self._give_up(self.root)
            if self.splits < _SPLITS:
                self.explore([*alive[:split], [option], *alive[split + 1 :]], limits)

    def _give_up(self, root: _Relaxed) -> None:
        assert self.best is not None
        part = root.gap(self.rows, self.best) / max(1, _total(self.rows, self.best)[0] << root.shift)
        warnings.warn(
            f"no proof after {_SPLITS} splits: the total found may exceed the least by {part:.1e} of it",
            QfxWarning,
            stacklevel=2,
        )

    def _offer(self, chosen: Choice | None) -> None:
        """Keep the choice if its total comes first; of equal totals the one of earlier options."""
        if chosen is not None:
            self.best = min(self.best or chosen, chosen, key=lambda choice: (_total(self.rows, choice), choice))


def _near(rows: Rows, alive: Alive, limits: Limits, relaxed: _Relaxed, size: int) -> Choice | None:
    """A choice within the limits, of ``size`` options besides the best of each group; None: none was found."""
    ranked = sorted(extra for surplus in relaxed.surplus for extra in surplus.values())
    most = ranked[min(len(alive) + size, len(ranked)) - 1]
    reduced = _reduced(rows, relaxed.within(alive, most), limits)
    if reduced is None:
        return None
    return _Enumeration(rows, *reduced, relaxed, most * len(alive)).run(_BEAM, beam=True)


def _any(rows: Rows, alive: Alive, limits: Limits, relaxed: _Relaxed) -> Choice | None:
    """A choice within the limits, None if there is none: in the last resort the cheapest in one of them."""
    found = _near(rows, alive, limits, relaxed, sum(map(len, alive)))
    if found is None:
        column = next(iter(limits))
        found = _least(rows, limits, column)
        if found is not None and _total(rows, found)[column] > limits[column]:
            return None
    return found


def _total(rows: Rows, chosen: Choice) -> Numbers:
    picked = [options[i] for options, i in zip(rows, chosen, strict=True)]
    return tuple(map(sum, zip(*picked, strict=True)))


def _lowest(rows: Rows, alive: Alive, column: int) -> list[int]:
    """The least of a column in each group."""
    return [min(options[o][column] for o in kept) for options, kept in zip(rows, alive, strict=True)]


def _reduced(rows: Rows, alive: Alive, limits: Limits) -> tuple[Alive, Limits] | None:
    """Without the options that no best choice has and the limits that every choice keeps; None: there is no choice."""
    size = -1
    while size != (size := sum(map(len, alive))):
        for column, limit in limits.items():
            lowest = _lowest(rows, alive, column)
            room = limit - sum(lowest)
            if room < 0:
                return None
            alive = [  # what fits if every other group takes its least
                [o for o in kept if options[o][column] - low <= room]
                for options, kept, low in zip(rows, alive, lowest, strict=True)
            ]
    highest = {c: sum(max(rows[g][o][c] for o in kept) for g, kept in enumerate(alive)) for c in limits}
    limits = {c: limit for c, limit in limits.items() if highest[c] > limit}
    return [_undominated(options, kept, tuple(limits)) for options, kept in zip(rows, alive, strict=True)], limits


def _undominated(options: Sequence[Numbers], kept: Sequence[int], columns: Sequence[int]) -> list[int]:
    """Without the options whose place another one can take in any choice, to come before it in order."""
    found: list[int] = []
    for o in sorted(kept, key=lambda o: (options[o], o)):
        if not any(all(options[p][c] <= options[o][c] for c in columns) for p in found):
            found.append(o)
    return sorted(found)


# --- the relaxation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Relaxed:
    """Bounds from prices, in units of ``2**-shift`` of column 0's.

    ``bound``: no choice within the limits has less in column 0. ``surplus``: by how much each option that is alive
    raises that, by group and option. ``split``: where to branch, by group: the greater, the better.
    """

    shift: int
    bound: int
    surplus: list[dict[int, int]]
    split: list[tuple[bool, float]]

    def gap(self, rows: Rows, chosen: Choice) -> int:
        """How far a choice is above the bound."""
        return (_total(rows, chosen)[0] << self.shift) - self.bound

    def within(self, alive: Alive, most: int) -> Alive:
        """The options whose surplus is no more."""
        return [[o for o in kept if surplus[o] <= most] for kept, surplus in zip(alive, self.surplus, strict=True)]


def _relax(rows: Rows, alive: Alive, limits: Limits) -> _Relaxed:
    """The bounds at the prices of the linear relaxation; should HiGHS find none, at prices of 0."""
    open_groups = [g for g, kept in enumerate(alive) if len(kept) > 1]
    ends = np.cumsum([0] + [len(alive[g]) for g in open_groups])

    def above(column: int, lowest: Sequence[int], whole: int) -> list[float]:
        return [(rows[g][o][column] - lowest[g]) / whole for g in open_groups for o in alive[g]]

    # All on the scale of what is alive: each number is what an option has more than the least of its group, as a part
    # of the greatest such loss, or of the room that a limit leaves when every group takes its least.
    lowest = {c: _lowest(rows, alive, c) for c in (0, *limits)}
    spread = max(1, *(rows[g][o][0] - lowest[0][g] for g in open_groups for o in alive[g]))
    rooms = [limit - sum(lowest[c]) for c, limit in limits.items()]
    losses = np.array(above(0, lowest[0], spread))
    uses = np.array([above(c, lowest[c], room) for c, room in zip(limits, rooms, strict=True)])
    weights, prices = _linear(losses, uses, ends)

    shift = max(0, 60 + max(rooms).bit_length() - spread.bit_length())  # keeps the prices' digits
    rates = {
        c: int(Fraction(price) * (spread << shift) / room)
        for c, price, room in zip(limits, prices.tolist(), rooms, strict=True)
    }
    surplus, bound = [], -sum(rate * limits[c] for c, rate in rates.items())
    for options, kept in zip(rows, alive, strict=True):
        priced = {o: (options[o][0] << shift) + sum(rate * options[o][c] for c, rate in rates.items()) for o in kept}
        cheapest = min(priced.values())
        bound += cheapest
        surplus.append({o: price - cheapest for o, price in priced.items()})

    # A group that the relaxation divides between options, one that matters most for the limits: so the gap closes.
    divided = np.maximum.reduceat(weights, ends[:-1]) < 1 - 1e-6
    spans = np.maximum.reduceat(uses.sum(0), ends[:-1])
    split = [(False, 0.0)] * len(alive)
    for g, is_divided, span in zip(open_groups, divided.tolist(), spans.tolist(), strict=True):
        split[g] = (is_divided, span)
    return _Relaxed(shift, bound, surplus, split)


def _linear(
    losses: NDArray[np.float64], uses: NDArray[np.float64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [n] and prices [limits]: the least of ``losses`` [n] with ``uses`` [limits, n] of at most 1.

    The options ``ends[i]`` to ``ends[i + 1]`` are those of one group: their weights add up to 1. A last variable is the
    part by which the limits are exceeded, at a penalty, so that prices tell of limits that contradict each other too.
    """
    from scipy import optimize, sparse  # half a second that `import qfx` need not take

    n, groups = len(losses), len(ends) - 1
    members = sparse.csr_array((np.ones(n), np.arange(n), ends), shape=(groups, n + 1))
    for penalty in _PENALTIES:
        solution = optimize.linprog(
            np.append(losses, penalty),
            A_ub=np.hstack([uses, -np.ones((len(uses), 1))]),
            b_ub=np.ones(len(uses)),
            A_eq=members,
            b_eq=np.ones(groups),
            method="highs",
        )
        if solution.status != 0:
            return np.ones(n), np.zeros(len(uses))
        if solution.x[-1] < _ROUNDING:
            break
    return solution.x[:-1], np.maximum(0, -solution.ineqlin.marginals)


# --- the enumeration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Partial:
    """``n`` choices for the first of the open groups, in lexicographic order, each an extension of one of ``before``.

    ``surplus`` [n], as a part of the gap, and ``uses`` [n, limits], of the room, are sums of floats that are not
    negative. ``digits`` [n, all columns' digits] is exact: what the choices have more than the least of their groups,
    column by column, each in digits of ``_DIGIT`` bits, the most significant first.
    """

    before: _Partial | None
    parent: NDArray[np.intp]
    option: NDArray[np.intp]
    surplus: NDArray[np.float64]
    uses: NDArray[np.float64]
    digits: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> _Partial:
        return _Partial(
            self.before,
            self.parent[rows],
            self.option[rows],
            self.surplus[rows],
            self.uses[rows],
            self.digits[rows],
        )


class _Enumeration:
    """The choices of the options that are alive, but for what the gap, the limits and dominance exclude.

    ``complete``, after a run: no other choice was left out.
    """

    def __init__(self, rows: Rows, alive: Alive, limits: Limits, relaxed: _Relaxed, gap: int) -> None:
        self.alive, self.complete = alive, True
        self.open = [g for g, kept in enumerate(alive) if len(kept) > 1]
        columns = range(len(rows[0][0]))
        lowest = [_lowest(rows, alive, c) for c in columns]
        above = [[[rows[g][o][c] - lowest[c][g] for c in columns] for o in alive[g]] for g in self.open]
        most = [[max(column) for column in zip(*options, strict=True)] for options in above]  # per open group
        totals = [sum(group[c] for group in most) for c in columns]
        widths = [max(1, -(-total.bit_length() // _DIGIT)) for total in totals]
        ends = np.cumsum([0, *widths]).tolist()
        self.columns = [slice(start, end) for start, end in pairwise(ends)]
        self.digits = [
            np.array([[d for n, width in zip(o, widths, strict=True) for d in _digits(n, width)] for o in options])
            for options in above
        ]
        self.surplus = [np.array([relaxed.surplus[g][o] / max(1, gap) for o in alive[g]]) for g in self.open]
        self.rooms = {c: limit - sum(lowest[c]) for c, limit in limits.items()}
        self.uses = [np.array([[o[c] / room for c, room in self.rooms.items()] for o in options]) for options in above]
        # With so much used, all that can follow fits: less is no better.
        self.free = []
        for group in most:
            totals = [total - n for total, n in zip(totals, group, strict=True)]
            self.free.append({c: max(0, room - totals[c]) for c, room in self.rooms.items()})

    def run(self, width: int, *, beam: bool = False) -> Choice | None:
        """The first choice in order; None: there is none.

        Where more than ``width`` partial choices survive, the run is given up, or goes on with those of least surplus.
        """
        none = np.zeros(1, np.intp)
        uses, digits = np.zeros((1, len(self.rooms))), np.zeros((1, self.columns[-1].stop), np.int64)
        partial = _Partial(None, none, none, np.zeros(1), uses, digits)
        for level in range(len(self.open)):
            partial = self._undominated(self._extended(partial, level), level)
            if len(partial.surplus) > width:
                self.complete = False
                if not beam:
                    return None
                partial = partial.take(np.sort(np.argsort(partial.surplus, kind="stable")[:width]))
        return self._chosen(partial)

    def _extended(self, partial: _Partial, level: int) -> _Partial:
        """Every choice with every option of the next group, but for what exceeds the gap or a limit."""
        surplus = np.add.outer(partial.surplus, self.surplus[level])
        keep = surplus <= 1 + _ROUNDING
        for used, more in zip(partial.uses.T, self.uses[level].T, strict=True):
            keep &= np.add.outer(used, more) <= 1 + _ROUNDING
        parent, option = np.nonzero(keep)
        digits = partial.digits[parent] + self.digits[level][option]
        for column in self.columns:
            for i in range(column.stop - 1, column.start, -1):
                digits[:, i - 1] += digits[:, i] >> _DIGIT
                digits[:, i] &= (1 << _DIGIT) - 1
        uses = partial.uses[parent] + self.uses[level][option]
        return _Partial(partial, parent, option, surplus[keep], uses, digits)

    def _undominated(self, partial: _Partial, level: int) -> _Partial:
        """Without the choices that come after one that uses no more, as far as the next groups can tell.

        A table over the uses has the first in order at or below each of its cells. A cell is a rank among the uses of
        one limit where there are few, else a range of ranks: then only a choice of a lower range surely uses no more.
        """
        n = len(partial.surplus)
        if n < _FEW:
            return partial
        place = np.empty(n, np.intp)
        place[_order(partial.digits)] = np.arange(n)
        size = int((4 * n) ** (1 / len(self.free[level])))
        cells, below = [], []
        for column, free in self.free[level].items():
            rank, floor = self._ranks(partial, column, free)
            rank = np.maximum(rank, floor) - floor
            count = int(rank.max()) + 1
            cell = 1 + (rank if count <= size else rank * size // count)
            cells.append(cell)
            below.append(cell if count <= size else cell - 1)
        table = np.full([int(cell.max()) + 1 for cell in cells], n)
        np.minimum.at(table, tuple(cells), place)
        for axis in range(table.ndim):
            np.minimum.accumulate(table, axis=axis, out=table)
        return partial.take(np.flatnonzero(table[tuple(below)] >= place))

    def _chosen(self, partial: _Partial) -> Choice | None:
        """The first in order of the choices that are within the limits."""
        fits = np.ones(len(partial.surplus), bool)
        for column, room in self.rooms.items():
            ranks, most = self._ranks(partial, column, room)
            fits &= ranks <= most
        if not fits.any():
            return None
        rows = np.flatnonzero(fits)
        row = rows[_order(partial.digits[rows])[0]]
        chosen = [kept[0] for kept in self.alive]
        for g in reversed(self.open):
            chosen[g] = self.alive[g][partial.option[row]]
            row = partial.parent[row]
            assert partial.before is not None
            partial = partial.before
        return tuple(chosen)

    def _ranks(self, partial: _Partial, column: int, number: int) -> tuple[NDArray[np.intp], int]:
        """The ranks of a column's totals, equal ones alike, and the rank of a number among them."""
        totals = partial.digits[:, self.columns[column]]
        numbers = np.vstack([totals, _digits(number, totals.shape[1])])
        order = _order(numbers)
        ranks = np.empty(len(order), np.intp)
        ranks[order] = np.cumsum(np.r_[False, (np.diff(numbers[order], axis=0) != 0).any(1)])
        return ranks[:-1], int(ranks[-1])


def _digits(number: int, width: int) -> list[int]:
    """The number in ``width`` digits, the most significant first; the greatest that there is in place of a greater."""
    number = min(number, (1 << _DIGIT * width) - 1)
    return [number >> _DIGIT * i & (1 << _DIGIT) - 1 for i in reversed(range(width))]


def _order(digits: NDArray[np.int64]) -> NDArray[np.intp]:
    """The rows in lexicographic order; equal rows stay in theirs."""
    return np.lexsort(digits.T[::-1])
