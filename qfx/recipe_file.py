"""Recipes as files to edit by hand: TOML that :func:`load` reads back as the same value that :func:`save` wrote.

A rule names widths by numbers: ``weight = 4`` is the default's spec in 4 bits. Specs that differ from the default's in
more than one key besides stand once, under a name, in ``[specs]``. Reading imports and runs nothing: observers are
those of :mod:`qfx.observers`, by name.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import tomlkit
import torch
from tomlkit.exceptions import ParseError, TOMLKitError
from tomlkit.items import InlineTable, Table

from qfx.errors import ConfigError
from qfx.observers import Factory, Histogram, MinMax, MovingAverageMinMax, Mse, Observer, Percentile
from qfx.recipe import QuantRule, Recipe
from qfx.spec import (
    INT8,
    MAX_BITS,
    MIN_BITS,
    SCALE_DTYPES,
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
from qfx.whole_file import write_whole

VERSION = 1
FLOAT = "float"
PARTS = ("weight", "activation")
PATTERNS = ("layer", "op", "module")
FLAGS = ("own", "exact")

Kinds = Mapping[str, type]
OBSERVERS: Kinds = {kind.__name__: kind for kind in (MinMax, MovingAverageMinMax, Percentile, Histogram, Mse)}
GRANULARITIES: Kinds = {"per tensor": PerTensor, "per axis": PerAxis, "per group": PerGroup, "per token": PerToken}
RANGES: Kinds = {"moving": Moving, "learned": Learned, "fixed": Fixed}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
NO_OBSERVER = "none"
MOST = 2**20  # bins or steps of an observer: a slip of the pen is not to cost gigabytes

HEADER = f"""\
A qfx recipe: which layer is quantized how. Edit it by hand; qfx.Recipe.load reads it.

The first rule that matches a layer decides. What no rule matches gets the default, or [ends] where it is a first or
last layer and there are [ends]. A rule matches by layer, op and module; each is a shell pattern.
A rule's weight and activation are
  4                                 the default's, in 4 bits
  {{bits = 4, observer = "Mse"}}      the default's, with these keys changed
  "name"                            [specs.name] as it stands
  {{like = "name", bits = 4}}         [specs.name], with these keys changed
  "{FLOAT}"                           not quantized; qconfig = "{FLOAT}" leaves all of the layer so
and the default's where the rule names only one of them. Keys of a spec:
  bits                              {MIN_BITS} to {MAX_BITS}
  scheme                            {", ".join(scheme.value for scheme in Scheme)}
  granularity                       {", ".join(GRANULARITIES)}; e.g. {{kind = "per group", size = 64}}
  observer                          {", ".join(OBSERVERS)};
                                    e.g. {{kind = "Percentile", percentile = 99.9}}
  ranges, in training               {", ".join(RANGES)}
  estimator, in training            {", ".join(estimator.value for estimator in Estimator)}
  scale_dtype, of weights           {", ".join(DTYPES)}: how a saved model stores their scales
