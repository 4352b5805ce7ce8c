"""Allocation: the least damage within budgets, against all choices there are; pins, couplings and users' rules."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qfx.allocation import InfeasibleBudget
from qfx.bit_allocation import Allocation, allocate_bits, ladder, pareto_front
from qfx.budget import Budget
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.sensitivity_table import Sensitivity
from qfx.widths import Trial

WIDTHS = (2, 4, 8)


def facts(name: str, shape: tuple[int, ...] = (8, 10), **options: Any) -> LayerFacts:
    """A layer of widths 2, 4, 8 on data of 8 bits; a product where it has no shape."""
    choices = tuple(Choice(w, 8) for w in WIDTHS) if shape else (Choice(None, 8),)
    known: dict[str, Any] = {
        "key": f"{name}:linear",
        "path": name,
        "op": "linear",
        "weight_shape": shape,
        "scales": shape[0] if shape else 0,
        "macs": 100,
        "end": False,
        "qconfig": Recipe.int8().default,
        "given": choices[-1],
        "fixed": False,
        "choices": (*choices, FLOAT),
    }
    return LayerFacts(**{**known, **options})


def table(
    layers: list[LayerFacts], damages: dict[str, tuple[float, ...]] | None = None, groups: Any = None, **options: Any
) -> Sensitivity:
    """``damages``: of 2, 4 and 8 bits, by the layer's name."""
    found = {}
    for i, layer in enumerate(layers):
        given_damages = (damages or {}).get(layer.path, (0.4 + 0.1 * i, 0.04 + 0.01 * i, 0.001))
        if layer.weight_shape:
            found |= {Trial(layer.key, "weight", b): d for b, d in zip(WIDTHS, given_damages, strict=True)}
    known: dict[str, Any] = {
        "model": "Net",
        "recipe": Recipe.int8(),
        "target": "reference",
        "score": "kl",
        "unit": "nats",
        "mode": "only",
        "rows": 32,
        "layers": tuple(layers),
        "groups": tuple((i,) for i in range(len(layers))) if groups is None else groups,
        "scores": found,
        "damages": found,
    }
    return Sensitivity(**{**known, **options})


def bits(found: Allocation) -> list[int | None]:
    return [choice.weight for choice in found.choices]


# --- the least damage -------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)), min_size=1, max_size=4
    ),
    st.floats(2.0, 9.0),
    st.integers(0, 3),
)
def test_against_all_choices_there_are(drawn: Any, average: float, seed: int) -> None:
    layers = [facts(f"l{i}", (2, columns)) for i, (columns, _) in enumerate(drawn)]
    found = table(layers, {f"l{i}": tuple(d) for i, (_, d) in enumerate(drawn)})
    operations = 100.0 * 8 * len(layers) * (4, 6, 8, 40)[seed]
    budget = Budget(average_weight_bits=average, bit_operations=operations)
    bounds = budget.bounds(layers)
    every = [Allocation(found, c, None) for c in itertools.product(*(x.choices[:-1] for x in layers))]

    def fits(a: Allocation) -> bool:
        sums = {n: math.fsum(x.costs(c)[n] for x, c in zip(layers, a.choices, strict=True)) for n in bounds}
        return all(sums[n] <= bounds[n] for n in bounds)

    feasible = [a for a in every if fits(a)]
    assume(feasible)
    best = allocate_bits(found, budget, pin=None)
    assert fits(best) and best.damage == min(a.damage for a in feasible)


@pytest.mark.parametrize("average", [2.0, 3.0, 4.5, 8.0])
def test_average_bits_hold(average: float) -> None:
    found = allocate_bits(table([facts(f"l{i}", (2, 5 + i)) for i in range(5)]), Budget(average), pin=None)
    assert found.costs["average_weight_bits"] <= average
    elements = sum(2 * (5 + i) for i in range(5))
    exact = sum(b * 2 * (5 + i) for i, b in enumerate(bits(found)) if b) / elements
    assert found.costs["average_weight_bits"] == pytest.approx(exact)


