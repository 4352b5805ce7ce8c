"""A recipe that finds its bit widths itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qfx.bit_allocation import Pin
from qfx.budget import Budget
from qfx.divergence import Loss
from qfx.errors import ConfigError
from qfx.measure import Measurement
from qfx.recipe import Recipe

Metric = Callable[[nn.Module], Any]
"""``metric(model) -> number``: how good a model is, on data of the user's; higher is better."""


@dataclass(frozen=True)
class AutoRecipe:
    """Bits for every layer, by its sensitivity and a budget; with ``max_drop`` verified, and corrected, on real data.

    Args:
        average_weight_bits, weight_bytes, bit_operations, latency_ms: the budget, alone or together
            (:class:`qfx.budget.Budget`); without any, three quarters of the weight bytes that ``base`` takes.
        weight_bits, activation_bits: the widths to choose from.
        base: what is quantized at all, and how; its rules of the user's stay as they are.
        score: ``fisher``, ``kl``, ``sqnr``, or ``loss(output, item)``; measured on ``rows`` rows of calibration data.
        pin_first_last: the bits of first and last layers, ``float``, or None: the search decides.
        allow_float: layers may stay float where the budget allows it.
        max_drop: by how much ``metric`` may fall below the float model's, in its own units. The allocation is where
            the search starts; the layers that do most damage then get more bits, or float, until the drop holds.
        metric: ``metric(model) -> number``, higher is better, on data that calibration has not seen.
        time_budget: seconds for this correction; then the best model so far is returned, with a warning.
        state: a file that keeps what was tried, so that an interrupted search goes on.
    """

    average_weight_bits: float | None = None
    weight_bytes: float | None = None
    bit_operations: float | None = None
    latency_ms: float | None = None
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (8,)
    base: Recipe = field(default_factory=Recipe.int8)
    score: str | Loss = "fisher"
    rows: int = 128
    pin_first_last: Pin = 8
    allow_float: bool = False
    max_drop: float | None = None
    metric: Metric | None = None
    time_budget: float | None = None
    state: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _ = self.budget, self.measurement  # both refuse what they cannot do
        if self.pin_first_last not in (None, "float") and self.pin_first_last not in range(2, 9):
            raise ConfigError(
                f"pin_first_last is {self.pin_first_last!r}", hint="give a number of bits from 2 to 8, 'float' or None"
            )
        if (self.max_drop is None) != (self.metric is None):
            missing = "metric" if self.metric is None else "max_drop"
            raise ConfigError(
                f"accuracy control needs {missing} too",
                hint="give max_drop=0.5 together with metric=f, where f(model) is a number, higher is better",
            )
        number = isinstance(self.max_drop, int | float) and 0.0 <= self.max_drop < math.inf
        if self.max_drop is not None and not number:
            raise ConfigError(f"max_drop is {self.max_drop!r}", hint="give a number from 0 on, in the metric's units")
        if self.metric is not None and not callable(self.metric):
            raise ConfigError(f"metric is a {type(self.metric).__name__}", hint="give a function of a model")
        if self.time_budget is not None and not self.time_budget > 0.0:
            raise ConfigError(f"time_budget is {self.time_budget!r}", hint="give seconds, or None for no limit")
        if self.metric is None and (self.time_budget is not None or self.state is not None):
            raise ConfigError(
                "time_budget and state are for accuracy control", hint="give max_drop and metric, or leave them out"
            )

    @property
    def budget(self) -> Budget:
        return Budget(self.average_weight_bits, self.weight_bytes, self.bit_operations, self.latency_ms)

    @property
    def measurement(self) -> Measurement:
        return Measurement(self.weight_bits, self.activation_bits, self.score, rows=self.rows)

    def without_control(self) -> AutoRecipe:
        """The same search, with nothing verified behind it."""
        return replace(self, max_drop=None, metric=None, time_budget=None, state=None)

    def __str__(self) -> str:
        bounds = ", ".join(f"{name} <= {bound:g}" for name, bound in self.budget.given.items())
        drop = f"a drop of at most {self.max_drop:g}" if self.max_drop is not None else ""
        asked = ", ".join(filter(None, (bounds, drop)))
        return f"auto over {self.base.name}: {asked or 'three quarters of its bytes'}"


def as_recipe(recipe: str | Recipe | AutoRecipe) -> Recipe | AutoRecipe:
    """The recipe itself, that of a name, or for ``auto`` a search with its defaults.

    Raises:
        ConfigError: there is none of that name, or it is no recipe.
    """
    if isinstance(recipe, Recipe | AutoRecipe):
        return recipe
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe is a {type(recipe).__name__}", hint="give a preset's name or a qfx.Recipe")
    return AutoRecipe() if recipe == "auto" else Recipe.preset(recipe)