A rule's "why" is shown in the table of nodes. exact = true: layer is one path and no pattern, and what is inside is
not meant. own = true: a preset's rule; any other must match a layer of the model.
"""


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write ``recipe`` to ``path``; a file that is there is replaced whole, with its comments, or stays as it was.

    Raises:
        ConfigError: the recipe holds what no file can say, such as an observer of the user's.
        OSError: the file cannot be written.
    """
    write_whole(path, to_toml(recipe).encode())


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a file; nothing that the file names is imported or run.

    Raises:
        ConfigError: the file is no TOML or no recipe; the text names the file and the key, and the line where the TOML
            itself is wrong.
        OSError: the file cannot be read.
    """
    file = os.fspath(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # some editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file is not UTF-8 text: {error.reason} at byte {error.start}", source=file) from None
    return from_toml(text, file)


# --- writing ----------------------------------------------------------------------------------------------------------


def to_toml(recipe: Recipe) -> str:
    """The text of the file, which :func:`from_toml` reads as an equal recipe.

    Raises:
        ConfigError: no text says what the recipe holds.
    """
    failed = f"the recipe {recipe.name!r} cannot be written"
    try:
        text = tomlkit.dumps(_document(recipe))
        text.encode()
        again = from_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{failed}: {error.what}", where=error.where, hint=error.hint) from None
    except (TypeError, ValueError) as error:  # a value that TOML does not have, or a lone surrogate
        raise ConfigError(f"{failed}: {error}") from error
    if again != recipe:  # a class of the user's, say, that is derived from one of these
        raise ConfigError(f"{failed}: it would be read as another", hint="make it of qfx's own classes and of numbers")
    return text


def _document(recipe: Recipe) -> tomlkit.TOMLDocument:
    place, named = _Place(""), dict[QuantSpec, str]()
    with place.key("default").named():
        default = _whole(recipe.default)
    with place.key("ends").named():
        ends = None if recipe.ends is None else _parts(recipe.ends, recipe.default, named)
    rules = []
    for number, rule in enumerate(recipe.rules, 1):
        with replace(place, rule=number, layer=rule.layer or "").named():
            rules.append(_rule(rule, recipe.default, named))

    document = tomlkit.document()
    for line in HEADER.splitlines():
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    document["version"] = VERSION
    document["name"] = recipe.name
    if recipe.reduce_range:
        document["reduce_range"] = recipe.reduce_range
    if recipe.embedding_storage is not None:
        document["embedding_storage"] = recipe.embedding_storage
    document["default"] = default
    if ends is not None:
        document["ends"] = _table(ends)
    if named:
        specs = tomlkit.table(is_super_table=True)
        for spec, name in named.items():
            specs[name] = _table(_all_keys(spec))
        document["specs"] = specs
    if rules:
        tables = tomlkit.aot()
        for keys in rules:
            tables.append(_table(keys))
        document["rules"] = tables
    return document


def _whole(default: QConfig) -> Table:
    specs = {part: getattr(default, part) for part in PARTS}
    table = tomlkit.table(is_super_table=None not in specs.values())
    for part, spec in sorted(specs.items(), key=lambda item: item[1] is not None):  # plain keys before tables
        table[part] = FLOAT if spec is None else _table(_all_keys(spec))
    return table


def _rule(rule: QuantRule, default: QConfig, named: dict[QuantSpec, str]) -> dict[str, Any]:
    patterns = {key: getattr(rule, key) for key in PATTERNS}
    return {
        **{key: pattern for key, pattern in patterns.items() if pattern is not None},
        **({"qconfig": FLOAT} if rule.qconfig is None else _parts(rule.qconfig, default, named)),
        **({"why": rule.why} if rule.why else {}),
        **{key: True for key in FLAGS if getattr(rule, key)},
    }


def _parts(qconfig: QConfig, default: QConfig, named: dict[QuantSpec, str]) -> dict[str, Any]:
    return {part: _part(part, getattr(qconfig, part), getattr(default, part), named) for part in PARTS}


def _part(part: str, spec: QuantSpec | None, default: QuantSpec | None, named: dict[QuantSpec, str]) -> Any:
    """The shortest of the forms that the header lists, with the number of bits in sight."""
    if spec is None:
        return FLOAT
    values = _values(spec)
    written = {key: _KEYS[key].write(value) for key, value in values.items()}  # refuses what no file can say
    if default is not None:
        usual = _values(default)
        changed = {key: written[key] for key in values if key != "bits" and values[key] != usual[key]}
        if not changed:
            return spec.bits
        if len(changed) == 1:
            return _inline({"bits": spec.bits, **changed})
    for other, name in named.items():
        if replace(other, element=IntType(spec.bits, other.element.signed)) == spec:
            return _inline({"like": name, "bits": spec.bits})
    named[spec] = _free_name(f"{part}_{_observer_name(spec)}", named.values())
    return _inline({"like": named[spec], "bits": spec.bits})


def _observer_name(spec: QuantSpec) -> str:
    observer = spec.observer.observer if isinstance(spec.observer, Factory) else spec.observer
    return "dynamic" if spec.dynamic else (observer.__name__.lower() if isinstance(observer, type) else "plain")


def _free_name(stem: str, taken: Iterable[str]) -> str:
    names = [stem, *(f"{stem}_{i}" for i in range(2, len(list(taken)) + 2))]
    return next(name for name in names if name not in taken)


def _values(spec: QuantSpec) -> dict[str, Any]:
    """What a spec says, by the keys of the file."""
    if type(spec) is not QuantSpec:
        raise ConfigError(f"a {type(spec).__name__} cannot be written, only a QuantSpec")
    return {"bits": spec.bits, "signed": spec.element.signed, **{key: getattr(spec, key) for key in _ATTRIBUTES}}


def _all_keys(spec: QuantSpec) -> dict[str, Any]:
    """All keys that are needed and those that every reader wants to see."""
    return {
        key: _KEYS[key].write(value)
        for key, value in _values(spec).items()
        if key not in _ATTRIBUTES or key in ("scheme", "granularity") or value != _ATTRIBUTES[key]
    }


def _table(values: Mapping[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        table[key] = _inline(value) if type(value) is dict else value
    return table


def _inline(values: Mapping[str, Any]) -> InlineTable:
    table = tomlkit.inline_table()
    for key, value in values.items():
        table[key] = _inline(value) if type(value) is dict else value
    return table


def _write_kind(kinds: Kinds, value: Any) -> Any:
    """A value of plain fields by its name, with the fields that are not as usual."""
    name = next((name for name, kind in kinds.items() if type(value) is kind), None)
    if name is None:
        raise ConfigError(f"a {type(value).__name__} cannot be written", hint="known are " + ", ".join(kinds))
    options = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return {"kind": name, **options} if options else name


def _write_observer(observer: Any) -> Any:
    if observer is None:
        return NO_OBSERVER
    with_options = type(observer) is Factory
    kind = observer.observer if with_options else observer
    name = next((name for name, known in OBSERVERS.items() if known is kind), None)
    if name is None:
        raise ConfigError(
            f"the observer {getattr(kind, '__name__', kind)!r} cannot be written: it is none of qfx's own",
            hint=f"a file names {', '.join(OBSERVERS)} only, because reading it runs no code; save the recipe with one "
            "of these, and set the observer in Python after loading",
        )
    return {"kind": name, **dict(observer.options)} if with_options else name


# --- reading ----------------------------------------------------------------------------------------------------------


def from_toml(text: str, file: str = "") -> Recipe:
    """The recipe that a text describes; ``file`` is named in errors.

    Raises:
        ConfigError: the text is no TOML or no recipe.
    """
    try:
        document = tomlkit.parse(text).unwrap()
    except ParseError as error:
        source = f"{file}:{error.line}" if file else f"line {error.line}"
        raise ConfigError(f"the file is not TOML: {error}", source=source) from None
    except TOMLKitError as error:
        raise ConfigError(f"the file is not TOML: {error}", source=file) from None
    return _recipe(document, _Place(file))


@dataclass(frozen=True)
class _Place:
    """Where in the file a value stands, for errors. ``rule`` counts from 1, as a printed recipe does."""

    file: str
    keys: tuple[str, ...] = ()
    rule: int = 0
    layer: str = ""

    def key(self, name: str) -> _Place:
        return replace(self, keys=(*self.keys, name))

    def error(self, what: str, hint: str = "") -> ConfigError:
        words = [f"rule {self.rule}" if self.rule else "", ".".join(self.keys)]
        place = ", ".join(filter(None, words))
        text = f"{place}: {what}" if place else what
        return ConfigError(text, where=self.layer, source=self.file, hint=hint)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of the values' own classes get this place; no reader of a key is called inside."""
        try:
            yield
        except ConfigError as error:
            raise self.error(error.what, error.hint) from None


