"""Recipes as files: what is written is read as the same value, by hand it is easy to edit, and errors say where."""

from __future__ import annotations

import math
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qfx.errors import ConfigError
from qfx.observers import Histogram, MinMax, MovingAverageMinMax, Mse, Observer, Percentile
from qfx.recipe import PRESETS, QuantRule, Recipe
from qfx.recipe_file import FLAGS, PARTS, PATTERNS, from_toml, to_toml
from qfx.spec import (
    INT4,
    INT8,
    UINT8,
    FixedSpec,
    IntType,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    QConfig,
    QuantSpec,
    Scheme,
)
from qfx.training import Estimator, Fixed, Learned, Moving

INT8_RECIPE = Recipe.int8()
ACTIVATION, WEIGHT = INT8_RECIPE.default.activation, INT8_RECIPE.default.weight
assert ACTIVATION is not None and WEIGHT is not None
MSE4 = replace(WEIGHT, element=INT4, observer=Mse)
GROUPED = replace(MSE4, granularity=PerGroup(32))  # differs from the default's by more than one key


def allocated(weight: QuantSpec | int, layers: int = 54) -> Recipe:
    """What a search for widths writes: a rule for each layer."""
    recipe = INT8_RECIPE
    for i in reversed(range(layers)):
        recipe = recipe.set(f"layer{i}.conv", op="conv2d", weight=weight, activation=8, why=f"kl 0.0{i} at 4 bits")
    return recipe


def body(text: str) -> str:
    """The text without its comments."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")).lstrip()


def only_spec(recipe: Recipe, rule: int = 0) -> QuantSpec:
    """The weight's spec of a rule."""
    qconfig = recipe.rules[rule].qconfig
    assert qconfig is not None and qconfig.weight is not None
    return qconfig.weight


# --- what is written is read ------------------------------------------------------------------------------------------

factories = st.one_of(
    st.sampled_from([MinMax, MovingAverageMinMax, Percentile, Histogram, Mse, MinMax.with_options()]),
    st.builds(lambda x: MovingAverageMinMax.with_options(averaging_constant=x), st.floats(1e-300, 1.0)),
    st.builds(lambda p, n: Percentile.with_options(percentile=p, bins=n), st.floats(50.5, 100.0), st.integers(1, 4096)),
    st.builds(lambda n: Histogram.with_options(bins=n), st.integers(1, 4096)),
    st.builds(lambda n: Mse.with_options(steps=n), st.integers(1, 100)),
)
ranges = st.one_of(
    st.builds(Moving, st.floats(0.001, 1.0)), st.builds(Moving), st.builds(Learned, st.booleans()), st.just(Fixed())
)
laid_out = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.integers(-4, 4)),
    st.builds(PerGroup, st.integers(1, 256), st.integers(-2, 1)),
)
elements = st.builds(IntType, st.integers(2, 8), st.booleans())
common = {
    "element": elements,
    "scheme": st.sampled_from(Scheme),
    "observer": st.none() | factories,
    "narrow_range": st.booleans(),
    "ranges": ranges,
    "estimator": st.sampled_from(Estimator),
}
static = st.builds(QuantSpec, granularity=laid_out, **common)
specs = st.one_of(
    static,
    st.builds(QuantSpec, granularity=laid_out, dynamic=st.just(True), **common),
    st.builds(QuantSpec, granularity=st.just(PerToken()), dynamic=st.just(True), **common),
)
weights = specs | st.builds(replace, static, scale_dtype=st.just(torch.float16))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
patterns = st.none() | st.sampled_from(["", "encoder.*", "layer1.0.conv1", 'a"b', "ü\n\\"]) | texts


def _for_data(spec: QuantSpec | None) -> QuantSpec | None:
    return spec and replace(spec, scale_dtype=torch.float32)


