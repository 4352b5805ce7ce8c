"""Budgets: what they bound, and what is no budget."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qfx.budget import DEFAULT_SHARE, Budget
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import Recipe


def layer(shape: tuple[int, ...], weight: int = 8) -> LayerFacts:
    given = Choice(weight, 8)
    return LayerFacts("a", "a", "linear", shape, 2, 10, False, Recipe.int8().default, given, False, (given, FLOAT))


LAYERS = (layer((2, 10)), layer((2, 30), 4), layer(()))


def test_the_bounds_that_there_are() -> None:
    budget = Budget(weight_bytes=100, latency_ms=2.5)
    assert budget.given == {"weight_bytes": 100, "latency_ms": 2.5}
    assert budget.bounds(LAYERS) == {"weight_bytes": 100, "latency_ms": 2.5}


def test_average_bits_are_over_all_elements() -> None:
    assert Budget(average_weight_bits=4.5).bounds(LAYERS) == {"weight_bits": 4.5 * 80}
    both = Budget(average_weight_bits=4, bit_operations=1e6).bounds(LAYERS)
    assert both == {"weight_bits": 320, "bit_operations": 1e6}


def test_without_a_budget_a_share_of_what_the_recipe_takes() -> None:
    recipe_bytes = (20 + 8) + (2 * 15 + 8) + 8
    assert Budget().bounds(LAYERS) == {"weight_bytes": DEFAULT_SHARE * recipe_bytes}


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, math.inf, "4", True, 4j], ids=repr)
@pytest.mark.parametrize("name", ["average_weight_bits", "weight_bytes", "bit_operations", "latency_ms"])
def test_what_is_no_bound(name: str, bound: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is ") as caught:
        Budget(**{name: bound})
    assert "positive number" in caught.value.hint
