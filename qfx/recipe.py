"""Recipes: which layer is quantized how, as an ordered table of rules that is a value.

The first rule that matches a node decides. A rule matches by operator (``op="linear"``), by layer path
(``layer="encoder.*"``), by module class (``module="Attention"``), or by several together; all take shell patterns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from qfx.errors import ConfigError
from qfx.observers import Histogram, MinMax, Mse
from qfx.registry import Registry
from qfx.spec import (
    INT4,
    INT8,
    UINT8,
    IntType,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    QConfig,
    QuantSpec,
    Scheme,
)
from qfx.training import MOVING, Learned, Ranges

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What rules look at: an operator at a place of the user's model.

    ``nth()`` counts the calls before it of the same module class, or else of the same operator, in the module around.
    """

    op: str
    layer: str
    modules: tuple[str, ...] = ()
    nth: Callable[[], int] | None = None


@dataclass(frozen=True)
class QuantRule:
    """``qconfig`` for what matches, or None: it stays float. ``why`` is shown in the table.

    A pattern that is None matches all. ``layer`` matches the path itself or any parent of it, so that ``"encoder"``
    means everything inside. ``own`` marks a preset's rule: a rule of the user's that matches nothing is an error.
    ``exact``: ``layer`` is one path, not a pattern, and what is inside of it is not meant.
    """

    qconfig: QConfig | None
    op: str | None = None
    layer: str | None = None
    module: str | None = None
    why: str = ""
    own: bool = False
    exact: bool = False

    def matches(self, subject: Subject) -> bool:
        return (
            (self.op is None or fnmatchcase(subject.op, self.op))
            and (self.layer is None or self._reaches(subject.layer))
            and (self.module is None or any(fnmatchcase(name, self.module) for name in subject.modules))
        )

    def _reaches(self, path: str) -> bool:
        assert self.layer is not None
        return path == self.layer if self.exact else any(fnmatchcase(name, self.layer) for name in _names(path))

    def __str__(self) -> str:
        where = [f"{k}={v!r}" for k, v in (("op", self.op), ("layer", self.layer), ("module", self.module)) if v]
        return f"{' '.join(where) or 'everything'}: {self.qconfig or 'float'}" + (f" ({self.why})" if self.why else "")


def _names(path: str) -> list[str]:
    """The path and its parents, each with a dot behind it as well: ``head.*`` means ``head`` itself too."""
    parts = path.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [name + end for name in parents for end in ("", ".")]


class _Keep:
    """The part of a QConfig that ``Recipe.set`` leaves as the recipe's default."""

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep()
Part = QuantSpec | int | None | _Keep

EMBEDDING_BITS = (4, 8)