@st.composite
def recipes(draw: Callable[..., Any]) -> Recipe:
    """A recipe of any specs; few of them, and neighbours of the default's, so that rules share them."""
    base = draw(st.sampled_from([*PRESETS.values(), None]))
    if base is None:
        default = QConfig(draw(st.none() | specs), draw(st.none() | weights))
        base = Recipe(draw(texts), default, ends=draw(st.none() | st.just(default)))
    pool = [None, *draw(st.lists(specs, max_size=3))]
    pool += [spec for spec in (base.default.activation, base.default.weight) if spec]
    drawn = st.sampled_from(pool)
    near = st.builds(lambda spec, element: spec and replace(spec, element=element), drawn, elements)
    weight = near | (st.none() | weights if draw(st.booleans()) else drawn)
    qconfigs = st.builds(QConfig, drawn.map(_for_data) | near.map(_for_data), weight)
    flags = st.booleans()
    rules = st.builds(QuantRule, st.none() | qconfigs, patterns, patterns, patterns, texts, own=flags, exact=flags)
    return replace(
        base,
        rules=(*draw(st.lists(rules, max_size=5)), *base.rules),
        reduce_range=draw(st.booleans()),
        embedding_storage=draw(st.sampled_from([None, 4, 8])),
        ends=draw(st.just(base.ends) | st.none() | qconfigs),
    )


@given(recipes())
@example(Recipe("", QConfig(None, None), (QuantRule(QConfig(None, None)), QuantRule(None)), ends=QConfig(None, None)))
def test_any_recipe_is_read_as_it_was(recipe: Recipe) -> None:
    again = from_toml(to_toml(recipe))
    assert again == recipe
    assert str(again) == str(recipe) and hash(again) == hash(recipe)


def test_every_field_has_its_key() -> None:
    """A field that a class gains is not lost without a word: it needs a key, and its place in the recipes above."""
    names = [{field.name for field in fields(kind)} for kind in (Recipe, QuantRule, QConfig)]
    assert names == [
        {"name", "default", "rules", "reduce_range", "embedding_storage", "ends"},
        {"qconfig", *PATTERNS, "why", *FLAGS},
        set(PARTS),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, tmp_path: Path) -> None:
    Recipe.preset(name).save(tmp_path / "recipe.toml")
    assert Recipe.load(str(tmp_path / "recipe.toml")) == Recipe.preset(name)


def test_refined_recipes(tmp_path: Path) -> None:
    recipe = (
        Recipe.lsq(2, 2)
        .skip("head", why='first "quoted", then\nbroken\tand # marked')
        .skip(op="softmax")
        .set("encoder.*", module="Attention", weight=GROUPED, activation=None)
        .set(op="linear", weight=3)
        .with_embedding_storage(4)
    )
    others = (
        replace(Recipe.w4a16(32), reduce_range=True),
        Recipe.w3a16(ranges=Learned(scaled=False)),
        Recipe.w4a16(64, scale_dtype=torch.float16).set("head", weight=8),
    )
    for refined in (recipe, *others):
        refined.save(tmp_path / "recipe.toml")
        again = Recipe.load(tmp_path / "recipe.toml")
        assert again == refined
        assert [type(rule.why) for rule in again.rules] == [str] * len(refined.rules)  # plain, not the parser's own


