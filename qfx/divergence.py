"""How far a quantized model's outputs are from the float model's: the scores of a sensitivity scan, as values.

Each score adds up over the samples in a few floats, so that a scan can be interrupted between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qfx.errors import ConfigError

Sums = tuple[float, ...]
Loss = Callable[[Any, Any], Any]
"""``loss(output, item) -> number`` for what the model returns and the data item it comes from; lower is better."""


class Score(Protocol):
    """What a trial is judged by.

    ``compare``: what one sample's flat outputs add to the trial's sums. ``value``: what the sums mean, in ``unit``.
    ``damage``: the same as a number >= 0 that may be added up over layers, 0 for no difference.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    def compare(self, wanted: tuple[Any, ...], got: tuple[Any, ...], sample: Any) -> Sums: ...
    def value(self, sums: Sums) -> float: ...
    def damage(self, value: float) -> float: ...


@dataclass(frozen=True)
class Sqnr:
    """Signal to quantization noise of the outputs in dB, of the worst floating-point one; higher is better."""

    name: ClassVar[str] = "sqnr"
    unit: ClassVar[str] = "dB"

    def compare(self, wanted: tuple[Any, ...], got: tuple[Any, ...], sample: Any) -> Sums:
        return tuple(energy for x, y in _floats(wanted, got) for energy in (_energy(x), _energy(x - y)))

    def value(self, sums: Sums) -> float:
        return min(_decibels(sums[i], sums[i + 1]) for i in range(0, len(sums), 2))

    def damage(self, value: float) -> float:
        """The noise as a share of the signal's energy: noises of independent layers add up."""
        return 0.0 if value == math.inf else float(10.0 ** (-value / 10.0))


@dataclass(frozen=True)
class Kl:
    """Kullback-Leibler divergence in nats of the classes' distribution from the float model's, the mean over all rows.

    Classes are the last axis of the output called ``logits``, or else of the first floating-point one.
    """

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"

    def compare(self, wanted: tuple[Any, ...], got: tuple[Any, ...], sample: Any) -> Sums:
        x, y = sample.scored(wanted), sample.scored(got)
        log_p, log_q = (torch.log_softmax(t.double(), -1) for t in (x, y))
        p = log_p.exp()
        divergence = torch.where(p > 0.0, p * (log_p - log_q), 0.0).sum()  # classes that are masked out count nothing
        return float(divergence), float(x.numel() // x.shape[-1])

    def value(self, sums: Sums) -> float:
        return sums[0] / sums[1] if sums[1] else 0.0

    def damage(self, value: float) -> float:
        return max(value, 0.0)


@dataclass(frozen=True)
class Task:
    """The rise of the user's loss, the mean over all data items; lower is better."""

    loss: Loss

    name: ClassVar[str] = "task"
    unit: ClassVar[str] = "of the loss"

    def __hash__(self) -> int:
        try:
            return hash(self.loss)
        except TypeError:  # an object with values of its own
            return id(self.loss)

    def compare(self, wanted: tuple[Any, ...], got: tuple[Any, ...], sample: Any) -> Sums:
        before, after = (self._of(sample.result(outputs), sample.item) for outputs in (wanted, got))
        return after - before, 1.0

    def value(self, sums: Sums) -> float:
        return sums[0] / sums[1] if sums[1] else 0.0

    def damage(self, value: float) -> float:
        """A layer that lowers the loss by chance does no harm, and earns nothing either."""
        return max(value, 0.0)

    def _of(self, output: Any, item: Any) -> float:
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        try:
            value = float(self.loss(output, item))
        except Exception as error:
            raise ConfigError(
                f"the loss {name!r} failed: {type(error).__name__}: {error}",
                hint="it is called as loss(output, item) with what the model returns and the data item itself",
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"the loss {name!r} gave {value}", hint="a score needs a finite number")
        return value


SCORES: dict[str, Score] = {score.name: score for score in (Sqnr(), Kl())}


def _floats(wanted: tuple[Any, ...], got: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """The pairs of floating-point outputs.

    Raises:
        ConfigError: the model returns none.
    """
    found = [(x, y) for x, y in zip(wanted, got, strict=True) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise ConfigError(
            "the model returns no floating-point tensor to score", hint="score a model that returns its logits"
        )
    return found


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
