"""What a network may cost, as a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from qfx.choices import LayerFacts
from qfx.errors import ConfigError

DEFAULT_SHARE = 0.75
"""Without any budget: this share of the bytes that the layers' weights take in the recipe they were measured with."""


@dataclass(frozen=True)
class Budget:
    """Upper bounds over all layers, None for none; together they all hold.

    ``average_weight_bits``: bits of a weight element, the mean over all elements. ``weight_bytes``: stored weights with
    their scales, biases and whatever else is not quantized left out. ``bit_operations``: multiply-accumulates of one
    call of the example, times the bits of both factors. ``latency_ms``: the sum of the layers' own times.
    """

    average_weight_bits: float | None = None
    weight_bytes: float | None = None
    bit_operations: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, bound in self.given.items():
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0.0 < bound < math.inf:
                raise ConfigError(f"{name} is {bound!r}", hint="a budget is a positive number")

    @property
    def given(self) -> dict[str, float]:
        """The bounds that there are."""
        return {f.name: bound for f in fields(self) if (bound := getattr(self, f.name)) is not None}

    def bounds(self, layers: Sequence[LayerFacts]) -> Mapping[str, float]:
        """The bounds by the names of :meth:`qfx.choices.LayerFacts.costs`."""
        if not self.given:
            return {"weight_bytes": DEFAULT_SHARE * sum(x.costs(x.given)["weight_bytes"] for x in layers)}
        bounds = dict(self.given)
        if self.average_weight_bits is not None:
            del bounds["average_weight_bits"]
            total = self.average_weight_bits * sum(layer.numel for layer in layers)
            # Bits are whole: an average that was printed of a sum must not come out a rounding error below it.
            bounds["weight_bits"] = round(total) if math.isclose(total, round(total), rel_tol=1e-12) else total
        return bounds