def test_a_factory_without_options_is_not_the_class() -> None:
    for observer in (MinMax, MinMax.with_options()):
        recipe = INT8_RECIPE.set("x", weight=replace(WEIGHT, observer=observer))
        assert only_spec(from_toml(to_toml(recipe))).observer == observer
    assert MinMax != MinMax.with_options()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_text() -> None:
    recipe = (
        INT8_RECIPE.set("stem", weight=replace(GROUPED, element=INT8, observer=Mse.with_options(steps=9)))
        .set("body.3", weight=replace(GROUPED, observer=Mse.with_options(steps=9)), activation=None)
        .set("body.2", weight=MSE4, why="kl 0.0021 at 4 bits")
        .set("body.1", op="conv2d", weight=4)
        .skip("head")
        .with_embedding_storage(4)
    )
    assert body(to_toml(recipe)) == """\
version = 1
name = "int8"
embedding_storage = 4

[default.weight]
bits = 8
signed = true
scheme = "symmetric"
granularity = "per axis"
observer = "MinMax"

[default.activation]
bits = 8
signed = false
scheme = "affine"
granularity = "per tensor"
observer = "Histogram"

[specs.weight_mse]
bits = 4
signed = true
scheme = "symmetric"
granularity = {kind = "per group", size = 32}
observer = {kind = "Mse", steps = 9}

[[rules]]
layer = "head"
qconfig = "float"
why = "the recipe skips it"

[[rules]]
layer = "body.1"
op = "conv2d"
weight = 4
activation = 8
why = "the recipe sets it"

[[rules]]
layer = "body.2"
weight = {bits = 4, observer = "Mse"}
activation = 8
why = "kl 0.0021 at 4 bits"

[[rules]]
layer = "body.3"
weight = {like = "weight_mse", bits = 4}
activation = "float"
why = "the recipe sets it"

[[rules]]
layer = "stem"
weight = {like = "weight_mse", bits = 8}
activation = 8
why = "the recipe sets it"
"""


def test_the_header_says_how_to_edit() -> None:
    header = to_toml(INT8_RECIPE).partition("\n\n")[0]
    assert all(line.startswith("#") and len(line) <= 120 for line in header.splitlines())
    for words in ("first rule that matches", "Percentile", "per group", "2 to 8", '"float"', "straight-through"):
        assert words in header


@pytest.mark.parametrize("weight", [4, MSE4, GROUPED], ids=["number", "inline", "named"])
def test_many_rules_repeat_no_spec(weight: QuantSpec | int) -> None:
    text = to_toml(allocated(weight))
    assert body(text).count("signed") == (3 if weight is GROUPED else 2)
    assert body(text).count("[[rules]]") == 54 and len(body(text).splitlines()) < 54 * 7 + 30


def test_names_of_specs_differ() -> None:
    recipe = INT8_RECIPE
    for i in range(3):
        recipe = recipe.set(f"l{i}", weight=replace(GROUPED, granularity=PerGroup(2**i)))
        recipe = recipe.set(f"k{i}", weight=replace(GROUPED, granularity=PerGroup(2**i), element=UINT8))
    text = to_toml(recipe)
    assert len(re.findall(r"^\[specs\.", text, re.MULTILINE)) == 6
    assert from_toml(text) == recipe


# --- edited by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [4, MSE4, GROUPED], ids=["number", "inline", "named"])
def test_one_width_edited(weight: QuantSpec | int, tmp_path: Path) -> None:
    recipe, file = allocated(weight), tmp_path / "recipe.toml"
    recipe.save(file)
    head, marker, rest = file.read_text().partition('layer = "layer17.conv"\n')
    edited = re.sub(r"(weight = (?:\{.*bits = )?)4", r"\g<1>6", rest, count=1)
    assert sum(a != b for a, b in zip(rest, edited, strict=True)) == 1  # one character
    file.write_text(head + marker + edited)
    old = recipe.rules[17].qconfig
    assert old is not None
    six = replace(old, weight=replace(only_spec(recipe, 17), element=IntType(6, True)))
    rules = [replace(rule, qconfig=six) if i == 17 else rule for i, rule in enumerate(recipe.rules)]
    assert Recipe.load(file) == replace(recipe, rules=tuple(rules))


def test_rules_deleted_and_moved() -> None:
    recipe = allocated(4, 5)
    head, *rules = to_toml(recipe).split("[[rules]]")
    text = "[[rules]]".join([head, rules[4] + "\n", *rules[:2]])
    assert from_toml(text) == replace(recipe, rules=(recipe.rules[4], *recipe.rules[:2]))
    assert from_toml(head) == INT8_RECIPE


