"""Recipes: which rule decides, what cannot be meant, and presets as values."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest
import torch
from torch import nn

from qfx.errors import ConfigError
from qfx.observers import Histogram, MinMax, Mse
from qfx.recipe import PRESETS, QuantRule, Recipe, Subject
from qfx.spec import INT4, INT8, UINT8, IntType, PerAxis, PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme

CONV = Subject("conv2d", "layer4.0.conv1", ("ResNet", "Sequential", "BasicBlock", "Conv2d"))
LINEAR = Subject("linear", "head.fc", ("ResNet", "Head", "Linear"))
ADD = Subject("add", "", ())
WEIGHT4 = QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(32), Mse)


# --- presets ----------------------------------------------------------------------------------------------------------


def test_int8() -> None:
    recipe = Recipe.int8()
    assert recipe.default == QConfig(
        QuantSpec(UINT8, Scheme.AFFINE, PerTensor(), Histogram), QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), MinMax)
    )
    assert recipe.resolve(CONV) == (recipe.default, "")


@pytest.mark.parametrize(
    ("recipe", "bits", "activation"),
    [
        (Recipe.int8_dynamic(), 8, QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)),
        (Recipe.w8a16(), 8, None),
        (Recipe.w4a16(), 4, None),
    ],
    ids=["int8_dynamic", "w8a16", "w4a16"],
)
def test_presets_for_linear_layers(recipe: Recipe, bits: int, activation: QuantSpec | None) -> None:
    qconfig, _ = recipe.resolve(LINEAR)
    assert qconfig is not None and qconfig.weight is not None
    assert (qconfig.weight.bits, qconfig.activation) == (bits, activation)
    other, why = recipe.resolve(CONV)
    assert other is None and why == f"{recipe.name} quantizes linear layers only"
    assert recipe.unmatched([CONV]) == ()  # a preset's rules need not match


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_of_w4a16(group_size: int) -> None:
    qconfig, _ = Recipe.w4a16(group_size).resolve(LINEAR)
    assert qconfig is not None and qconfig.weight is not None
    assert qconfig.weight.granularity == PerGroup(group_size)


def test_float16_scales_are_shown() -> None:
    for recipe in (Recipe.w4a16(64, scale_dtype=torch.float16), Recipe.w3a16(64, scale_dtype=torch.float16)):
        assert "per group of 64 float16 scales" in str(recipe)
    assert "float16" not in str(Recipe.w4a16(64))
    assert Recipe.w4a16(64, scale_dtype=torch.float16) != Recipe.w4a16(64)


def test_presets_by_name_and_by_method_are_one() -> None:
    for name in PRESETS:
        learned = re.fullmatch(r"w(\d)a(\d)_lsq", name)
        made = Recipe.lsq(*map(int, learned.groups())) if learned else getattr(Recipe, name)()
        assert Recipe.preset(name) == made
        assert Recipe.preset(name).name == name
    assert Recipe.w4a4_lsq() == Recipe.lsq(4, 4)
    assert len({Recipe.w4a16(32), Recipe.w4a16(64), Recipe.w4a16(128), *PRESETS.values()}) == len(PRESETS) + 2


def test_an_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'int_8'; did you mean 'int8'\?") as caught:
        Recipe.preset("int_8")
    assert all(name in caught.value.hint for name in PRESETS)
    with pytest.raises(ConfigError, match="at least one element"):
        Recipe.w4a16(0)


# --- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"layer": "layer4.0.conv1"}, True),
        ({"layer": "layer4"}, True),  # everything inside
        ({"layer": "layer4.*"}, True),
        ({"layer": "layer?.0"}, True),
        ({"layer": "*conv1"}, True),
        ({"layer": "layer"}, False),
        ({"layer": "layer4.1"}, False),
        ({"layer": "conv1"}, False),
        ({"layer": "Layer4"}, False),
        ({"op": "conv2d"}, True),
        ({"op": "conv*"}, True),
        ({"op": "linear"}, False),
        ({"module": "BasicBlock"}, True),
        ({"module": "*Block"}, True),
        ({"module": "Linear"}, False),
        ({"layer": "layer4", "op": "conv2d", "module": "Conv2d"}, True),
        ({"layer": "layer4", "op": "linear"}, False),
        ({}, True),
    ],
    ids=str,
)
def test_what_a_rule_matches(rule: dict[str, str], matches: bool) -> None:
    assert QuantRule(None, **rule).matches(CONV) is matches


def test_operators_of_the_whole_model_have_an_empty_path() -> None:
    assert QuantRule(None, layer="*").matches(ADD)
    assert QuantRule(None, op="add").matches(ADD)
    assert not QuantRule(None, layer="head").matches(ADD)


def test_the_first_rule_decides_and_the_last_call_comes_first() -> None:
    rules = (QuantRule(None, op="linear", why="first"), QuantRule(QConfig(None, WEIGHT4), layer="head", why="second"))
    recipe = Recipe("mine", Recipe.int8().default, rules)
    assert recipe.resolve(LINEAR) == (None, "first")
    assert recipe.resolve(CONV) == (recipe.default, "")
    refined = recipe.set("head.fc", weight=WEIGHT4)
    qconfig, why = refined.resolve(LINEAR)
    assert qconfig is not None and qconfig.weight == WEIGHT4
    assert why == "the recipe sets it"
    assert refined.skip(op="linear").resolve(LINEAR) == (None, "the recipe skips it")
    assert refined.rules[1:] == rules


# --- skip and set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [{"layer": "head.*"}, {"op": "linear"}, {"module": "Head"}, {"layer": nn.Linear}], ids=str
)
def test_skip_by_layer_op_and_class(how: dict[str, str]) -> None:
    recipe = Recipe.int8().skip(**how, why="fragile")
    assert recipe.resolve(LINEAR) == (None, "fragile")
    assert recipe.resolve(CONV) == (recipe.default, "")


def test_set_replaces_only_what_is_named() -> None:
    base = Recipe.int8()
    spec = QuantSpec(UINT8, observer=MinMax)
    for recipe, expected in (
        (base.set("head", weight=WEIGHT4), QConfig(base.default.activation, WEIGHT4)),
        (base.set("head", activation=spec), QConfig(spec, base.default.weight)),
        (base.set("head", activation=None), QConfig(None, base.default.weight)),
        (base.set("head", weight=None), QConfig(base.default.activation, None)),
    ):
        assert recipe.resolve(LINEAR)[0] == expected
        assert recipe.resolve(CONV)[0] == base.default


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_keep_the_rest_of_the_spec(bits: int) -> None:
    base = Recipe.int8()
    qconfig, _ = base.set(nn.Linear, weight=bits, activation=bits).resolve(LINEAR)
    assert qconfig is not None and base.default.weight and base.default.activation
    assert qconfig.weight == dataclasses.replace(base.default.weight, element=IntType(bits, True))
    assert qconfig.activation == dataclasses.replace(base.default.activation, element=IntType(bits, False))


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32, True])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match="2 to 8 bits, got"):
        Recipe.int8().set("head", weight=bits)


def test_bits_of_a_float_part() -> None:
    with pytest.raises(ConfigError, match="leaves the activation float"):
        Recipe.w8a16().set("head", activation=8)


@pytest.mark.parametrize("part", [INT8, "int4", 4.0, Recipe.int8().default], ids=str)
def test_a_part_is_a_spec_a_number_or_none(part: object) -> None:
    with pytest.raises(ConfigError, match="weight is a ") as caught:
        Recipe.int8().set("head", weight=part)  # type: ignore[arg-type]
    assert "QuantSpec" in caught.value.hint


def test_a_rule_needs_something_to_match() -> None:
    with pytest.raises(ConfigError, match="needs a layer, an op or a module"):
        Recipe.int8().skip()
    with pytest.raises(ConfigError, match="two module classes, 'Linear' and 'Head'"):
        Recipe.int8().skip(nn.Linear, module="Head")
    with pytest.raises(ConfigError, match="layer is a Linear, not a pattern"):
        Recipe.int8().skip(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="op is a builtin_function_or_method"):
        Recipe.int8().skip(op=len)  # type: ignore[arg-type]


def test_unmatched_rules() -> None:
    recipe = Recipe.int8_dynamic().skip("hed").set(nn.Conv2d, weight=4).skip(op="matmul")
    assert [r.op or r.module or r.layer for r in recipe.unmatched([LINEAR, CONV])] == ["matmul", "hed"]
    assert recipe.unmatched([]) == recipe.rules[:3]


# --- the range --------------------------------------------------------------------------------------------------------


def test_reduce_range_takes_one_bit_of_activations() -> None:
    for name, bits in (("int8", 7), ("int8_dynamic", 7)):
        base = Recipe.preset(name)
        qconfig, _ = dataclasses.replace(base, reduce_range=True).resolve(LINEAR)
        assert qconfig is not None and qconfig.activation is not None
        assert qconfig.activation.bits == bits
        assert qconfig.weight == base.default.weight
    narrow = dataclasses.replace(Recipe.int8(), reduce_range=True).set("head", activation=4)
    qconfig, _ = narrow.resolve(LINEAR)
    assert qconfig is not None and qconfig.activation is not None and qconfig.activation.bits == 4
    weight_only = dataclasses.replace(Recipe.w8a16(), reduce_range=True)
    assert weight_only.resolve(LINEAR) == Recipe.w8a16().resolve(LINEAR)


# --- values -----------------------------------------------------------------------------------------------------------


def refined() -> Recipe:
    return Recipe.int8().skip("head.*", why="fragile").set("layer4.*", weight=WEIGHT4).skip(nn.Embedding)


def test_recipes_compare_hash_and_pickle() -> None:
    one, other = refined(), refined()
    assert one == other and hash(one) == hash(other)
    assert one != one.skip("stem") != dataclasses.replace(one, reduce_range=True)
    assert pickle.loads(pickle.dumps(one)) == one
    assert Recipe.preset("int8") == Recipe.int8()  # refining made new ones
    assert Recipe.int8().rules == ()


def test_recipes_print() -> None:
    text = str(dataclasses.replace(refined(), reduce_range=True))
    assert text == "\n".join(
        [
            "Recipe int8 with reduced range",
            "  1. module='Embedding': float (the recipe skips it)",
            "  2. layer='layer4.*': weight: int4 symmetric per group of 32 by Mse; "
            "activation: uint8 affine per tensor by Histogram (the recipe sets it)",
            "  3. layer='head.*': float (fragile)",
            "  else: weight: int8 symmetric per axis 0 by MinMax; activation: uint8 affine per tensor by Histogram",
        ]
    )
    assert str(QuantRule(None)) == "everything: float"


@pytest.mark.parametrize(("path", "matches"), [("head", True), ("header", False), ("head.fc", True)])
def test_a_dot_star_means_the_layer_itself_too(path: str, matches: bool) -> None:
    rule = Recipe.int8().skip("head.*").rules[0]
    assert rule.matches(Subject("linear", path)) is matches
