"""A QConfigMapping as a recipe: which layer has which qconfig, in the terms of ``torch.ao.quantization``.

Its precedence, from the strongest: a call by its number, the path of a module or of the nearest one around it, the
first regular expression that matches the path, the module's class, the function, and the global qconfig.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from qfx.errors import ConfigError
from qfx.qconfig_spec import FIXED, REUSES, qconfig_of, read
from qfx.recipe import QuantRule, Recipe, Subject
from qfx.spec import QConfig

KINDS = (
    "global_qconfig",
    "object_type_qconfigs",
    "module_name_regex_qconfigs",
    "module_name_qconfigs",
    "module_name_object_type_order_qconfigs",
)


@dataclass
class QConfigMapping:
    """Which qconfig holds where; the methods change it, and return it. A qconfig of None means float.

    A qconfig is a :class:`qfx.QConfig`, or any object with ``activation`` and ``weight``, such as torch's.
    """

    global_qconfig: Any = None
    object_type_qconfigs: OrderedDict[Callable[..., Any] | str, Any] = field(default_factory=OrderedDict)
    module_name_regex_qconfigs: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    module_name_qconfigs: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    module_name_object_type_order_qconfigs: OrderedDict[tuple[str, Callable[..., Any], int], Any] = field(
        default_factory=OrderedDict
    )

    def set_global(self, global_qconfig: Any) -> Self:
        """What holds where nothing else does."""
        self.global_qconfig = global_qconfig
        return self

    def set_object_type(self, object_type: Callable[..., Any] | str, qconfig: Any) -> Self:
        """For a class of modules, a function such as ``F.linear``, or the name of a method."""
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: Any) -> Self:
        """For modules whose path begins with a match; of several expressions the first counts."""
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: Any) -> Self:
        """For the module at a path and all inside of it."""
        self.module_name_qconfigs[module_name] = qconfig
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: Callable[..., Any], index: int, qconfig: Any
    ) -> Self:
        """For call number ``index``, from 0, of a class or function in the module at a path."""
        self.module_name_object_type_order_qconfigs[module_name, object_type, index] = qconfig
        return self

    def to_dict(self) -> dict[str, Any]:
        """As plain values, which :meth:`from_dict` reads."""
        ordered = self.module_name_object_type_order_qconfigs.items()
        return {
            "": self.global_qconfig,
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [(*key, qconfig) for key, qconfig in ordered],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: Mapping[str, Any]) -> Self:
        """Of :meth:`to_dict`'s keys, each of which may be missing.

        Raises:
            ConfigError: there is another key.
        """
        new = cls()
        known = new.to_dict()
        if unknown := [key for key in qconfig_dict if key not in known]:
            raise ConfigError(
                f"a mapping of qconfigs has no key {unknown[0]!r}", hint=f"its keys are {', '.join(map(repr, known))}"
            )
        new.set_global(qconfig_dict.get(""))
        new.object_type_qconfigs.update(qconfig_dict.get("object_type", ()))
        new.module_name_regex_qconfigs.update(qconfig_dict.get("module_name_regex", ()))
        new.module_name_qconfigs.update(qconfig_dict.get("module_name", ()))
        for module_name, object_type, index, qconfig in qconfig_dict.get("module_name_object_type_order", ()):
            new.set_module_name_object_type_order(module_name, object_type, index, qconfig)
        return new


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MappedRule(QuantRule):
    """A rule that matches as torch's mappings do, where a QuantRule has no word for it.

    ``regex``: the layer's path begins with a match. ``inside``: the innermost module is of this class. ``function``:
    the operator is no part of a module of ``torch.nn``. ``parent``, ``nth``: it is call number ``nth`` of its class, or
    of its operator, in the module at that path.
    """

    regex: str | None = None
    inside: str | None = None
    function: bool = False
    parent: str | None = None
    nth: int | None = None

    def matches(self, subject: Subject) -> bool:
        innermost = subject.modules[-1] if subject.modules else ""
        leaf = is_leaf(innermost)
        return (
            super().matches(subject)
            and (self.regex is None or re.match(self.regex, subject.layer) is not None)
            and (self.inside is None or innermost == self.inside)
            and not (self.function and leaf)
            and (self.parent is None or self.parent == (parent_of(subject.layer) if leaf else subject.layer))
            and (self.nth is None or (subject.nth is not None and self.nth == subject.nth()))
        )

    def __str__(self) -> str:
        names = ("regex", "inside", "parent", "nth")
        where = " ".join(f"{name}={value!r}" for name in names if (value := getattr(self, name)) is not None)
        return f"{where} {super().__str__()}" if where else super().__str__()


def parent_of(path: str) -> str:
    return path.rpartition(".")[0]


def is_leaf(class_name: str) -> bool:
    """Whether a class is one of ``torch.nn`` whose inside its users do not see."""
    known = getattr(nn, class_name, None)
    return isinstance(known, type) and known not in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


# --- translation ------------------------------------------------------------------------------------------------------

_STAY_FLOAT = ("layernorm", "layer_norm", "groupnorm", "group_norm", "instance_norm", "softmax", "prelu")
_BOUNDED = ("sigmoid", "hardsigmoid", "tanh")
_OBSERVED = "ranges of sigmoid, hardsigmoid and tanh are observed, in place of fixed ones"
_ALIASES = {
    "iadd": "add",
    "imul": "mul",
    "multiply": "mul",
    "concat": "cat",
    "concatenate": "cat",
    "truediv": "div",
    "interpolate": "upsample_*",
}
_LINEAR = "linear"
_LINEAR_ONLY = "what is found at run time, and weights alone, are integers in linear layers only"


@dataclass(frozen=True)
class Translation:
    """A mapping's recipe, and what its user should know."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def translate(mapping: Any, *, training: bool = False) -> Translation:
    """The recipe of a mapping.

    Args:
        mapping: a :class:`QConfigMapping`, torch's, or a dict as :meth:`QConfigMapping.from_dict` takes it.
        training: it is for quantization-aware training, so that its observers must round.

    Raises:
        ConfigError: a part of it has no counterpart; the text names it and says what to write instead.
    """
    if isinstance(mapping, Mapping):
        mapping = QConfigMapping.from_dict(mapping)
    if missing := [kind for kind in KINDS if not hasattr(mapping, kind)]:
        raise ConfigError(
            f"a {type(mapping).__name__} is no QConfigMapping: it has no {missing[0]}",
            hint="give a qfx.compat.QConfigMapping or torch's, or quantize with a qfx.Recipe by qfx.prepare",
        )
    return _Translator(training).translate(mapping)