def test_several_budgets_hold_together() -> None:
    layers = [facts(f"l{i}", (4, 10), macs=1000 * (i + 1)) for i in range(4)]
    layers = [
        replace(x, times=tuple((c, float(i) + (c.weight or 32) / 8) for c in x.choices)) for i, x in enumerate(layers)
    ]
    budget = Budget(average_weight_bits=5, weight_bytes=170, bit_operations=3.5e5, latency_ms=9.0)
    found = allocate_bits(table(layers), budget, pin=None)
    assert found.costs.keys() == {"average_weight_bits", "weight_bytes", "bit_operations", "latency_ms"}
    assert all(found.costs[name] <= bound for name, bound in budget.given.items())


def test_without_a_budget() -> None:
    layers = [facts(f"l{i}") for i in range(4)]
    found = allocate_bits(table(layers), Budget(), pin=None)
    assert found.costs["weight_bytes"] <= 0.75 * sum(x.costs(x.given)["weight_bytes"] for x in layers)
    assert set(bits(found)) != {2}


def test_without_a_budget_pinned_layers_may_take_more_than_the_share() -> None:
    layers = [facts("first", (8, 100), end=True), facts("mid", (2, 3)), facts("last", end=True)]
    assert bits(allocate_bits(table(layers), Budget())) == [8, 2, 8]
    assert bits(allocate_bits(table(layers[:1]), Budget())) == [8]


def test_float_only_where_it_is_allowed() -> None:
    layers = [facts("a"), facts("b")]
    assert FLOAT not in allocate_bits(table(layers), Budget(32.0), pin=None).choices
    assert allocate_bits(table(layers), Budget(32.0), pin=None, allow_float=True).choices == (FLOAT, FLOAT)
    mixed = allocate_bits(table(layers, {"a": (9.0, 9.0, 9.0)}), Budget(20.0), pin=None, allow_float=True)
    assert mixed.choices == (FLOAT, Choice(8, 8))


@pytest.mark.parametrize("columns", range(1, 60, 7))
def test_an_average_that_was_reported_is_met(columns: int) -> None:
    layers = [facts("a", (3, 7)), facts("b", (1, columns)), facts("c", (2, 5))]
    for choices in itertools.product(*(x.choices[:-1] for x in layers)):
        average = Allocation(table(layers), choices, None).costs["average_weight_bits"]
        assert allocate_bits(table(layers), Budget(average), pin=None).costs["average_weight_bits"] <= average
    with pytest.raises(InfeasibleBudget) as caught:
        allocate_bits(table(layers), Budget(1.9), pin=None)
    assert caught.value.budgets == {"average_weight_bits": pytest.approx(1.9)}


def test_budgets_that_nothing_meets_name_the_least() -> None:
    layers = [facts("a", end=True), facts("b")]
    with pytest.raises(InfeasibleBudget, match="average_weight_bits 4 is too small") as caught:
        allocate_bits(table(layers), Budget(4.0))
    assert caught.value.least == {"average_weight_bits": 5.0}  # 8 at the end, 2 else
    assert isinstance(caught.value, ConfigError)
    assert allocate_bits(table(layers), Budget(caught.value.least["average_weight_bits"])).choices[1] == Choice(2, 8)
    with pytest.raises(InfeasibleBudget) as caught:
        allocate_bits(table(layers), Budget(weight_bytes=10), pin=None)
    assert caught.value.least == {"weight_bytes": 2 * (8 * 3 + 8 * 4)}


def test_latency_must_have_been_measured() -> None:
    with pytest.raises(ConfigError, match="no layer's time was measured"):
        allocate_bits(table([facts("a")]), Budget(latency_ms=1.0))


def test_scores_of_all_but_one_do_not_add_up() -> None:
    with pytest.raises(ConfigError, match="do not add up"):
        allocate_bits(table([facts("a")], mode="all_but"), Budget(8.0))


# --- pins, couplings, rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "expected"),
    [(8, Choice(8, 8)), (4, Choice(4, 8)), ("float", FLOAT), (None, Choice(2, 8))],
    ids=str,
)
def test_first_and_last_layers(pin: Any, expected: Choice) -> None:
    layers = [facts("first", end=True), facts("mid"), facts("last", end=True)]
    budget = Budget(average_weight_bits={"float": 30.0, None: 2.0}.get(pin, (2 * 8 + 2) / 3 if pin == 8 else 10 / 3))
    found = allocate_bits(table(layers), budget, pin=pin)
    assert found.choices[0] == found.choices[2] == expected
    assert pin == "float" or found.choices[1] == Choice(2, 8)
    assert found.pin == pin