_TYPES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "a table",
    list: "an array",
}


def _typed(value: Any, place: _Place, *types: type) -> Any:
    """``value``, which is of one of the types exactly: true is no integer here."""
    if type(value) not in types:
        wanted = " or ".join(_TYPES[t] for t in types)
        raise place.error(f"expected {wanted}, got {_TYPES.get(type(value), 'a date or time')}")
    return value


def _one_of(name: str, known: Iterable[str], what: str, place: _Place, hint: str = "") -> str:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise place.error(f"there is no {what} {name!r}{guess}", hint or "known are " + (", ".join(known) or "none"))
    return name


def _keys(value: Any, known: Iterable[str], place: _Place) -> dict[str, Any]:
    """``value`` as a table that has no other keys than the known."""
    table: dict[str, Any] = _typed(value, place, dict)
    for key in table:
        _one_of(key, known, "key", place)
    return table


def _needed(table: Mapping[str, Any], keys: Iterable[str], place: _Place, hint: str = "") -> None:
    missing = [key for key in keys if key not in table]
    if missing:
        raise place.error(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", hint)


def _recipe(document: dict[str, Any], place: _Place) -> Recipe:
    _needed(document, ["version"], place, hint=f"this qfx writes version = {VERSION}")
    version = _typed(document["version"], place.key("version"), int)
    if version != VERSION:  # before all else: a newer file may have keys that are unknown here
        raise place.key("version").error(
            f"the file has version {version}, this qfx knows version {VERSION}",
            hint="update qfx" if version > VERSION else f"write version = {VERSION}",
        )
    known = ("version", "name", "reduce_range", "embedding_storage", "default", "ends", "specs", "rules")
    _keys(document, known, place)
    _needed(document, ["name", "default"], place)
    specs = _named_specs(document.get("specs", {}), place.key("specs"))
    default = _default(document["default"], specs, place.key("default"))
    tables = _typed(document.get("rules", []), place.key("rules"), list)
    ends, storage = document.get("ends"), document.get("embedding_storage")
    recipe = Recipe(
        name=_typed(document["name"], place.key("name"), str),
        default=default,
        rules=tuple(_read_rule(table, default, specs, replace(place, rule=i)) for i, table in enumerate(tables, 1)),
        reduce_range=_typed(document.get("reduce_range", False), place.key("reduce_range"), bool),
        ends=None if ends is None else _qconfig(ends, default, specs, place.key("ends")),
    )
    if storage is None:
        return recipe
    at = place.key("embedding_storage")
    with at.named():
        return recipe.with_embedding_storage(_typed(storage, at, int))


Specs = Mapping[str, QuantSpec]


def _named_specs(tables: Any, place: _Place) -> Specs:
    specs = {}
    for name, table in _typed(tables, place, dict).items():
        if name == FLOAT:
            raise place.key(name).error(f"no spec may bear the name {FLOAT!r}, which means: not quantized")
        specs[name] = _changed(_keys(table, _KEYS, place.key(name)), None, place.key(name))
    return specs


def _default(table: Any, specs: Specs, place: _Place) -> QConfig:
    parts = _keys(table, PARTS, place)
    _needed(parts, PARTS, place, hint=f'write "{FLOAT}" for what is not quantized')
    return QConfig(**{part: _read_part(parts[part], None, specs, place.key(part)) for part in PARTS})


def _qconfig(table: Any, default: QConfig, specs: Specs, place: _Place) -> QConfig:
    """Parts that the table does not name are the default's; it names one at least."""
    parts = _keys(table, PARTS, place)
    if not parts:
        raise place.error("neither weight nor activation is given", hint="give one, or delete the table")
    return replace(
        default,
        **{part: _read_part(v, getattr(default, part), specs, place.key(part)) for part, v in parts.items()},
    )


def _read_rule(table: Any, default: QConfig, specs: Specs, place: _Place) -> QuantRule:
    known = (*PATTERNS, *PARTS, "qconfig", "why", *FLAGS)
    layer = table.get("layer") if type(table) is dict else None
    place = replace(place, layer=layer if type(layer) is str else "")
    rule = _keys(table, known, place)
    parts = {part: rule[part] for part in PARTS if part in rule}
    if bool(parts) == ("qconfig" in rule):
        raise place.error(
            "qconfig stands beside weight or activation" if parts else "the rule does not say what it does",
            hint=f'give weight, activation or both, or qconfig = "{FLOAT}"',
        )
    if "qconfig" in rule:
        at = place.key("qconfig")
        _one_of(_typed(rule["qconfig"], at, str), [FLOAT], "qconfig", at)
    return QuantRule(
        qconfig=_qconfig(parts, default, specs, place) if parts else None,
        **{key: _typed(rule[key], place.key(key), str) for key in (*PATTERNS, "why") if key in rule},
        **{key: _typed(rule[key], place.key(key), bool) for key in FLAGS if key in rule},
    )


def _read_part(value: Any, default: QuantSpec | None, specs: Specs, place: _Place) -> QuantSpec | None:
    """One of the forms that the header lists. ``default`` None: it is float, or the default itself is read."""
    match _typed(value, place, int, str, dict):
        case int(bits):
            if default is None:
                raise place.error(
                    f"{bits} bits of what? There is no default spec to take the rest from",
                    hint=f'name a spec of [specs]: {{like = "name", bits = {bits}}}',
                )
            with place.named():
                return replace(default, element=IntType(bits, default.element.signed))
        case str(name):
            return None if name == FLOAT else specs[_one_of(name, [*specs, FLOAT], "spec", place)]
    table = dict(_keys(value, ("like", *_KEYS), place))
    if "like" not in table:
        return _changed(table, default, place)
    at = place.key("like")
    return _changed(table, specs[_one_of(_typed(table.pop("like"), at, str), specs, "spec", at)], place)


def _changed(table: Mapping[str, Any], base: QuantSpec | None, place: _Place) -> QuantSpec:
    """``base`` with the keys of ``table`` changed; without a base the table is whole."""
    if base is None:
        _needed(table, ("bits", "signed"), place, hint="no other spec is there to take them from")
    values = {} if base is None else _values(base)
    values |= {key: _KEYS[key].read(value, place.key(key)) for key, value in table.items()}
    with place.key("bits").named():
        element = IntType(values.pop("bits"), values.pop("signed"))
    with place.named():
        return QuantSpec(element, **values)


def _read_enum(choices: type[Enum], value: Any, place: _Place) -> Enum:
    known = [choice.value for choice in choices]
    return choices(_one_of(_typed(value, place, str), known, choices.__name__.lower(), place))


def _write_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_dtype(value: Any, place: _Place) -> torch.dtype:
    return DTYPES[_one_of(_typed(value, place, str), DTYPES, "type of scales", place)]


def _read_kind(kinds: Kinds, what: str, value: Any, place: _Place, hint: str = "") -> tuple[type, dict[str, Any]]:
    """The class that a name, or a table with the key ``kind``, asks for, and the options of the table."""
    _typed(value, place, str, dict)
    table, at = (dict(value), place.key("kind")) if type(value) is dict else ({"kind": value}, place)
    _needed(table, ["kind"], place)
    kind = kinds[_one_of(_typed(table.pop("kind"), at, str), kinds, what, at, hint)]
    arguments = {name: a for name, a in inspect.signature(kind, eval_str=True).parameters.items() if name != "spec"}
    options = _keys(table, arguments, place)
    _needed(options, [name for name, a in arguments.items() if a.default is inspect.Parameter.empty], place)
    return kind, {
        name: _read_option(arguments[name].annotation, option, place.key(name)) for name, option in options.items()
    }


def _read_option(of: type, value: Any, place: _Place) -> Any:
    return float(_typed(value, place, float, int)) if of is float else _typed(value, place, of)


def _read_value(kinds: Kinds, what: str, value: Any, place: _Place) -> Any:
    kind, options = _read_kind(kinds, what, value, place)
    with place.named():
        return kind(**options)


def _read_observer(value: Any, place: _Place) -> type[Observer] | Factory | None:
    if value == NO_OBSERVER:
        return None
    hint = f"choose one of {', '.join(OBSERVERS)}; set an observer of your own in Python after loading"
    kind, options = _read_kind(OBSERVERS, "observer", value, place, hint)
    for name, option in options.items():
        if type(option) is int and not 1 <= option <= MOST:
            raise place.key(name).error(f"{name} lies between 1 and {MOST}, got {option}")
    factory: Factory = kind.with_options(**options)  # type: ignore[attr-defined]
    with place.named():
        factory(QuantSpec(INT8))  # the observer judges its options
    return factory if type(value) is dict else factory.observer


@dataclass(frozen=True)
class _Key:
    """How a key of a spec is written, and how it is read."""

    write: Callable[[Any], Any]
    read: Callable[[Any, _Place], Any]


def _plain(of: type) -> _Key:
    return _Key(lambda value: value, lambda value, place: _typed(value, place, of))


def _enum(choices: type[Enum]) -> _Key:
    return _Key(lambda choice: choice.value, partial(_read_enum, choices))


def _kind(kinds: Kinds, what: str) -> _Key:
    return _Key(partial(_write_kind, kinds), partial(_read_value, kinds, what))


_KEYS = {
    "bits": _plain(int),
    "signed": _plain(bool),
    "scheme": _enum(Scheme),
    "granularity": _kind(GRANULARITIES, "granularity"),
    "observer": _Key(_write_observer, _read_observer),
    "dynamic": _plain(bool),
    "narrow_range": _plain(bool),
    "ranges": _kind(RANGES, "way to find ranges"),
    "estimator": _enum(Estimator),
    "scale_dtype": _Key(_write_dtype, _read_dtype),
}
_ATTRIBUTES = {field.name: field.default for field in fields(QuantSpec) if field.name != "element"}