def test_comments_spaces_and_line_ends(tmp_path: Path) -> None:
    text = to_toml(allocated(GROUPED, 3))
    loose = text.replace("[[rules]]\n", "# mine\n\n\n  [[ rules ]]  # here too\n").replace(" = 8", "=8 # bits")
    file = tmp_path / "recipe.toml"
    for content in (loose.encode(), loose.replace("\n", "\r\n").encode(), b"\xef\xbb\xbf" + loose.encode()):
        assert content != text.encode()
        file.write_bytes(content)
        assert Recipe.load(file) == allocated(GROUPED, 3)


def test_written_by_hand() -> None:
    recipe = from_toml("""
        version = 1
        name = "mine"
        default = { weight = { like = "w", bits = 8 }, activation = "float" }
        rules = [
            { layer = "a", weight = "w" },
            { layer = "b", weight = { observer = "Mse" }, why = "because" },
            { layer = "c", weight = { like = "w", scheme = "affine", observer = "none" }, activation = "a" },
            { op = "linear", qconfig = "float" },
        ]
        specs.w = { bits = 3, signed = true, scheme = "symmetric", granularity = "per axis", observer = "MinMax" }
        specs.a = { bits = 8, signed = false, observer = { kind = "Percentile", percentile = 99 } }
        [ends]
        weight = 6
    """)
    w = QuantSpec(IntType(3, True), Scheme.SYMMETRIC, PerAxis(0), MinMax)
    a = QuantSpec(UINT8, observer=Percentile.with_options(percentile=99.0))
    whole = replace(w, element=INT8)
    assert recipe == Recipe(
        "mine",
        QConfig(None, whole),
        (
            QuantRule(QConfig(None, w), layer="a"),
            QuantRule(QConfig(None, replace(whole, observer=Mse)), layer="b", why="because"),
            QuantRule(QConfig(a, replace(w, scheme=Scheme.AFFINE, observer=None)), layer="c"),
            QuantRule(None, op="linear"),
        ),
        ends=QConfig(None, replace(w, element=IntType(6, True))),
    )
    assert from_toml(to_toml(recipe)) == recipe


def test_what_a_rule_leaves_out_follows_the_default() -> None:
    text = to_toml(INT8_RECIPE.set("a", weight=4)).replace('"MinMax"', '{kind = "Mse", steps = 5}')
    text = text.replace("activation = 8\n", "")
    recipe = from_toml(text)
    assert recipe.rules[0].qconfig is not None and recipe.rules[0].qconfig.activation == ACTIVATION
    assert only_spec(recipe) == replace(MSE4, observer=Mse.with_options(steps=5))


# --- refused at reading -----------------------------------------------------------------------------------------------

GOOD = body(
    to_toml(
        INT8_RECIPE.set("stem", op="conv2d", weight=GROUPED)
        .set("head", weight=5)
        .set("mid", activation=replace(ACTIVATION, observer=Percentile.with_options(percentile=99.5, bins=64)))
        .with_embedding_storage(8)
    )
)
HEAD = 'layer = "head"\nweight = 5'


def headed(weight: str) -> tuple[str, str]:
    return HEAD, f'layer = "head"\nweight = {weight}'