def test_what_is_coupled_with_an_end_is_pinned_with_it() -> None:
    layers = [facts("first", end=True), facts("beside"), facts("other")]
    found = allocate_bits(table(layers, groups=((0, 1), (2,))), Budget(6.0))
    assert bits(found) == [8, 8, 2]


def test_a_pin_that_was_not_measured() -> None:
    with pytest.raises(ConfigError, match="no choice of bits that first can all have") as caught:
        allocate_bits(table([facts("first", end=True)]), Budget(8.0), pin=6)
    assert "measure more widths" in caught.value.hint


@given(st.floats(2.0, 8.0), st.lists(st.floats(0.0, 1.0), min_size=9, max_size=9))
def test_coupled_layers_get_one_choice(average: float, d: list[float]) -> None:
    layers = [facts("a", (2, 9)), facts("b", (4, 5)), facts("c", (3, 7)), facts("product", ())]
    damages = {name: tuple(d[3 * i : 3 * i + 3]) for i, name in enumerate("abc")}
    found = allocate_bits(table(layers, damages, ((0, 2, 3), (1,))), Budget(average), pin=None)
    assert found.choices[0] == found.choices[2] and found.choices[3] == Choice(None, 8)


def test_a_product_goes_float_with_those_it_is_coupled_with() -> None:
    layers = [facts("a"), facts("product", ())]
    found = allocate_bits(table(layers, {"a": (1.0, 1.0, 1.0)}, ((0, 1),)), Budget(32.0), pin=None, allow_float=True)
    assert found.choices == (FLOAT, FLOAT)


def test_only_what_every_member_can_have() -> None:
    narrow = facts("narrow", choices=(Choice(8, 8), FLOAT))
    found = allocate_bits(table([narrow, facts("any")], groups=((0, 1),)), Budget(8.0), pin=None)
    assert bits(found) == [8, 8]
    with pytest.raises(InfeasibleBudget):
        allocate_bits(table([narrow, facts("any")], groups=((0, 1),)), Budget(7.0), pin=None)


def test_layers_with_a_rule_of_the_users_keep_it() -> None:
    layers = [facts("first", end=True, fixed=True, given=Choice(2, 8)), facts("mid", fixed=True), facts("other")]
    found = allocate_bits(table(layers), Budget(4.0))
    assert bits(found) == [2, 8, 2]
    rules = found.recipe().rules
    assert [rule.layer for rule in rules] == ["other"]


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_says_why() -> None:
    layers = [facts("first", end=True), facts("mid"), facts("block.product", (), op="matmul")]
    base = Recipe.int8().skip("gone")
    found = allocate_bits(table(layers, recipe=base), Budget(6.0))
    recipe = found.recipe()
    assert recipe.name == "int8_auto" and recipe.rules[-1] == base.rules[0]
    first, mid, product = recipe.rules[:3]
    assert (first.op, first.layer, first.exact, first.own) == ("linear", "first", True, False)
    assert first.why == "a first or last layer; kl 0.001 at W8 (nats)"
    assert mid.why == "kl 0.05 at W4 (nats)" and mid.qconfig is not None and mid.qconfig.weight.bits == 4
    assert product.op == "matmul" and product.why == "the search chose WFA8"
    assert "a first or last layer" not in allocate_bits(table(layers), Budget(6.0), pin=None).recipe().rules[0].why


def test_one_rule_for_each_place() -> None:
    layers = [facts("m", key="m:linear:a"), facts("m", key="m:linear:b")]
    found = table(layers, groups=((0, 1),))
    scores = {Trial(x.key, "weight", b): 1.0 / b for x in layers for b in WIDTHS}
    recipe = allocate_bits(replace(found, scores=scores, damages=scores), Budget(4.0), pin=None).recipe()
    assert [rule.layer for rule in recipe.rules] == ["m"]