@dataclass(frozen=True)
class Recipe:
    """An ordered table of rules over a default.

    ``reduce_range`` observes activations in 7 bits, for CPUs whose 8-bit kernels saturate. ``embedding_storage``: the
    bits in which embeddings keep their tables, None for float; they compute in float either way. Recipes print, compare
    and hash as values; every method returns a new one. ``ends``: what the first and the last layers get that no rule
    names, found in the graph: those with no other layer before, or behind.
    """

    name: str
    default: QConfig
    rules: tuple[QuantRule, ...] = ()
    reduce_range: bool = False
    embedding_storage: int | None = None
    ends: QConfig | None = None

    def __post_init__(self) -> None:
        if self.embedding_storage is not None and self.embedding_storage not in EMBEDDING_BITS:
            raise ConfigError(
                f"embeddings cannot be stored in {self.embedding_storage!r} bits",
                hint="choose " + " or ".join(map(str, EMBEDDING_BITS)) + ", or None for float",
            )

    # --- presets ------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """The recipe of that name: ``int8``, ``int8_dynamic``, ``w8a16``, ``w4a16``, ``w4a4_lsq`` and its like, or a
        plug-in (:func:`register_recipe`).

        Raises:
            ConfigError: there is no such recipe; the text lists those there are.
        """
        return RECIPES_BY_NAME.find(name)

    @classmethod
    def int8(cls) -> Recipe:
        """Static W8A8: unsigned affine activations per tensor, signed symmetric weights per channel."""
        return PRESETS["int8"]

    @classmethod
    def int8_dynamic(cls) -> Recipe:
        """Linear layers with int8 weights per channel and activations quantized per token at run time."""
        return PRESETS["int8_dynamic"]

    @classmethod
    def w8a16(cls) -> Recipe:
        """Linear weights in 8 bits per channel, everything else as it is."""
        return PRESETS["w8a16"]

    @classmethod
    def w4a16(
        cls, group_size: int = 128, *, ranges: Ranges = MOVING, scale_dtype: torch.dtype = torch.float32
    ) -> Recipe:
        """Linear weights in 4 bits per group of 32, 64 or 128, everything else as it is; ``ranges`` is for training.

        With ``scale_dtype=torch.float16`` a saved model takes 2 bytes a group beside its integers, not 4.
        """
        return _grouped(4, group_size, ranges, scale_dtype)

    @classmethod
    def w3a16(
        cls, group_size: int = 128, *, ranges: Ranges = MOVING, scale_dtype: torch.dtype = torch.float32
    ) -> Recipe:
        """As :meth:`w4a16`, in 3 bits."""
        return _grouped(3, group_size, ranges, scale_dtype)

    @classmethod
    def lsq(cls, weight_bits: int, activation_bits: int) -> Recipe:
        """Learned step sizes for weights per channel and activations per tensor, to be trained with ``mode="qat"``.

        The first and last layers, sums and averages have 8 bits, as is usual below 8 bits: a residual stream that is
        rounded to 2 bits at every sum carries nothing. Method: Esser et al., 2020 (arXiv:1902.08153).
        """
        narrow, wide = _learned(weight_bits, activation_bits), _learned(8, 8)
        why = "sums and averages keep 8 bits"
        rules = tuple(QuantRule(wide, op=op, why=why, own=True) for op in ("add", "mul", "mean", "*avg_pool*"))
        return Recipe(f"w{weight_bits}a{activation_bits}_lsq", narrow, rules, ends=wide)

    @classmethod
    def w4a4_lsq(cls) -> Recipe:
        """:meth:`lsq` in 4 bits."""
        return PRESETS["w4a4_lsq"]

    @classmethod
    def tensorrt(cls) -> Recipe:
        """Static W8A8 as TensorRT takes it: signed and symmetric throughout, weights per channel."""
        return PRESETS["tensorrt"]

    @classmethod
    def openvino(cls) -> Recipe:
        """Static W8A8 for OpenVINO on any x86 CPU: as :meth:`int8` with 7-bit weights, whose sums do not saturate."""
        return PRESETS["openvino"]

    @classmethod
    def xnnpack(cls) -> Recipe:
        """Static W8A8 as XNNPACK takes it: signed affine activations, signed symmetric weights per channel."""
        return PRESETS["xnnpack"]

    @classmethod
    def from_qconfig_mapping(cls, mapping: Any) -> Recipe:
        """The recipe of a ``QConfigMapping``: qfx.compat's own, one of torch's, or its dict.

        Precedence, from the strongest, is that of torch: a call by its number in a module, a module's path or the
        nearest around it, the first regular expression, the module's class, the function, the global qconfig. A qconfig
        of None means float. Dynamic and weight-only qconfigs hold for linear layers. What torch's observers ask for and
        qfx does without (``reduce_range``, ``eps``, fixed ranges of a sigmoid) is logged.

        Raises:
            ConfigError: a part of it has no counterpart; the text names it and says what to write instead.
        """
        from qfx import qconfig_mapping

        found = qconfig_mapping.translate(mapping)
        for note in found.notes:
            log.info(note)
        return found.recipe

    # --- refinement ---------------------------------------------------------------------------------------------

    def skip(
        self,
        layer: str | type[nn.Module] | None = None,
        *,
        op: str | None = None,
        module: str | None = None,
        why: str = "",
    ) -> Recipe:
        """Leave what matches in float. ``layer`` is a path pattern, or a module class."""
        return self._with(layer, op, module, None, why or "the recipe skips it")

    def set(
        self,
        layer: str | type[nn.Module] | None = None,
        *,
        op: str | None = None,
        module: str | None = None,
        weight: Part = KEEP,
        activation: Part = KEEP,
        why: str = "",
    ) -> Recipe:
        """Quantize what matches with other specs: a QuantSpec, a number of bits, or None for float.

        Parts that are not named are the recipe's default.
        """
        qconfig = QConfig(
            activation=_part(activation, self.default.activation, "activation"),
            weight=_part(weight, self.default.weight, "weight"),
        )
        return self._with(layer, op, module, qconfig, why or "the recipe sets it")

    def with_embedding_storage(self, bits: int | None = 8) -> Recipe:
        """Keep the tables of embeddings in 8 bits (a scale per row), 4 (a scale per 32 columns), or in float (None).

        A lookup gathers integers and dequantizes only those; its result stays float. A table that the recipe skips
        (``skip("embeddings.word")``), or that is read in float elsewhere too, stays float, with a note that says so.

        Raises:
            ConfigError: no table is stored in so many bits.
        """
        return replace(self, embedding_storage=bits)

    def _with(
        self,
        layer: str | type[nn.Module] | None,
        op: str | None,
        module: str | None,
        qconfig: QConfig | None,
        why: str,
    ) -> Recipe:
        if isinstance(layer, type):
            if module is not None:
                raise ConfigError(f"the rule names two module classes, {layer.__name__!r} and {module!r}")
            module, layer = layer.__name__, None
        if layer is None and op is None and module is None:
            raise ConfigError("a rule needs a layer, an op or a module to match")
        for what, pattern in (("layer", layer), ("op", op), ("module", module)):
            if not isinstance(pattern, str | None):
                raise ConfigError(
                    f"{what} is a {type(pattern).__name__}, not a pattern",
                    hint="give a string such as 'encoder.*', or a module class in place of the layer",
                )
        return replace(self, rules=(QuantRule(qconfig, op, layer, module, why), *self.rules))

    # --- resolution ---------------------------------------------------------------------------------------------

    def resolve(self, subject: Subject, *, end: bool = False) -> tuple[QConfig | None, str]:
        """The QConfig for a node, or None (float), with the words of the rule that decided.

        ``end``: it is a first or last layer.
        """
        rule = next((rule for rule in self.rules if rule.matches(subject)), None)
        by_place = self.ends if end and self.ends is not None else self.default
        qconfig = by_place if rule is None else rule.qconfig
        if qconfig is not None and self.reduce_range and qconfig.activation is not None:
            qconfig = replace(qconfig, activation=_reduced(qconfig.activation))
        why = "a first or last layer" if by_place is not self.default else ""
        return qconfig, (rule.why if rule else why)

    def unmatched(self, subjects: Collection[Subject]) -> tuple[QuantRule, ...]:
        """The user's rules that match none of ``subjects``."""
        return tuple(r for r in self.rules if not r.own and not any(r.matches(s) for s in subjects))

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to a TOML file that is made to be edited: see :func:`qfx.recipe_file.save`.

        Raises:
            ConfigError: the recipe holds what no file can say, such as an observer of the user's.
            OSError: the file cannot be written.
        """
        from qfx import recipe_file

        recipe_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe of a TOML file; nothing is imported or run: see :func:`qfx.recipe_file.load`.

        Raises:
            ConfigError: the file is no TOML or no recipe; the text names the file and the key.
            OSError: the file cannot be read.
        """
        from qfx import recipe_file

        return recipe_file.load(path)

    def __str__(self) -> str:
        lines = [f"Recipe {self.name}" + (" with reduced range" if self.reduce_range else "")]
        lines += [f"  embeddings stored in {self.embedding_storage} bits"] if self.embedding_storage else []
        lines += [f"  {i}. {rule}" for i, rule in enumerate(self.rules, 1)]
        lines += [f"  first and last layers: {self.ends}"] if self.ends else []
        return "\n".join([*lines, f"  else: {self.default}"])


