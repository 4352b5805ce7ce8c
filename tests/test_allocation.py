"""The best choice within budgets: brute force, a dynamic programme and an integer solver agree; what is refused."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.allocation import InfeasibleBudget, Option, pareto, solve, total_cost, total_loss
from qfx.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("error::qfx.QfxWarning")  # each of these proofs is found

Groups = list[list[Option]]
UNIT = 2**1074  # a multiple of the denominator of every float


def brute_force(groups: Groups, budgets: Mapping[str, float]) -> tuple[int, ...] | None:
    """The best of all choices, every one of them summed in whole units; None: none is within the budgets."""
    names = {name for options in groups for name in options[0].costs}
    order = list(dict.fromkeys([*budgets, *sorted(names)]))

    def totals(number: Callable[[Option], float]) -> Any:  # of all choices, in lexicographic order
        units = [np.array([int(Fraction(number(o)) * UNIT) for o in options], dtype=object) for options in groups]
        return reduce(np.add.outer, units).reshape(-1)

    rows = np.arange(math.prod(map(len, groups)))
    costs = {name: totals(lambda o, name=name: o.costs.get(name, 0)) for name in order}
    for name, budget in budgets.items():
        rows = rows[[total / UNIT <= budget for total in costs[name][rows]]]
    for column in (totals(lambda o: o.loss), *costs.values()):
        if len(rows):
            rows = rows[column[rows] == column[rows].min()]
    return tuple(map(int, np.unravel_index(rows[0], [len(o) for o in groups]))) if len(rows) else None


def check(groups: Groups, budgets: Mapping[str, float]) -> tuple[int, ...] | None:
    """What ``solve`` says, after it was compared with brute force; None: infeasible."""
    expected = brute_force(groups, budgets)
    if expected is not None:
        chosen = solve(groups, budgets)
        assert total_loss(groups, chosen) == pytest.approx(total_loss(groups, expected), rel=1e-12, abs=0)
        assert all(total_cost(groups, chosen, name) <= budget for name, budget in budgets.items())
        return chosen
    with pytest.raises(InfeasibleBudget) as caught:
        solve(groups, budgets)
    for name in budgets:
        others = {other: budget for other, budget in budgets.items() if other != name}
        cheapest = brute_force([[Option(o.costs.get(name, 0), o.costs) for o in options] for options in groups], others)
        if cheapest is None:
            assert caught.value.least[name] == caught.value.alone[name]
        else:
            assert caught.value.least[name] == total_cost(groups, cheapest, name)
    return None


KINDS: tuple[Callable[[random.Random], float], ...] = (
    lambda r: r.random(),
    lambda r: 10 ** r.uniform(-9, 3),
    lambda r: 10 ** r.uniform(-3, 12),
    lambda r: r.randint(0, 3),
    lambda r: r.randint(0, 30) / 10,
    lambda r: 10**12 - r.randint(0, 9),
    lambda r: r.randint(1, 64) * 1152,
    lambda r: 4.0 ** -r.randint(1, 8),
)


def instance(seed: int, most_groups: int) -> tuple[Groups, dict[str, float]]:
    """Up to four options a group and three budgets; numbers of one kind each; half of the budgets are met exactly."""
    r = random.Random(seed)
    names = ["weight_bytes", "latency_ms", "bit_operations"][: r.randint(1, 3)]
    r.shuffle(names)
    kinds = {name: r.choice(KINDS) for name in ("loss", *names)}
    groups = [
        [Option(kinds["loss"](r), {n: kinds[n](r) for n in names}) for _ in range(r.randint(1, 4))]
        for _ in range(r.randint(1, most_groups))
    ]
    some = [r.randrange(len(options)) for options in groups]
    budgets = {}
    for name in names:
        budgets[name] = total_cost(groups, some, name)
        match r.randrange(4):
            case 0:
                budgets[name] *= r.uniform(0.5, 1.5)
            case 1:
                budgets[name] = math.nextafter(budgets[name], 0)
    return groups, budgets


# --- the optimum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
def test_brute_force_agrees(block: int) -> None:
    seeds = range(50 * block, 50 * block + 50)
    outcomes = [check(*instance(seed, 8 if seed % 10 == 0 else 6)) for seed in seeds]
    assert sum(chosen is not None for chosen in outcomes) > 30
    assert sum(chosen is None for chosen in outcomes) > 2


numbers = st.one_of(
    st.integers(0, 3),
    st.floats(0, 1e12),
    st.floats(1e-9, 1e3),
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 1e12, 1e12 + 1]),
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_brute_force_agrees_on_any_floats(data: st.DataObject) -> None:
    options = st.builds(lambda loss, a, b: Option(loss, {"a": a, "b": b}), numbers, numbers, numbers)
    groups = data.draw(st.lists(st.lists(options, min_size=1, max_size=3), min_size=1, max_size=4))
    some = [data.draw(st.integers(0, len(o) - 1)) for o in groups]
    budgets = {"a": total_cost(groups, some, "a"), "b": data.draw(numbers)}
    check(groups, budgets)
    del budgets["b"]
    assert check(groups, budgets) is not None


@pytest.mark.parametrize("seed", range(3))
def test_a_dynamic_programme_agrees(seed: int) -> None:
    r = random.Random(seed)
    groups = [[Option(r.randint(0, 10**6), {"bytes": r.randint(1, 50)}) for _ in range(5)] for _ in range(100)]
    budget = 2000
    least = np.zeros(budget + 1)  # by budget, over the groups so far
    for options in groups:
        tables = [np.pad(least, (o.costs["bytes"], 0), constant_values=np.inf)[: budget + 1] + o.loss for o in options]
        least = np.min(tables, axis=0)
    assert total_loss(groups, solve(groups, {"bytes": budget})) == least[budget]


def test_losses_far_below_the_greatest_count() -> None:
    heavy = [Option(0.0, {"bytes": 1e9}), Option(1e3, {"bytes": 1})]
    light = [[Option(i * 1e-9, {"bytes": 4 - i}) for i in range(4)] for _ in range(6)]
    chosen = solve([heavy, *light], {"bytes": 1e9 + 13})
    assert total_loss([heavy, *light], chosen) == pytest.approx(11e-9)  # 24 bytes are wanted, 13 are left
    assert total_cost([heavy, *light], chosen, "bytes") == 1e9 + 13


def test_one_unit_in_a_million_million_counts() -> None:
    groups = [[Option(1.0, {"ops": 10**12}), Option(0.0, {"ops": 10**12 + 1})] for _ in range(6)]
    for spare in range(7):
        chosen = solve(groups, {"ops": 6 * 10**12 + spare})
        assert sum(chosen) == spare


def test_a_hundred_layers_alike() -> None:
    groups = [[Option(4.0**-bits, {"bits": 1000 * bits}) for bits in (2, 3, 4, 8)] for _ in range(100)]
    chosen = solve(groups, {"bits": 350_000})
    assert sorted(chosen) == [1] * 50 + [2] * 50


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_no_budget_takes_the_least_loss() -> None:
    groups = [[Option(2.0, {"a": 1}), Option(1.0, {"a": 9})], [Option(0.5, {"a": 1})]]
    assert solve(groups, {}) == (1, 0)


def test_a_budget_that_never_binds_takes_the_least_loss() -> None:
    groups = [[Option(2.0, {"a": 1}), Option(1.0, {"a": 9})] for _ in range(3)]
    assert solve(groups, {"a": 27}) == (1, 1, 1)
    assert solve(groups, {"a": 1.7976931348623157e308}) == (1, 1, 1)


def test_a_budget_of_a_total_that_was_rounded_holds() -> None:
    groups = [[Option(1.0, {"ms": 0.0}), Option(0.0, {"ms": ms})] for ms in (0.1, 0.2, 0.7, 0.3)]
    total = total_cost(groups, (1, 1, 1, 1), "ms")
    assert Fraction(0.1) + Fraction(0.2) + Fraction(0.7) + Fraction(0.3) != Fraction(total)
    assert solve(groups, {"ms": total}) == (1, 1, 1, 1)
    assert sum(solve(groups, {"ms": math.nextafter(total, 0)})) == 3


def test_a_group_that_does_not_name_a_resource_costs_none_of_it() -> None:
    groups = [[Option(1.0, {"bytes": 0}), Option(0.0, {"bytes": 5})], [Option(0.5, {}), Option(0.25, {})]]
    assert solve(groups, {"bytes": 4}) == (0, 1)
    assert total_cost(groups, (1, 1), "bytes") == 5


def test_every_group_has_one_option() -> None:
    groups = [[Option(1.0, {"a": 3, "b": 1})], [Option(2.0, {"a": 4, "b": 1})]]
    assert solve(groups, {"a": 7, "b": 2}) == (0, 0)


# --- ties -------------------------------------------------------------------------------------------------------------


def test_ties_within_a_group_go_to_the_lower_cost_then_to_the_earlier_option() -> None:
    dear, cheap = Option(1.0, {"a": 2, "b": 1}), Option(1.0, {"a": 1, "b": 2})
    assert solve([[dear, cheap, cheap]], {"a": 9}) == (1,)
    assert solve([[dear, cheap]], {"b": 9}) == (0,)
    assert solve([[dear, cheap, dear]], {}) == (0,)


# --- what cannot be met -----------------------------------------------------------------------------------------------

PAIR: Groups = [[Option(1.0, {"bytes": 1, "ms": 8}), Option(0.0, {"bytes": 4, "ms": 2})] for _ in range(3)]


def test_one_budget_is_too_small() -> None:
    with pytest.raises(InfeasibleBudget, match=r"bytes 2 is too small: the least that these .* have is 3\n") as e:
        solve(PAIR, {"bytes": 2})
    assert e.value.least == e.value.alone == {"bytes": 3}
    assert solve(PAIR, e.value.least) == (0, 0, 0)


def test_one_budget_is_too_small_beside_another() -> None:
    with pytest.raises(InfeasibleBudget) as e:
        solve(PAIR, {"bytes": 2, "ms": 12})
    assert e.value.what == (
        "bytes 2 is too small: the least that these layers can have is 3, and 9 within the other budgets"
    )
    assert e.value.least == {"bytes": 9, "ms": 6}  # no choice has 2 bytes: ms alone
    assert e.value.alone == {"bytes": 3, "ms": 6}


def test_two_budgets_contradict_each_other() -> None:
    with pytest.raises(InfeasibleBudget) as e:
        solve(PAIR, {"bytes": 6, "ms": 12.5})
    assert e.value.what == (
        "bytes 6 and ms 12.5 cannot be met together: within the other budgets the least bytes is 9, alone 3; "
        "within the other budgets the least ms is 18, alone 6"
    )
    assert e.value.budgets == {"bytes": 6, "ms": 12.5}
    for name in ("bytes", "ms"):
        least = {**e.value.budgets, name: e.value.least[name]}
        assert solve(PAIR, least)
        with pytest.raises(InfeasibleBudget):
            solve(PAIR, {**least, name: math.nextafter(least[name], 0)})


def test_two_pairs_of_budgets_contradict_each_other() -> None:
    def either(a: str, b: str) -> list[Option]:
        zero = dict.fromkeys("abcd", 0)
        return [Option(1.0, {**zero, a: 1}), Option(1.0, {**zero, b: 1})]

    with pytest.raises(InfeasibleBudget, match="a 0 and b 0 and c 0 and d 0 cannot be met together, though each") as e:
        solve([either("a", "b"), either("c", "d")], dict.fromkeys("abcd", 0))
    assert set(e.value.least.values()) == {0}


def test_the_refusal_survives_pickling() -> None:
    with pytest.raises(InfeasibleBudget) as e:
        solve(PAIR, {"bytes": 2, "ms": 12})
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.least, again.alone) == (str(e.value), e.value.least, e.value.alone)


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0, -0.5, "4", None])
def test_numbers_that_are_no_cost_are_refused(number: Any) -> None:
    good = Option(1.0, {"a": 1})
    with pytest.raises(ConfigError, match="loss of option 1 of group 2 is"):
        solve([[good], [good], [good, Option(number, {"a": 1})]], {})
    with pytest.raises(ConfigError, match="a of option 0 of group 1 is"):
        solve([[good], [Option(1.0, {"a": number})]], {"a": 5})
    with pytest.raises(ConfigError, match="the budget of a is"):
        solve([[good]], {"a": number})


def test_unknown_resources_are_refused() -> None:
    uses: tuple[Callable[[], object], ...] = (
        lambda: solve(PAIR, {"byte": 5}),
        lambda: pareto(PAIR, "byte"),
        lambda: total_cost(PAIR, [0] * 3, "byte"),
    )
    for use in uses:
        with pytest.raises(ConfigError, match="no option names the resource 'byte'") as e:
            use()
        assert "bytes, ms" in e.value.hint


def test_options_of_a_group_name_the_same_resources() -> None:
    with pytest.raises(ConfigError, match="option 1 of group 1 names other resources than option 0: a and not a, b"):
        solve([[Option(1.0, {"b": 1})], [Option(1.0, {"a": 1, "b": 1}), Option(0.0, {"a": 1})]], {"b": 1})


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="no groups"):
        solve([], {})
    with pytest.raises(ConfigError, match="group 1 has no options"):
        solve([[Option(1.0, {})], []], {})


# --- the trade-off ----------------------------------------------------------------------------------------------------


def front(groups: Groups) -> list[tuple[float, float]]:
    """All non-dominated pairs of cost and loss, by brute force."""
    pairs = {
        (total_cost(groups, c, "a"), total_loss(groups, c)) for c in itertools.product(*(range(len(o)) for o in groups))
    }
    return sorted(p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs))


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_brute_force(seed: int) -> None:
    r = random.Random(seed)
    groups = [[Option(r.randint(0, 9), {"a": r.randint(1, 9)}) for _ in range(3)] for _ in range(4)]
    everything = front(groups)
    found = [(total_cost(groups, c, "a"), total_loss(groups, c)) for c in pareto(groups, "a", points=200)]
    assert found == everything  # 200 budgets over at most 32 costs
    few = [(total_cost(groups, c, "a"), total_loss(groups, c)) for c in pareto(groups, "a", points=3)]
    assert set(few) <= set(everything) and len(few) <= 3
    assert (few[0], few[-1]) == (everything[0], everything[-1])


def test_each_point_is_the_optimum_of_its_own_budget() -> None:
    r = random.Random(7)
    groups = [[Option(r.random(), {"a": r.random(), "b": r.random()}) for _ in range(4)] for _ in range(30)]
    chosen = pareto(groups, "a", points=6, budgets={"b": 9.0})
    assert len(chosen) == 6
    for c in chosen:
        assert total_cost(groups, c, "b") <= 9.0
        best = solve(groups, {"a": total_cost(groups, c, "a"), "b": 9.0})
        assert total_loss(groups, best) == pytest.approx(total_loss(groups, c), rel=1e-12)
    costs, losses = [total_cost(groups, c, "a") for c in chosen], [total_loss(groups, c) for c in chosen]
    assert costs == sorted(set(costs)) and losses == sorted(set(losses), reverse=True)


def test_a_budget_of_the_resource_ends_the_front() -> None:
    groups = [[Option(2.0, {"a": 1}), Option(1.0, {"a": 2}), Option(0.0, {"a": 9})] for _ in range(2)]
    assert [total_cost(groups, c, "a") for c in pareto(groups, "a", budgets={"a": 4})] == [2, 3, 4]


def test_a_front_may_be_one_point() -> None:
    assert pareto([[Option(1.0, {"a": 1}), Option(1.0, {"a": 2})]], "a") == ((0,),)


def test_a_front_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="points=1"):
        pareto(PAIR, "bytes", points=1)
    with pytest.raises(InfeasibleBudget, match="ms 5 is too small"):
        pareto(PAIR, "bytes", budgets={"ms": 5})


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_values() -> None:
    costs = {"a": 1.0, "b": 2.0}
    option = Option(0.5, costs)
    costs["a"] = 9.0
    assert option == Option(0.5, {"b": 2.0, "a": 1.0}) and hash(option) == hash(Option(0.5, {"b": 2.0, "a": 1.0}))
    assert option != Option(0.5, {"a": 1.0}) and option != Option(0.25, option.costs)
    assert pickle.loads(pickle.dumps(option)) == option
    with pytest.raises(TypeError):
        option.costs["a"] = 3.0  # type: ignore[index]


def test_numbers_of_numpy_are_numbers() -> None:
    groups: Sequence[Sequence[Option]] = [
        [Option(np.float32(1.0), {"a": np.int64(1)}), Option(np.float64(0.5), {"a": np.int64(2**53 + 1)})]
    ]
    assert solve(groups, {"a": 2**53 + 1}) == (1,)
    assert solve(groups, {"a": 2**53 - 1}) == (0,)