@dataclass
class _Translator:
    training: bool
    notes: list[str] = field(default_factory=list)
    done: list[tuple[Any, QConfig]] = field(default_factory=list)

    def translate(self, mapping: Any) -> Translation:
        default = self._qconfig(mapping.global_qconfig, "the global qconfig")
        rules = [
            *self._calls(mapping.module_name_object_type_order_qconfigs),
            *self._paths(mapping.module_name_qconfigs),
            *self._regexes(mapping.module_name_regex_qconfigs),
            *self._types(mapping.object_type_qconfigs),
        ]
        if default is None:
            rules.append(QuantRule(None, why="the mapping has no global qconfig", own=True))
        elif _at_run_time(default):
            rules += _split(QuantRule(default, own=True))
        recipe = Recipe("qconfig_mapping", default or QConfig(None, None), tuple(rules))
        return Translation(recipe, tuple(dict.fromkeys(self.notes)))

    def _qconfig(self, given: Any, place: str) -> QConfig | None:
        """The same object gives the same specs, so that layers share scales where they share the qconfig."""
        if given is None:
            return None
        for known, made in self.done:
            if known is given:
                return made
        made, notes = qconfig_of(given, place, training=self.training)
        self.notes += notes
        self.done.append((given, made))
        return made

    def _calls(self, given: Mapping[tuple[str, Any, int], Any]) -> Iterator[QuantRule]:
        for (parent, kind, nth), qconfig in given.items():
            found = self._qconfig(qconfig, f"call {nth} of {_shown(kind)} in {parent!r}")
            why = f"the mapping's qconfig for call {nth} of {_shown(kind)} in {parent!r}"
            rule = MappedRule(found, why=why, parent=parent, nth=nth)
            if isinstance(kind, type):
                yield from _split(replace(rule, inside=kind.__name__))
            else:
                yield from _split(replace(rule, op=operator_of(kind), function=True))

    def _paths(self, given: Mapping[str, Any]) -> Iterator[QuantRule]:
        for path in sorted(given, key=lambda path: -path.count(".")):
            if not path:
                raise ConfigError("module_name '' is no path", hint="write set_global(qconfig)")
            found = self._qconfig(given[path], f"module_name {path!r}")
            yield from _split(QuantRule(found, layer=path, why=f"the mapping's qconfig for {path}"))

    def _regexes(self, given: Mapping[str, Any]) -> Iterator[QuantRule]:
        for regex, qconfig in given.items():
            try:
                re.compile(regex)
            except re.error as error:
                raise ConfigError(f"module_name_regex {regex!r} is no regular expression: {error}") from None
            found = self._qconfig(qconfig, f"module_name_regex {regex!r}")
            yield from _split(MappedRule(found, regex=regex, why=f"the mapping's qconfig for {regex}"))

    def _types(self, given: Mapping[Any, Any]) -> Iterator[QuantRule]:
        """Those of modules before those of functions. Usual mappings list types that a model does not have."""
        for kind in sorted(given, key=lambda kind: not isinstance(kind, type)):
            if self._needless(kind, given[kind]):
                continue
            found = self._qconfig(given[kind], f"object_type {_shown(kind)}")
            rule = MappedRule(found, own=True, why=f"the mapping's qconfig for {_shown(kind)}")
            if not isinstance(kind, type):
                yield from _split(replace(rule, op=operator_of(kind), function=True))
            elif is_leaf(kind.__name__) and kind.__module__.startswith("torch."):
                yield from _split(QuantRule(found, module=kind.__name__, own=True, why=rule.why))
            else:
                yield from _split(replace(rule, inside=kind.__name__))

    def _needless(self, kind: Any, qconfig: Any) -> bool:
        """Whether the entry says what qfx does without: such a type stays float, or its range is observed."""
        activation = getattr(qconfig, "activation", None)
        observer = read(activation).name if callable(activation) else ""
        name = _shown(kind).lower().rstrip("_")
        if observer == REUSES:  # what moves elements shares the scale of what it moves
            return True
        if observer in FIXED and name in _BOUNDED:
            self.notes.append(_OBSERVED)
            return True
        return qconfig is not None and name in _STAY_FLOAT