REFUSED = {
    "no TOML": (("[[rules]]", "[[rules]", 1), r"not TOML.*line \d+", ""),
    "a key twice": (("version = 1", 'version = 1\nname = "a"'), "not TOML: .*name.*", ""),
    "no version": (("version = 1\n", ""), "version is missing", "version = 1"),
    "newer": (("version = 1\n", "version = 2\nshiny = 7\n"), "version: the file has version 2, .* knows", "update"),
    "older": (("version = 1\n", "version = 0\n"), "version: the file has version 0", "version = 1"),
    "version as text": (("version = 1\n", 'version = "1"\n'), "version: expected an integer, got a string", ""),
    "no name": (('name = "int8"\n', ""), "name is missing", ""),
    "name as number": (('name = "int8"\n', "name = 8\n"), "name: expected a string, got an integer", ""),
    "key": (("embedding_storage", "embeding_storage"), "no key 'embeding_storage'; did you mean 'embedding_st", "name"),
    "storage": (("embedding_storage = 8", "embedding_storage = 5"), "embedding_storage: .* in 5 bits", "4 or 8"),
    "storage's type": (("storage = 8", "storage = 8.0"), "storage: expected an integer, got a number", ""),
    "flag": (("embedding_storage = 8", "reduce_range = 1"), "reduce_range: expected true or false, got an in", ""),
    "default": (("[default.weight]", "[default.weights]"), "default: .*'weights'; did you mean 'weight'", "activation"),
    "half a default": (("[default.weight]", "[specs.w]"), "default: weight is missing", '"float"'),
    "key of a spec": (("scheme", "schema", 1), "default.weight: .*'schema'; did you mean 'scheme'", "bits"),
    "scheme": (('"affine"', '"afine"'), "default.activation.scheme: .*'afine'; did you mean 'affine'", "symmetric"),
    "no bits": (("bits = 8\n", "", 1), "default.weight: bits is missing", ""),
    "bits of the default": (("bits = 8\n", "bits = 9\n", 1), r"default\.weight\.bits: .*2 to 8 bits, got 9", ""),
    "true bits": (("bits = 8\n", "bits = true\n", 1), "weight.bits: expected an integer, got true or false", ""),
    "per token": (('"per tensor"', '"per token"'), "default.activation: per-token scales", "dynamic"),
    "a spec called float": (("[specs.weight_mse]", "[specs.float]"), "specs.float: no spec may bear", ""),
    "a spec that is none": (("[specs.weight_mse]", "[specs]"), "specs.bits: expected a table, got an integer", ""),
    "a spec half said": (('{kind = "per group", size = 32}', '"per group"'), "granularity: size is missing", ""),
    "an option too many": (("size = 32", "size = 32, sice = 3"), "granularity: .*'sice'; did you mean 'size'", "axis"),
    "no element": (("size = 32", "size = 0"), "granularity: a group holds at least one", ""),
    "no kind": (('kind = "per group", ', ""), "granularity: kind is missing", ""),
    "kind": (('"per group"', '"per grop"'), "granularity.kind: .*'per grop'; did you mean 'per group'", "per axis"),
    "a percentile of words": (("percentile = 99.5", 'percentile = "x"'), "percentile: expected a number or", ""),
    "percentile": (("percentile = 99.5", "percentile = 9.5"), "rule 1, activation.observer: percentile lies in", ""),
    "no bins": (("bins = 64", "bins = 0"), "observer.bins: bins lies between 1", ""),
    "too many bins": (("bins = 64", "bins = 10000000000000"), "observer.bins: bins lies between 1", ""),
    "broken bins": (("bins = 64", "bins = 6.5"), "observer.bins: expected an integer, got a number", ""),
    "rules as text": (("[[rules]]", "[rules]", 3), "not TOML|rules: expected an array", ""),
    "rule's bits": (headed("9"), "rule 2, weight: .*2 to 8 bits, got 9", ""),
    "rule's bits inside": (headed("{bits = 1}"), r"rule 2, weight\.bits: .*2 to 8 bits, got 1", "ternary"),
    "rule's type": (headed("5.0"), "rule 2, weight: expected .*, got a number", ""),
    "rule's date": (headed("2024-01-01"), "rule 2, weight: expected .*, got a date", ""),
    "spec": (headed('"weight_ms"'), "rule 2, weight: .*no spec 'weight_ms'; did you mean 'weight_mse'", "float"),
    "like": (headed('{like = "wait_mse"}'), r"rule 2, weight\.like: .*'wait_mse'; did you mean 'weight_mse'", "known"),
    "observer": (headed('{observer = "Minmax"}'), "weight.observer: .*'Minmax'; did you mean 'MinMax'", "in Python"),
    "a path": (headed('{observer = "os:system"}'), "rule 2, weight.observer: .*no observer 'os:system'", "in Python"),
    "its options": (headed('{observer = {kind = "Mse", bins = 5}}'), "observer: there is no key 'bins'", "steps"),
    "ranges": (headed('{ranges = "learnt"}'), "weight.ranges: .*'learnt'; did you mean 'learned'", "moving"),
    "average": (headed('{ranges = {kind = "moving", averaging_constant = 0}}'), "ranges: averaging_constant lies", ""),
    "rule's key": (("op =", "operator =", 1), "rule 3: there is no key 'operator'", "op"),
    "rule's pattern": (('op = "conv2d"', "op = 2"), "rule 3, op: expected a string", ""),
    "rule's flag": ((HEAD, HEAD + "\nexact = 1"), "rule 2, exact: expected true or false, got an integer", ""),
    "both": ((HEAD, HEAD + '\nqconfig = "float"'), "rule 2: qconfig stands beside weight or activation", ""),
    "nothing said": ((HEAD + "\nactivation = 8", 'layer = "head"'), "rule 2: the rule does not say what", "qconfig"),
    "qconfig": ((HEAD + "\nactivation = 8", 'qconfig = "w8"'), "rule 2, qconfig: there is no qconfig 'w8'", "float"),
    "empty ends": (("[specs.weight_mse]", "[ends]\n[specs.weight_mse]"), "ends: neither weight nor activation", ""),
    "bits of float": (("[default.weight]", '[default]\nweight = "float"\n[specs.w]'), "rule 1, weight: 8 bits", "like"),
    "bits by default": (("[default.weight]", "[default]\nweight = 8\n[specs.w]"), "default.weight: 8 bits of", "like"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    (old, new, *count), match, hint = REFUSED[case]
    text = GOOD.replace(old, new, *count)
    assert text != GOOD
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        Recipe.load(file)
    assert caught.value.source.startswith(str(file)) and str(file) in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.where == "head" or HEAD not in old or 'layer = "head"' not in new


def test_errors_name_line_and_layer(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(allocated(4)) + "[[rules\n")
    with pytest.raises(ConfigError) as caught:
        Recipe.load(file)
    assert caught.value.source == f"{file}:{len(file.read_text().splitlines())}"
    head, marker, rest = to_toml(allocated(4)).partition('layer = "layer17.conv"\n')
    file.write_text(head + marker + rest.replace("weight = 4", "weight = 40", 1))
    with pytest.raises(ConfigError, match=r"^rule 18, weight: .*40 \[layer layer17\.conv\]"):
        Recipe.load(file)


def test_no_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qfx_trap.py").write_text("class MinMax: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("qfx_trap:MinMax", "qfx_trap.MinMax", "qfx.observers:MinMax", "Observer", "_Binned"):
        with pytest.raises(ConfigError, match="no observer"):
            from_toml(GOOD.replace(*headed(f'{{observer = "{name}"}}')))
    assert "qfx_trap" not in sys.modules


def test_not_text_and_not_there(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"version = 1\nname = '\xff'\n")
    with pytest.raises(ConfigError, match=r"not UTF-8.*byte 20") as caught:
        Recipe.load(file)
    assert caught.value.source == str(file)
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.toml")


SLIPS = ["", "[", "]]", "1", '"', "{}", "=", "\n", ".a", "\0"]


@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SLIPS))
def test_damage_is_told_or_harmless(start: int, length: int, put: str) -> None:
    """A slip of the pen gives a recipe or a ConfigError, and nothing else."""
    try:
        recipe = from_toml(GOOD[:start] + put + GOOD[start + length :], "file")
    except ConfigError as error:
        assert error.source.startswith("file")
    else:
        assert isinstance(recipe, Recipe)


