"""The structure of a model's arguments and results: nested containers with tensors at their leaves, as a value.

Unlike ``torch.utils._pytree`` it takes dataclasses and mappings that nobody registered, compares what is called with
what was recorded in the user's terms, pickles, and comes back in a process in which a container's class is missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qfx.errors import QfxWarning


class ClassMissingWarning(QfxWarning):
    """The class of a loaded model's result cannot be imported here; a dict or tuple takes its place."""


@dataclass(frozen=True)
class Leaf:
    """A tensor (in results a symbolic number too), by its position in the flat list."""

    index: int


@dataclass(frozen=True)
class Constant:
    """Anything that is no tensor and no container; capture has baked it into the graph."""

    value: Any


class ClassRef:
    """A class that pickles by name and copies as itself; where it cannot be imported, ``cls`` is None."""

    def __init__(self, cls: type) -> None:
        self.cls: type | None = cls
        self.name = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def named(cls, name: str, found: type | None) -> ClassRef:
        """The class ``found`` of what a file calls ``name``; None: there is none here."""
        ref = cls.__new__(cls)
        ref.name, ref.cls = name, found
        return ref

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassRef:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassRef) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name

    def __getstate__(self) -> str:
        return self.name

    def __setstate__(self, name: str) -> None:
        self.name, self.cls = name, _find_class(name)


def _find_class(name: str) -> type | None:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        warnings.warn(f"{name} cannot be imported: a dict or tuple takes its place", ClassMissingWarning, stacklevel=2)
        return None
    return found if isinstance(found, type) else None


