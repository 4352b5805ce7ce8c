"""AutoRecipe: a value that refuses what it cannot do before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import pytest

import qfx
from qfx.auto_recipe import AutoRecipe
from qfx.budget import Budget
from qfx.errors import ConfigError
from qfx.measure import Measurement
from qfx.recipe import Recipe


def metric(model: object) -> float:
    return 1.0


def test_what_it_stands_for() -> None:
    auto = qfx.AutoRecipe(average_weight_bits=4.0, weight_bits=(2, 4), activation_bits=(), score="kl", rows=8)
    assert auto.budget == Budget(average_weight_bits=4.0)
    assert auto.measurement == Measurement((2, 4), (), "kl", rows=8)
    assert auto == AutoRecipe(average_weight_bits=4.0, weight_bits=(2, 4), activation_bits=(), score="kl", rows=8)
    assert hash(auto) == hash(AutoRecipe(4.0, weight_bits=(2, 4), activation_bits=(), score="kl", rows=8))
    assert AutoRecipe().base == Recipe.int8() and AutoRecipe().pin_first_last == 8


@pytest.mark.parametrize(
    ("auto", "text"),
    [
        (AutoRecipe(), "auto over int8: three quarters of its bytes"),
        (AutoRecipe(4.5, base=Recipe.w8a16()), "auto over w8a16: average_weight_bits <= 4.5"),
        (
            AutoRecipe(weight_bytes=1e5, max_drop=0.5, metric=metric),
            "auto over int8: weight_bytes <= 100000, a drop of at most 0.5",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_text(auto: AutoRecipe, text: str) -> None:
    assert str(auto) == text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"average_weight_bits": 0}, "average_weight_bits is 0"),
        ({"weight_bytes": math.nan}, "weight_bytes is nan"),
        ({"latency_ms": -1.0}, "latency_ms is -1"),
        ({"weight_bits": (1,)}, "weight_bits holds 1"),
        ({"activation_bits": (16,)}, "activation_bits holds 16"),
        ({"score": "mse"}, "no score 'mse'"),
        ({"rows": 0}, "0 rows"),
        ({"pin_first_last": 1}, "pin_first_last is 1"),
        ({"pin_first_last": 9}, "pin_first_last is 9"),
        ({"pin_first_last": "int8"}, "pin_first_last is 'int8'"),
        ({"pin_first_last": True}, "pin_first_last is True"),
        ({"max_drop": 0.5}, "needs metric too"),
        ({"metric": metric}, "needs max_drop too"),
        ({"max_drop": -0.1, "metric": metric}, "max_drop is -0.1"),
        ({"max_drop": math.nan, "metric": metric}, "max_drop is nan"),
        ({"max_drop": math.inf, "metric": metric}, "max_drop is inf"),
        ({"max_drop": 0.5, "metric": 0.9}, "metric is a float"),
        ({"max_drop": 0.5, "metric": metric, "time_budget": 0}, "time_budget is 0"),
        ({"max_drop": 0.5, "metric": metric, "time_budget": math.nan}, "time_budget is nan"),
        ({"time_budget": 10.0}, "for accuracy control"),
        ({"state": "search.json"}, "for accuracy control"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_refusals(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        AutoRecipe(**options)
    assert caught.value.hint


@pytest.mark.parametrize("pin", [2, 8, "float", None])
def test_pins(pin: Any) -> None:
    assert AutoRecipe(pin_first_last=pin).pin_first_last == pin
