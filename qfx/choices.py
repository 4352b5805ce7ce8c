"""What a layer may be given, and what each choice costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qfx.spec import QConfig

FLOAT_BITS = 32
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Choice:
    """Bits of a layer's weight and of the data it reads; None: float."""

    weight: int | None
    activation: int | None

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.activation is None

    def __str__(self) -> str:
        return "float" if self.is_float else f"W{self.weight or 'F'}A{self.activation or 'F'}"


FLOAT = Choice(None, None)


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer without its graph.

    ``key`` names it in tables and files. ``weight_shape`` is ``()`` for a product of two activations; ``scales``: how
    many scales its weight has in integers. ``macs`` at the example's sizes. ``end``: a first or a last layer.
    ``qconfig``: the specs that it was prepared with, ``given`` their bits; ``fixed``: a rule of the user's says so.
    ``choices``: what the target can lower, float always. ``times``: milliseconds of each on this machine, where they
    were measured.
    """

    key: str
    path: str
    op: str
    weight_shape: tuple[int, ...]
    scales: int
    macs: int
    end: bool
    qconfig: QConfig
    given: Choice
    fixed: bool
    choices: tuple[Choice, ...]
    times: tuple[tuple[Choice, float], ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    def costs(self, choice: Choice) -> Mapping[str, float]:
        """What the choice costs, by resource.

        ``weight_bits``: bits of the weight's elements, as asked for. ``weight_bytes``: the bytes they are stored in,
        packed where they are narrow, with their scales. ``bit_operations``: multiply-accumulates times the bits of both
        factors. ``latency_ms``, where it was measured.
        """
        weight, activation = choice.weight or FLOAT_BITS, choice.activation or FLOAT_BITS
        found: dict[str, float] = {
            "weight_bits": self.numel * weight,
            "weight_bytes": self._bytes(choice.weight),
            "bit_operations": float(self.macs) * weight * activation,
        }
        times = dict(self.times)
        return found | ({"latency_ms": times[choice]} if choice in times else {})

    def _bytes(self, bits: int | None) -> int:
        if bits is None:
            return self.numel * FLOAT_BITS // 8
        rows = self.weight_shape[0] if self.weight_shape else 0
        columns = self.numel // rows if rows else 0
        return rows * -(-columns * bits // 8) + self.scales * _SCALE_BYTES
