"""JSON taken strictly: values as they stand, tables with known keys and types, and what JSON has no word for, tagged.

Python's ``json`` reads NaN, Infinity, a key twice and any depth; files of strangers are refused all of that.
:func:`encode` writes what arguments of operators are made of: ``None``, bool, int, float, str and lists stand for
themselves, all else is a table with one key that says what it is, such as ``{"dtype": "float32"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from qfx.errors import ArtifactError

DEPTH = 16
"""How deep values may be nested."""

LARGEST = 2**63


def dumps(value: Any) -> str:
    """The one text of ``value``: ASCII, without spaces, keys in the order of the tables."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """The value of a text.

    Raises:
        ArtifactError: it is no JSON, says a key twice, holds NaN or infinity, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_table)
    except RecursionError:
        raise ArtifactError("the JSON is nested too deep") from None
    except ValueError as error:
        raise ArtifactError(f"the JSON cannot be read: {error}") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ArtifactError(f"the JSON holds {text}, which is no number")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ArtifactError("the JSON says a key of a table twice")
    return table


# --- tables and types -------------------------------------------------------------------------------------------------

_TYPES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "a table",
    list: "a list",
    type(None): "null",
}


def typed(value: Any, what: str, *types: type) -> Any:
    """``value``, which is of one of the types exactly (true is no integer), and no integer beyond 64 bits.

    Raises:
        ArtifactError: it is not.
    """
    if type(value) not in types:
        wanted = " or ".join(_TYPES[t] for t in types)
        raise ArtifactError(f"{what} should be {wanted}, not {_TYPES.get(type(value), type(value).__name__)}")
    if type(value) is int and not -LARGEST <= value < LARGEST:
        raise ArtifactError(f"{what} is an integer of more than 64 bits")
    return value


def listed(value: Any, what: str, *types: type, most: int = 2**20) -> list[Any]:
    """A list of at most ``most`` items that are all of one of the types.

    Raises:
        ArtifactError: it is not.
    """
    items: list[Any] = typed(value, what, list)
    if len(items) > most:
        raise ArtifactError(f"{what} has {len(items)} items, more than {most}")
    for i, item in enumerate(items):
        typed(item, f"{what}[{i}]", *types)
    return items


Keys = Mapping[str, tuple[type, ...]]
"""Keys of a table, each with the types that its value may have."""


def fields(value: Any, what: str, needed: Keys, optional: Keys = MappingProxyType({})) -> dict[str, Any]:
    """A table with all needed keys, perhaps some optional ones, and no other; each value of one of its types.

    Raises:
        ArtifactError: it is not.
    """
    table: dict[str, Any] = typed(value, what, dict)
    if missing := [key for key in needed if key not in table]:
        raise ArtifactError(f"{what} has no {missing[0]!r}")
    for key, item in table.items():
        types = needed.get(key) or optional.get(key)
        if types is None:
            raise ArtifactError(f"{what} has an unknown key {short(key)}")
        typed(item, f"{what}.{key}", *types)
    return table


def short(value: Any) -> str:
    """``value`` as errors show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- what JSON has no word for ----------------------------------------------------------------------------------------


def _torch(names: str) -> dict[str, Any]:
    return {name: getattr(torch, name) for name in names.split()}


_NAMED: dict[str, dict[str, Any]] = {
    "dtype": _torch(
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn "
        "float8_e5m2 complex64 complex128"
    ),
    "layout": _torch("strided"),
    "memory_format": _torch("preserve_format contiguous_format channels_last channels_last_3d"),
    "device": {"cpu": torch.device("cpu")},
}
DTYPES = _NAMED["dtype"]
_KINDS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    torch.device: "device",
}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class NodeName:
    """A node of a graph among encoded values, by its name."""

    name: str


def encode(value: Any, node: Callable[[Any], str | None] = lambda _: None) -> Any:
    """``value`` in JSON's own terms; ``node`` gives the name of what stands for a node, else None.

    Raises:
        ArtifactError: no file can say it.
    """
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return typed(value, "an integer", int)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if (name := node(value)) is not None:
        return {"node": name}
    if isinstance(value, list):
        return [encode(v, node) for v in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(v, node) for v in value]}
    if type(value) in _BY_PARTS:
        tag, take, _ = _BY_PARTS[type(value)]
        return {tag: [encode(v, node) for v in take(value)]}
    kind = _KINDS.get(type(value))
    text = str(value).removeprefix("torch.")
    if kind is None or text not in _NAMED[kind]:
        raise ArtifactError(f"no file can say {short(value)}, a {type(value).__name__}")
    return {kind: text}


def decode(value: Any, what: str, node: Callable[[NodeName], Any] | None = None, depth: int = 0) -> Any:
    """The value that :func:`encode` wrote; ``node`` gives what a name stands for, None: nothing here does.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    if depth > DEPTH:
        raise ArtifactError(f"{what} is nested too deep")
    if type(value) is list:
        return [decode(v, what, node, depth + 1) for v in value]
    if type(value) is not dict:
        return typed(value, what, type(None), bool, int, float, str)
    if len(value) != 1:
        raise ArtifactError(f"{what} is a table of {len(value)} keys: {short(value)}")
    ((tag, given),) = value.items()
    if tag == "node" and node is not None:
        return node(NodeName(typed(given, what, str)))
    if tag == "float" and given in ("inf", "-inf", "nan"):
        return _FLOATS[given]
    if tag == "tuple":
        return tuple(decode(v, what, node, depth + 1) for v in typed(given, what, list))
    if tag in _NAMED and type(given) is str and given in _NAMED[tag]:
        return _NAMED[tag][given]
    made = next((make for name, _, make in _BY_PARTS.values() if name == tag), None)
    if made is not None:
        parts = [decode(v, what, node, depth + 1) for v in typed(given, what, list)]
        try:
            return made(*parts)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{what} is no {tag}: {error}") from None
    raise ArtifactError(f"{what} cannot be {short(value)}")


_BY_PARTS: dict[type, tuple[str, Callable[[Any], Iterable[Any]], Callable[..., Any]]] = {
    slice: ("slice", lambda s: (s.start, s.stop, s.step), slice),
    range: ("range", lambda r: (r.start, r.stop, r.step), range),
    complex: ("complex", lambda c: (c.real, c.imag), complex),
}
"""Values of a few parts: the tag, what takes them apart, and what puts them together."""