def find_imported(name: str, kind: str, keys: Sequence[Any], by_init: Sequence[str]) -> type | None:
    """The class that a stranger's file calls ``name``, where its module is imported and building one runs no code.

    That is: Python's own containers, named tuples, dataclasses that do nothing when they are made, and dictionaries
    that are dataclasses, such as the outputs of Hugging Face; each with fields that fit ``keys``. For others, what
    :func:`rebuild` makes of None takes their place. Nothing is imported, and no attribute is computed.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    fits = isinstance(found, type) and _FITS[kind](found, tuple(keys), tuple(by_init))
    if not fits and found is None and kind not in _OWN:
        warnings.warn(f"{name} is not imported: a dict or tuple takes its place", ClassMissingWarning, stacklevel=2)
    return found if fits else _OWN.get(kind)


_OWN: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict}


def _is_record(cls: type, keys: tuple[Any, ...], _: tuple[str, ...]) -> bool:
    if not (issubclass(cls, OrderedDict) and dataclasses.is_dataclass(cls)):
        return False
    known = dataclasses.fields(cls)
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    needed = {f.name for f in known if (f.default, f.default_factory) == absent}
    return needed <= set(keys) <= {f.name for f in known}


def _is_plain_dataclass(cls: type, keys: tuple[Any, ...], by_init: tuple[str, ...]) -> bool:
    if not dataclasses.is_dataclass(cls) or hasattr(cls, "__post_init__") or "__new__" in vars(cls):
        return False
    known = dataclasses.fields(cls)
    own = "__init__" in vars(cls) and vars(cls)["__dataclass_params__"].init
    return own and keys == tuple(f.name for f in known) and by_init == tuple(f.name for f in known if f.init)


_FITS: dict[str, Callable[[type, tuple[Any, ...], tuple[str, ...]], bool]] = {
    "tuple": lambda cls, keys, _: (
        cls in (tuple, torch.Size)
        or (cls.__module__ == "torch.return_types" and getattr(cls, "n_fields", None) == len(keys))
    ),
    "list": lambda cls, *_: cls is list,
    "dict": lambda cls, *_: cls is dict,
    "mapping": lambda cls, *_: cls is OrderedDict,
    "namedtuple": lambda cls, keys, _: cls.__bases__ == (tuple,) and len(getattr(cls, "_fields", ())) == len(keys),
    "record": _is_record,
    "dataclass": _is_plain_dataclass,
    "registered": lambda *_: False,
}


@dataclass(frozen=True)
class Container:
    """A container: its ``kind`` (a key of the tables below), class, keys and children."""

    kind: str
    cls: ClassRef
    keys: tuple[Any, ...]
    children: tuple[Structure, ...]
    context: Any = None


Structure = Leaf | Constant | Container


def kind_of(value: Any) -> str | None:
    """The kind of container that ``value`` is; None for a leaf or a constant."""
    cls = type(value)
    if cls is tuple or cls is list or cls is dict:
        return str(cls.__name__)
    if value is None or cls in _SCALARS or isinstance(value, (Tensor, type)):
        return None
    if isinstance(value, tuple):
        return "namedtuple" if hasattr(value, "_fields") else "tuple"
    if isinstance(value, Mapping):
        return "record" if dataclasses.is_dataclass(value) else "mapping"
    if dataclasses.is_dataclass(value):
        return "dataclass"
    if cls in pytree.SUPPORTED_NODES:
        return "registered"
    return "list" if isinstance(value, list) else None


_SCALARS = frozenset({bool, int, float, str, bytes, complex, torch.dtype, torch.device})


def parts(value: Any, kind: str) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """The keys, the children and the context of a container of that kind."""
    if kind in ("tuple", "list", "namedtuple"):
        return tuple(range(len(value))), tuple(value), None
    if kind in ("dict", "mapping", "record"):
        return tuple(value.keys()), tuple(value.values()), None
    if kind == "dataclass":
        fields = dataclasses.fields(value)
        by_init = tuple(f.name for f in fields if f.init)
        return tuple(f.name for f in fields), tuple(getattr(value, f.name) for f in fields), by_init
    children, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return tuple(range(len(children))), tuple(children), context


def _dataclass(cls: type, keys: Sequence[Any], values: Sequence[Any], context: Any) -> Any:
    """``context``: the fields that the constructor takes; the others are set behind it."""
    given = dict(zip(keys, values, strict=True))
    made = cls(**{name: given.pop(name) for name in context})
    for name, value in given.items():
        object.__setattr__(made, name, value)
    return made


_BUILD: dict[str, Callable[[type, Sequence[Any], Sequence[Any], Any], Any]] = {
    "tuple": lambda cls, keys, values, _: cls(values),
    "list": lambda cls, keys, values, _: cls(values),
    "namedtuple": lambda cls, keys, values, _: cls(*values),
    "dict": lambda cls, keys, values, _: dict(zip(keys, values, strict=True)),
    "mapping": lambda cls, keys, values, _: cls(dict(zip(keys, values, strict=True))),
    "record": lambda cls, keys, values, _: cls(**dict(zip(keys, values, strict=True))),
    "dataclass": _dataclass,
    "registered": lambda cls, keys, values, context: pytree.SUPPORTED_NODES[cls].unflatten_fn(list(values), context),
}


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The tensors of ``value`` (and symbolic numbers) in order, and its structure."""
    leaves: list[Any] = []

    def walk(part: Any) -> Structure:
        if isinstance(part, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            leaves.append(part)
            return Leaf(len(leaves) - 1)
        kind = kind_of(part)
        if kind is None:
            return Constant(part)
        keys, children, context = parts(part, kind)
        return Container(kind, ClassRef(type(part)), keys, tuple([walk(c) for c in children]), context)

    return leaves, walk(value)


def rebuild(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The value that :func:`flatten` took apart, with other leaves."""
    if isinstance(structure, Leaf):
        return leaves[structure.index]
    if isinstance(structure, Constant):
        return structure.value
    values = [rebuild(child, leaves) for child in structure.children]
    cls = structure.cls.cls
    if cls is None:
        named = structure.kind in ("mapping", "record", "dataclass")
        return dict(zip(structure.keys, values, strict=True)) if named else tuple(values)
    return _BUILD[structure.kind](cls, structure.keys, values, structure.context)


def paths(structure: Structure, at: str = "") -> Iterator[tuple[str, Leaf | Constant]]:
    """Every leaf and constant with its path in Python's spelling, such as ``batch['image']`` or ``states[0]``."""
    if not isinstance(structure, Container):
        yield at, structure
        return
    for key, child in zip(structure.keys, structure.children, strict=True):
        yield from paths(child, step(structure.kind, at, key))


def opaque(structure: Structure, at: str = "") -> tuple[str, Any] | None:
    """The first constant that is no plain data, with its path: an object that a graph can neither take nor return."""
    for path, part in paths(structure, at):
        if isinstance(part, Constant) and not isinstance(part.value, _PLAIN):
            return path, part.value
    return None


_PLAIN = (
    NoneType,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    range,
    type,
    Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def step(kind: str, at: str, key: Any) -> str:
    """``at``, one key further down."""
    return f"{at}.{key}" if kind in ("record", "dataclass") else f"{at}[{key!r}]"