def _part(part: Part, default: QuantSpec | None, what: str) -> QuantSpec | None:
    if isinstance(part, _Keep):
        return default
    if isinstance(part, int):
        if default is None:
            raise ConfigError(f"this recipe leaves the {what} float, so {part} bits need a whole QuantSpec")
        return replace(default, element=IntType(part, default.element.signed))
    if not isinstance(part, QuantSpec | None):
        raise ConfigError(f"{what} is a {type(part).__name__}", hint="give a QuantSpec, a number of bits, or None")
    return part


def _reduced(spec: QuantSpec) -> QuantSpec:
    return replace(spec, element=IntType(min(spec.bits, 7), spec.element.signed))


_ACTIVATION8 = QuantSpec(UINT8, Scheme.AFFINE, PerTensor(), Histogram)
_TOKEN8 = QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)
_WEIGHT8 = QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), MinMax)
_SIGNED8 = QuantSpec(INT8, Scheme.AFFINE, PerTensor(), Histogram)
_WEIGHT4 = QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(128), MinMax)

_NARROW8 = replace(_WEIGHT8, narrow_range=True)

CARRIED = (
    # Zero points of zero: Histogram chooses a range around it.
    Recipe("tensorrt", QConfig(replace(_SIGNED8, scheme=Scheme.SYMMETRIC), _NARROW8)),
    # 255 * 64 * 2 stays within the int16 in which CPUs without VNNI add two products; 8-bit weights would saturate.
    Recipe("openvino", QConfig(_ACTIVATION8, replace(_WEIGHT8, element=IntType(7, True)))),
    Recipe("xnnpack", QConfig(_SIGNED8, _NARROW8)),
)
"""What other engines accept, for ``qfx.export_onnx`` and ``qfx.export_pt2``; each has its engine's name."""