# --- refused at writing -----------------------------------------------------------------------------------------------


class MyObserver(Observer):
    """The user's own."""


class MyMinMax(MinMax):
    """The user's own."""


MyMinMax.__name__ = "MinMax"  # a name alone makes it none of ours


@dataclass(frozen=True)
class MyRecipe(Recipe):
    """The user's own."""


@pytest.mark.parametrize(
    ("observer", "name"),
    [
        (MyObserver, "'MyObserver'"),
        (MyObserver.with_options(), "'MyObserver'"),
        (MyMinMax, "'MinMax'"),
        (partial(Histogram, bins=8), "Histogram"),
    ],
    ids=["own", "own with options", "same name", "partial"],
)
def test_own_observers_are_refused(observer: Any, name: str, tmp_path: Path) -> None:
    recipe = INT8_RECIPE.set("a").set("stem", weight=replace(WEIGHT, observer=observer))
    (tmp_path / "recipe.toml").write_text("old")
    with pytest.raises(ConfigError, match=f"rule 1: the observer .*{name}.* cannot be written") as caught:
        recipe.save(tmp_path / "recipe.toml")
    assert caught.value.where == "stem"
    assert "in Python after loading" in caught.value.hint and "MinMax, MovingAverageMinMax" in caught.value.hint
    assert (tmp_path / "recipe.toml").read_text() == "old"