def test_float_choices_become_float_rules() -> None:
    found = allocate_bits(table([facts("a", end=True)]), Budget(32.0), pin="float")
    (rule,) = found.recipe().rules
    assert rule.qconfig is None


def test_plain_values_for_json() -> None:
    found = allocate_bits(table([facts("a"), facts("b")]), Budget(4.0), pin=None)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["choices"]["a:linear"] == {"weight": 4, "activation": 8}
    assert again["damage"] == found.damage and again["costs"]["average_weight_bits"] == 4.0
    assert found.score(found.sensitivity.layers[0], Choice(4, 8)) == 0.04
    assert found.score(found.sensitivity.layers[0], FLOAT) is None


# --- the front and the ladder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", ["average_weight_bits", "weight_bytes", "bit_operations"])
@pytest.mark.parametrize("allow_float", [True, False])
def test_the_front_is_monotone(resource: str, allow_float: bool) -> None:
    layers = [facts(f"l{i}", (2 + i, 9), macs=10 * i + 1) for i in range(5)]
    found = table(layers, groups=((0,), (1, 3), (2,), (4,)))
    front = pareto_front(found, resource, points=9, pin=None, allow_float=allow_float)
    assert 2 < len(front) <= 9
    for cheap, dear in itertools.pairwise(front):
        assert cheap.costs[resource] < dear.costs[resource] and cheap.damage > dear.damage
    assert all(a.choices[1] == a.choices[3] for a in front)
    assert set(bits(front[0])) == {2}
    assert (set(front[-1].choices) == {FLOAT}) is allow_float
    for point in front:  # each is the best for what it costs
        budget = Budget(**{resource: point.costs[resource]})
        assert allocate_bits(found, budget, pin=None, allow_float=allow_float).damage <= point.damage


def test_the_front_of_what_was_not_measured() -> None:
    with pytest.raises(ConfigError, match="no layer's time"):
        pareto_front(table([facts("a")]), "latency_ms")
    with pytest.raises(ConfigError, match="no option names the resource 'speed'"):
        pareto_front(table([facts("a")]), "speed", pin=None)


@given(st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12), st.floats(2.0, 8.0))
def test_the_ladder_leads_to_float(d: list[float], average: float) -> None:
    layers = [facts(f"l{i}") for i in range(3)] + [facts("product", ())]
    damages = {f"l{i}": tuple(sorted(d[3 * i : 3 * i + 3], reverse=True)) for i in range(3)}
    start = allocate_bits(table(layers, damages, ((0, 3), (1,), (2,))), Budget(average), pin=None)
    rungs = ladder(start)
    assert rungs[0] == start and set(rungs[-1].choices) == {FLOAT}
    assert len(rungs) <= 1 + 3 * len(WIDTHS)
    for below, above in itertools.pairwise(rungs):
        pairs = list(zip(below.choices, above.choices, strict=True))
        assert all((a.weight or 32) <= (b.weight or 32) for a, b in pairs)
        assert all((a.activation or 32) <= (b.activation or 32) for a, b in pairs)
        changed = {i for i, (a, b) in enumerate(pairs) if a != b}
        assert changed <= {0, 3} or len(changed) == 1  # one group at a time
        assert above.damage <= below.damage


def test_the_ladder_widens_what_does_most_damage() -> None:
    layers = [facts("a"), facts("b"), facts("kept", fixed=True, given=Choice(2, 8))]
    found = table(layers, {"a": (0.5, 0.3, 0.1), "b": (0.9, 0.05, 0.0), "kept": (9.0, 9.0, 9.0)})
    start = Allocation(found, (Choice(2, 8), Choice(2, 8), Choice(2, 8)), None)
    assert [bits(rung) for rung in ladder(start)] == [
        [2, 2, 2],
        [2, 4, 2],
        [4, 4, 2],
        [8, 4, 2],
        [None, 4, 2],
        [None, 8, 2],
        [None, None, 2],
    ]


def test_the_ladder_from_pinned_layers() -> None:
    layers = [facts("first", end=True), facts("mid")]
    rungs = ladder(allocate_bits(table(layers), Budget(32.0), pin="float"))
    assert all(rung.choices[0] == FLOAT for rung in rungs) and rungs[-1].choices == (FLOAT, FLOAT)
