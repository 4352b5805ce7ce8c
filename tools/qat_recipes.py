"""Bit widths of the command line, and the recipes that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

from qfx.observers import Histogram, MinMax, Mse, Observer
from qfx.recipe import Recipe
from qfx.spec import QConfig, QuantSpec


@dataclass(frozen=True, order=True)
class Bits:
    """Bits of weights and activations; ``activation`` None leaves activations in float."""

    weight: int
    activation: int | None

    @classmethod
    def parse(cls, text: str) -> Bits:
        """``"4"`` is W4A4, ``"4/8"`` W4A8, ``"4/16"`` weights only."""
        first, slash, second = text.strip().partition("/")
        try:
            weight, activation = int(first), int(second if slash else first)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no bit width such as 4 or 4/8") from None
        if not (2 <= weight <= 8 and (2 <= activation <= 8 or activation == 16)):
            raise argparse.ArgumentTypeError(f"{text!r}: a bit width lies between 2 and 8, or is 16 for activations")
        return cls(weight, None if activation == 16 else activation)

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation or 16}"


def parse_bits(text: str) -> tuple[Bits, ...]:
    """A list such as ``8,4/8,2``."""
    return tuple(Bits.parse(part) for part in text.split(","))


def static_recipe(bits: Bits) -> Recipe:
    """Both in integers: ``int8`` at 8 bits, else learned step sizes with the first and the last layer at 8 bits."""
    assert bits.activation is not None
    return Recipe.int8() if bits == Bits(8, 8) else Recipe.lsq(bits.weight, bits.activation)


# Observers whose ranges PTQ is tried with. The best of them is what QAT has to beat.
ObserverFactory = Callable[[QuantSpec], Observer]
OBSERVERS: dict[str, tuple[ObserverFactory, ObserverFactory]] = {  # for weights, for activations
    "MinMax": (MinMax, MinMax),
    "Histogram": (MinMax, Histogram),
    "Mse": (Mse, Mse),
}


def observing(recipe: Recipe, weight: ObserverFactory, activation: ObserverFactory) -> Recipe:
    """The recipe with these observers in all its specs."""

    def spec(of: QuantSpec | None, observer: ObserverFactory) -> QuantSpec | None:
        return None if of is None else replace(of, observer=observer)

    def qconfig(of: QConfig) -> QConfig:
        return replace(of, weight=spec(of.weight, weight), activation=spec(of.activation, activation))

    return replace(
        recipe,
        default=qconfig(recipe.default),
        rules=tuple(r if r.qconfig is None else replace(r, qconfig=qconfig(r.qconfig)) for r in recipe.rules),
        ends=None if recipe.ends is None else qconfig(recipe.ends),
    )
