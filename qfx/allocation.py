"""One option for every group, at the least total loss within budgets: the multiple-choice knapsack.

The groups are layers and the options their bit widths, but nothing here knows of either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType

from qfx.errors import ConfigError
from qfx.knapsack import Bounded, Choice, Column, least, total


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

    A budget holds when :func:`total_cost` is no greater. How exact the least is, and which of two equals is taken, says
    :func:`qfx.knapsack.least`. A group whose options do not name a resource costs none of it. Without budgets each
    group takes its least loss.

    Raises:
        ConfigError: no groups, or a group without options; a loss, cost or budget that is negative or not finite;
            options of one group that name different resources; a budget for a resource that no option names.
        InfeasibleBudget: no choice is within the budgets; ``least`` says what could be had.
    """
    _check(groups, budgets)
    chosen = least(_losses(groups), _bounded(groups, budgets))
    if chosen is None:
        raise _refusal(groups, budgets)
    return chosen


def pareto(
    groups: Sequence[Sequence[Option]], resource: str, *, points: int = 20, budgets: Mapping[str, float] | None = None
) -> tuple[Choice, ...]:
    """Choices that trade ``resource`` against loss, within ``budgets``: from the cheapest to the one of least loss.

    At most ``points`` of them, fewer where there are no more between equally spaced budgets. Each is what :func:`solve`
    finds for such a budget, so that it is better than any that is cheaper.

    Raises:
        ConfigError: as :func:`solve`; or fewer than two points.
        InfeasibleBudget: no choice is within ``budgets``.
    """
    if points < 2:
        raise ConfigError(f"a trade-off has at least two points, got points={points}")
    budgets = dict(budgets or {})
    _check(groups, {resource: 0.0, **budgets})
    bounded, cost, losses = _bounded(groups, budgets), _costs(groups, resource), _losses(groups)
    costliest, cheapest = least(losses, bounded), least(cost, bounded)
    if costliest is None or cheapest is None:
        raise _refusal(groups, budgets)
    low, high = total(cost, cheapest), total(cost, costliest)
    found = [costliest]
    for step in reversed(range(points - 1)):
        limit = low + (high - low) * step / (points - 1)
        if limit < total(cost, found[-1]):  # otherwise the last choice is the best for this limit too
            chosen = least(losses, [*bounded, Bounded(cost, limit)])
            if chosen is not None and total(losses, chosen) > total(losses, found[-1]):
                found.append(chosen)
            elif chosen is not None:  # as good, and cheaper
                found[-1] = chosen
    return tuple(reversed(found))


def total_loss(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    """The sum of the chosen options' losses, rounded once."""
    return total(_losses(groups), chosen)


def total_cost(groups: Sequence[Sequence[Option]], chosen: Sequence[int], resource: str) -> float:
    """The sum of the chosen options' costs, rounded once; a group that does not name the resource costs none of it.

    Raises:
        ConfigError: no option names the resource.
    """
    _known(resource, {name for options in groups for option in options for name in option.costs})
    return total(_costs(groups, resource), chosen)


def _losses(groups: Sequence[Sequence[Option]]) -> Column:
    return [[float(option.loss) for option in options] for options in groups]


def _costs(groups: Sequence[Sequence[Option]], resource: str) -> Column:
    return [[float(option.costs.get(resource, 0.0)) for option in options] for options in groups]


def _bounded(groups: Sequence[Sequence[Option]], budgets: Mapping[str, float]) -> list[Bounded]:
    return [Bounded(_costs(groups, name), float(budget)) for name, budget in budgets.items()]


# --- bad input --------------------------------------------------------------------------------------------------------


def _check(groups: Sequence[Sequence[Option]], budgets: Mapping[str, float]) -> None:
    if not groups:
        raise ConfigError("there are no groups to choose for")
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
    for name, budget in budgets.items():
        _known(name, known)
        if not _sound(budget):
            raise ConfigError(f"the budget of {name} is {budget!r}: it is no finite number >= 0")


def _sound(number: object) -> bool:
    return isinstance(number, Real) and 0 <= float(number) < math.inf


def _known(name: str, known: set[str]) -> None:
    if name not in known:
        raise ConfigError(f"no option names the resource {name!r}", hint=f"those named are {_list(known)}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


# --- infeasible budgets -----------------------------------------------------------------------------------------------


def _refusal(groups: Sequence[Sequence[Option]], budgets: Mapping[str, float]) -> InfeasibleBudget:
    found, alone = {}, {}
    for name in budgets:
        cost = _costs(groups, name)
        others = _bounded(groups, {other: budget for other, budget in budgets.items() if other != name})
        alone[name] = math.fsum(map(min, cost))
        chosen = least(cost, others)
        found[name] = alone[name] if chosen is None else total(cost, chosen)
    return InfeasibleBudget(budgets, found, alone)


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