def _learned(weight_bits: int, activation_bits: int) -> QConfig:
    activation = replace(_ACTIVATION8, element=IntType(activation_bits, False), ranges=Learned())
    weight = replace(_WEIGHT8, element=IntType(weight_bits, True), observer=Mse, ranges=Learned())
    return QConfig(activation, weight)


def _grouped(bits: int, group_size: int, ranges: Ranges, scale_dtype: torch.dtype) -> Recipe:
    element, groups = IntType(bits, True), PerGroup(group_size)
    spec = replace(_WEIGHT4, element=element, granularity=groups, ranges=ranges, scale_dtype=scale_dtype)
    return _weight_only(f"w{bits}a16" + (f"_g{group_size}" if group_size != 128 else ""), spec)


def _linear_only(name: str, default: QConfig) -> Recipe:
    why = f"{name} quantizes linear layers only"
    return Recipe(name, default, (QuantRule(default, op="linear", own=True), QuantRule(None, why=why, own=True)))


def _weight_only(name: str, weight: QuantSpec) -> Recipe:
    return _linear_only(name, QConfig(None, weight))


PRESETS: dict[str, Recipe] = {
    "int8": Recipe("int8", QConfig(_ACTIVATION8, _WEIGHT8)),
    "int8_dynamic": _linear_only("int8_dynamic", QConfig(_TOKEN8, _WEIGHT8)),
    "w8a16": _weight_only("w8a16", _WEIGHT8),
    "w4a16": _weight_only("w4a16", _WEIGHT4),
    **{r.name: r for r in (Recipe.lsq(w, a) for w, a in ((8, 8), (4, 8), (4, 4), (3, 3), (2, 2)))},
    **{r.name: r for r in CARRIED},
}


def _made(plugin: object) -> Recipe:
    made = plugin() if callable(plugin) else plugin
    if not isinstance(made, Recipe):
        given = "returns" if callable(plugin) else "is"
        raise ConfigError(
            f"what is to be a recipe {given} a {type(made).__name__}",
            hint="give a qfx.Recipe, or a function without arguments that returns one",
        )
    return made


RECIPES_BY_NAME: Registry[Recipe] = Registry("recipe", "qfx.recipes", _made, reserved=("auto",))
RECIPES_BY_NAME.add_own(PRESETS.values())

R = TypeVar("R", bound=Recipe | Callable[[], Recipe])


def register_recipe(recipe: R) -> R:
    """Let ``recipe``, or what a function without arguments returns, be asked for by its own name; returns the argument.

    Raises:
        ConfigError: it is no recipe, or its name is taken.
    """
    RECIPES_BY_NAME.register(recipe)
    return recipe