def _at_run_time(qconfig: QConfig) -> bool:
    """Whether activations are float or quantized at run time."""
    return qconfig.weight is not None and (qconfig.activation is None or qconfig.activation.dynamic)


def _split(rule: QuantRule) -> tuple[QuantRule, ...]:
    """The rule; where only linear layers can do what it asks for, one for them and one for the others."""
    if rule.qconfig is None or not _at_run_time(rule.qconfig):
        return (rule,)
    others = replace(rule, qconfig=None, why=_LINEAR_ONLY)
    if rule.op is not None:
        return (rule if rule.op == _LINEAR else others,)
    return replace(rule, op=_LINEAR), others


def _shown(kind: Any) -> str:
    return kind if isinstance(kind, str) else str(getattr(kind, "__name__", kind))


def operator_of(function: Any) -> str:
    """The ATen name, or a pattern of names, for ``F.linear``, ``torch.add``, ``operator.iadd``, ``"view"``.

    Raises:
        ConfigError: there is no such operator.
    """
    name = _shown(function).rstrip("_")
    name = _ALIASES.get(name, name)
    if "*" not in name and not hasattr(torch.ops.aten, name) and name != "getitem":
        raise ConfigError(
            f"object_type {_shown(function)!r} is no operator of torch",
            hint="name the operators that it calls, or the class of the module that calls it",
        )
    return name
