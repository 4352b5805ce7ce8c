"""Changes of a recipe as Python that can be pasted: ``recipe = recipe.skip("layer1.conv2")``.

The code takes ``recipe`` for the one that the model was quantized by, and needs ``import qfx`` and ``from dataclasses
import replace``. ``Recipe.set`` puts the recipe's default where a part is not named, so that what the model had is
named wherever it was another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import fx

from qfx import observers
from qfx.meta import info
from qfx.observers import Factory
from qfx.operators import Kind, is_constant, lookup, name_of, tensor_inputs
from qfx.passes.annotate import subject
from qfx.recipe import Recipe
from qfx.spec import PerAxis, QConfig, QuantSpec


@dataclass(frozen=True)
class Reader:
    """An operator whose rule decides how a value is rounded: ``layer`` and ``operator`` name it in a recipe.

    ``alone``: the layer holds no other operator, so that its path says all. ``weight`` is None where it has none.
    """

    layer: str
    operator: str
    alone: bool
    activation: QuantSpec | None = None
    weight: QuantSpec | None = None

    @property
    def place(self) -> str:
        """The arguments that let a rule match it."""
        return repr(self.layer) if self.alone else f"{self.layer!r}, op={self.operator!r}"


def reader_of(node: fx.Node, source: fx.Node, recipe: Recipe | None) -> Reader:
    """The operator ``node`` as one that reads the value of ``source``.

    Its specs are those on the node; of a graph from a file, which says none, those of the recipe's rule for it.
    """
    row, known, inputs = lookup(node), info(node), tensor_inputs(node)
    weight = inputs.index(node.args[row.weight]) if row is not None and row.weight is not None else None
    inside = f"{known.origin}."
    others = (
        n for n in node.graph.nodes if n is not node and f"{info(n).origin}.".startswith(inside) and _is_operator(n)
    )
    qconfig = recipe.resolve(subject(node))[0] if recipe is not None and not known.inputs else None
    specs = {i: spec for i, spec in enumerate(known.inputs) if isinstance(spec, QuantSpec)}
    if qconfig is not None:
        specs = {i: s for i in range(len(inputs)) if (s := qconfig.weight if i == weight else qconfig.activation)}
    return Reader(
        known.origin,
        name_of(node),
        alone=bool(known.origin) and not any(others),
        activation=next((specs[i] for i, n in enumerate(inputs) if n is source and i in specs and i != weight), None),
        weight=specs.get(weight) if weight is not None else None,
    )


def _is_operator(node: fx.Node) -> bool:
    row = lookup(node)
    return row is not None and row.kind is not Kind.SHARE and not is_constant(node)


# --- what is changed --------------------------------------------------------------------------------------------------

Change = dict[str, str] | None
"""The code of each part that a reader shall have, or None: it stays float."""

Remedy = Callable[[Reader, QConfig], Change]


def float_activations(reader: Reader, default: QConfig) -> Change:
    """Read the value in float; linear layers keep their integer weights."""
    return {"activation": "None"} if reader.operator == "linear" else None


def in_float(reader: Reader, default: QConfig) -> Change:
    """Leave the operator in float."""
    return None


def whole_range(reader: Reader, default: QConfig) -> Change:
    """Let MinMax observe the value: it clips nothing of the calibration data."""
    spec = reader.activation or default.activation
    return {"activation": changed(spec, default.activation, "activation", observer=observers.MinMax)}


def scale_per_channel(reader: Reader, default: QConfig) -> Change:
    """Give every output channel of the weight a scale of its own."""
    return {"weight": changed(reader.weight, default.weight, "weight", granularity=PerAxis(0))}


def whole_weight(reader: Reader, default: QConfig) -> Change:
    """Let MinMax choose the range of the weight: it clips nothing."""
    return {"weight": changed(reader.weight, default.weight, "weight", observer=observers.MinMax)}


class Mending:
    """Writes remedies one behind the other, so that a later one keeps what an earlier one changed of the same layer."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.default = recipe.default if recipe is not None else QConfig(None, None)
        self.changes: dict[str, Change] = {}

    def statement(self, remedy: Remedy, readers: Iterable[Reader]) -> str:
        """``recipe = recipe`` with a rule for every reader."""
        return "recipe = recipe" + "".join(dict.fromkeys(self._rule(remedy, reader) for reader in readers))

    def _rule(self, remedy: Remedy, reader: Reader) -> str:
        before, new = self.changes.get(reader.place, {}), remedy(reader, self.default)
        merged = None if before is None or new is None else {**self._own(reader), **before, **new}
        self.changes[reader.place] = merged
        if merged is None:
            return f".skip({reader.place})"
        return f".set({reader.place}, {', '.join(f'{part}={code}' for part, code in sorted(merged.items()))})"

    def _own(self, reader: Reader) -> dict[str, str]:
        """The parts that the reader has other than by default."""
        parts = {"activation": reader.activation, "weight": reader.weight}
        return {
            part: changed(spec, getattr(self.default, part), part)
            for part, spec in parts.items()
            if spec != getattr(self.default, part) and (part != "weight" or spec is not None)
        }


# --- values as code ---------------------------------------------------------------------------------------------------


def changed(spec: QuantSpec | None, base: QuantSpec | None, part: str, **changes: Any) -> str:
    """``spec`` with ``changes`` as code, by what it has other than ``base``, which is ``recipe.default.<part>``."""
    if spec is None:
        return "None"
    new = {f.name: changes.get(f.name, getattr(spec, f.name)) for f in fields(QuantSpec)}
    if base is None:
        defaults = {f.name: f.default for f in fields(QuantSpec)}
        words = [f"{name}={_code(v)}" for name, v in new.items() if defaults[name] is MISSING or v != defaults[name]]
        return f"qfx.QuantSpec({', '.join(words)})"
    words = [f"{name}={_code(value)}" for name, value in new.items() if value != getattr(base, name)]
    named = f"recipe.default.{part}"
    return f"replace({named}, {', '.join(words)})" if words else named


def _code(value: Any) -> str:
    """The value as an expression; of an observer of the user's own, the name that it has there."""
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, torch.dtype):
        return repr(value)
    if isinstance(value, Enum):
        return f"qfx.{type(value).__name__}.{value.name}"
    if isinstance(value, Factory):
        options = ", ".join(f"{name}={option!r}" for name, option in value.options)
        return f"{_code(value.observer)}.with_options({options})"
    if isinstance(value, type) or callable(value):
        name = getattr(value, "__name__", repr(value))
        return f"qfx.observers.{name}" if getattr(observers, name, None) is value else name
    return f"qfx.{value!r}"
