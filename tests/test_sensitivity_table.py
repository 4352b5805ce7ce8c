"""The sensitivity table as a value: what it says, and the same every time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.sensitivity_table import Agreement, Sensitivity, rank_correlation
from qfx.widths import Trial

CHOICES = (*(Choice(w, a) for w, a in product((2, 4, 8), (4, 8))), FLOAT)


def layer(path: str, shape: tuple[int, ...] = (8, 10), op: str = "linear") -> LayerFacts:
    return LayerFacts(
        key=f"{path}:{op}",
        path=path,
        op=op,
        weight_shape=shape,
        scales=8,
        macs=1_500_000,
        end=False,
        qconfig=Recipe.int8().default,
        given=Choice(8, 8),
        fixed=False,
        choices=CHOICES,
    )


def table(scores: dict[Trial, float], damages: dict[Trial, float] | None = None) -> Sensitivity:
    return Sensitivity(
        model="Net",
        recipe=Recipe.int8(),
        target="reference",
        score="kl",
        unit="nats",
        mode="only",
        rows=32,
        layers=(layer("a"), layer("b.c", (3, 8))),
        groups=((0,), (1,)),
        scores=scores,
        damages=scores if damages is None else damages,
        agreement=Agreement("kl", 0.973, 16),
        seconds=1.25,
    )


SCORES = {
    Trial("a:linear", "weight", 2): 0.5,
    Trial("a:linear", "weight", 4): 0.01,
    Trial("b.c:linear", "weight", 2): 0.25,
    Trial("b.c:linear", "weight", 4): 0.02,
    Trial("a:linear", "activation", 4): 1e-7,
}


def test_text() -> None:
    assert str(table(SCORES)) == (
        "layer    operator    weights    MMAC    w2    w4    a4\n"
        "-------  ----------  ---------  ------  ----  ----  -----\n"
        "a        linear      80         1.5     0.5   0.01  1e-07\n"
        "b.c      linear      24         1.5     0.25  0.02\n"
        "\n"
        "kl in nats, each tensor rounded alone, 32 rows of data, 1.2 s; w4: weight in 4 bits, a4: data in 4 bits\n"
        "rank correlation with kl: 0.97 over 16 trials"
    )
    shuffled = dict(reversed(SCORES.items()))
    assert str(table(shuffled)) == str(table(SCORES))
    assert "all rounded but this one" in replace(table(SCORES), mode="all_but").summary()


def test_exact_and_no_agreement() -> None:
    found = replace(table({Trial("a:linear", "weight", 8): math.inf}), agreement=None)
    assert "exact" in found.table() and "rank correlation" not in str(found)


def test_the_worst_comes_first() -> None:
    assert table(SCORES).worst(2) == (("a:linear", 0.5), ("b.c:linear", 0.25))
    assert table(SCORES).worst(4) == (("b.c:linear", 0.02), ("a:linear", 0.01))
    assert table(SCORES).worst(4, "activation") == (("a:linear", 1e-7),)
    decibels = {t: -10 * math.log10(s) for t, s in SCORES.items()}  # where higher is better
    assert [name for name, _ in table(decibels, SCORES).worst(2)] == ["a:linear", "b.c:linear"]
    with pytest.raises(ConfigError, match="no weight was measured at 3 bits") as caught:
        table(SCORES).worst(3)
    assert caught.value.hint == "measured are: weight 2, weight 4, activation 4"


def test_damage_adds_up_over_weight_and_data() -> None:
    found = table(SCORES)
    a, b = found.layers
    assert found.damage(a, Choice(4, 4)) == 0.01 + 1e-7
    assert found.damage(b, Choice(2, 8)) == 0.25
    assert found.damage(a, FLOAT) == found.damage(a, Choice(8, 8)) == 0.0


def test_plain_values_for_json() -> None:
    plain = table(SCORES).to_dict()
    again = json.loads(json.dumps(plain))
    assert again["layers"][0]["weight"] == {"2": 0.5, "4": 0.01}
    assert again["layers"][1]["activation"] == {}
    assert again["agreement"] == {"exact": "kl", "correlation": 0.973, "trials": 16}
    assert replace(table(SCORES), agreement=None).to_dict()["agreement"] is None


def test_times() -> None:
    timed = table(SCORES).with_times({"a:linear": ((FLOAT, 2.0),)})
    assert [x.times for x in timed.layers] == [((FLOAT, 2.0),), ()]
    assert timed.scores == SCORES


# --- correlation ------------------------------------------------------------------------------------------------------


def test_correlation_over_what_both_have() -> None:
    one = table(SCORES)
    other = table({t: 3.0 * s for t, s in SCORES.items() if t.part == "weight"})
    assert one.correlation(other) == other.correlation(one) == pytest.approx(1.0)
    turned = table({t: -s for t, s in SCORES.items()})
    assert one.correlation(turned) == pytest.approx(-1.0)
    with pytest.raises(ConfigError, match="two trials, not 0"):
        one.correlation(table({Trial("z", "weight", 2): 1.0}))
    with pytest.raises(ConfigError, match="two trials, not 1"):
        rank_correlation([1.0], [2.0])


def test_equal_values_have_no_order() -> None:
    assert rank_correlation([1.0, 1.0], [2.0, 2.0]) == 1.0
    assert rank_correlation([1.0, 1.0], [2.0, 3.0]) == 0.0


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(v) for v in column] for column in zip(*pairs, strict=True))
    found = rank_correlation(x, y)
    assert -1.0 - 1e-12 <= found <= 1.0 + 1e-12
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert found == pytest.approx(float(spearmanr(x, y).statistic))