def test_own_observers_are_refused_where_the_default_is_float() -> None:
    recipe = Recipe.w8a16().set("stem", activation=replace(ACTIVATION, observer=MyObserver))
    with pytest.raises(ConfigError, match="rule 1: the observer 'MyObserver' cannot be written"):
        to_toml(recipe)
    with pytest.raises(ConfigError, match=r"default: the observer 'MyObserver'"):
        to_toml(replace(recipe, default=QConfig(None, replace(WEIGHT, observer=MyObserver))))


FIXED = FixedSpec(UINT8, 1 / 256, 0)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (replace(INT8_RECIPE, ends=QConfig(FIXED, None)), "ends: a FixedSpec"),  # type: ignore[arg-type]
        (replace(INT8_RECIPE, name=8), "name: expected a string"),  # type: ignore[arg-type]
        (replace(INT8_RECIPE, name="\ud800"), "surrogates not allowed"),
        (INT8_RECIPE.set("a", weight=replace(WEIGHT, ranges="often")), "rule 1: a str cannot"),  # type: ignore[arg-type]
        (INT8_RECIPE.set("a", weight=replace(WEIGHT, observer=Mse.with_options(steps=1.5))), "steps: expected an int"),
        (INT8_RECIPE.set("a", weight=replace(WEIGHT, observer=Mse.with_options(steps=object()))), "cannot be written"),
        (INT8_RECIPE.set("a", weight=replace(WEIGHT, observer=Mse.with_options(stops=2))), "no key 'stops'"),
        (
            INT8_RECIPE.set("a", weight=replace(WEIGHT, observer=Percentile.with_options(percentile=math.nan))),
            "percentile lies in",
        ),
        (MyRecipe("mine", INT8_RECIPE.default), "read as another"),
    ],
)
def test_what_no_file_says_is_refused(recipe: Recipe, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        to_toml(recipe)
    assert "cannot be written" in str(caught.value)


# --- a save that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_the_old_file_stays(step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.toml"
    INT8_RECIPE.save(file)
    old = file.read_bytes()

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        Recipe.w4a16().save(file)
    assert os.listdir(tmp_path) == ["recipe.toml"] and file.read_bytes() == old


def test_a_file_replaced_keeps_its_mode_and_its_links(tmp_path: Path) -> None:
    file, link = tmp_path / "real" / "recipe.toml", tmp_path / "link.toml"
    file.parent.mkdir()
    INT8_RECIPE.save(file)
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRUSR
    file.chmod(0o640)
    link.symlink_to(file)
    Recipe.w4a16().save(link)
    assert link.is_symlink() and Recipe.load(file) == Recipe.w4a16()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link.toml", "real"] and os.listdir(file.parent) == ["recipe.toml"]
