"""What a sensitivity scan found, as a value: which layers suffer at which widths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from qfx.choices import Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.widths import PARTS, Trial


@dataclass(frozen=True)
class Agreement:
    """How well a cheap score orders the trials: Spearman's rank correlation with the exact one over ``trials``."""

    exact: str
    correlation: float
    trials: int

    def __str__(self) -> str:
        return f"rank correlation with {self.exact}: {self.correlation:.2f} over {self.trials} trials"


@dataclass(frozen=True)
class Sensitivity:
    """Scores of every layer's weight and data at every width that was asked for.

    ``scores`` in ``unit``; ``damages`` are the same as numbers >= 0 that add up over layers. ``recipe`` is what the
    model was prepared with; ``mode``: ``only`` the trial's tensor was rounded, or ``all_but`` that one. ``rows``: how
    many rows of data it was measured on. ``groups``: positions of layers that must choose alike.
    """

    model: str
    recipe: Recipe
    target: str
    score: str
    unit: str
    mode: str
    rows: int
    layers: tuple[LayerFacts, ...]
    groups: tuple[tuple[int, ...], ...]
    scores: Mapping[Trial, float] = field(repr=False)
    damages: Mapping[Trial, float] = field(repr=False)
    agreement: Agreement | None = None
    seconds: float = 0.0

    @property
    def widths(self) -> tuple[tuple[str, int], ...]:
        """``(part, bits)`` of all trials, weights first."""
        found = {(trial.part, trial.bits) for trial in self.scores}
        return tuple(sorted(found, key=lambda pair: (PARTS.index(pair[0]), pair[1])))

    @property
    def how(self) -> str:
        """What was rounded in a trial, in words."""
        return {"only": "each tensor rounded alone", "all_but": "all rounded but this one"}[self.mode]

    def damage(self, layer: LayerFacts, choice: Choice) -> float:
        """What the choice does to the outputs, in units that add up; what was not measured is taken to do nothing."""
        asked = (("weight", choice.weight), ("activation", choice.activation))
        trials = (Trial(layer.key, part, bits) for part, bits in asked if bits is not None)
        return math.fsum(self.damages.get(trial, 0.0) for trial in trials)

    def worst(self, bits: int, part: str = "weight") -> tuple[tuple[str, float], ...]:
        """``(layer, score)`` at one width, the layer that suffers most first.

        Raises:
            ConfigError: nothing was measured at that width.
        """
        found = {t: score for t, score in self.scores.items() if t.part == part and t.bits == bits}
        if not found:
            known = ", ".join(f"{p} {b}" for p, b in self.widths)
            raise ConfigError(f"no {part} was measured at {bits} bits", hint=f"measured are: {known}")
        return tuple((t.key, found[t]) for t in sorted(found, key=lambda t: -self.damages[t]))

    def correlation(self, other: Sensitivity) -> float:
        """Spearman's rank correlation of the damages, over the trials that both have, in [-1, 1].

        Raises:
            ConfigError: they have fewer than two in common.
        """
        common = [trial for trial in self.damages if trial in other.damages]
        return rank_correlation([self.damages[t] for t in common], [other.damages[t] for t in common])

    def table(self) -> str:
        """A row a layer, a column a width."""
        header = ["layer", "operator", "weights", "MMAC", *(f"{part[0]}{bits}" for part, bits in self.widths)]
        rows = [
            [
                layer.path,
                layer.op,
                layer.numel,
                f"{layer.macs / 1e6:.1f}",
                *(shown(self.scores.get(Trial(layer.key, part, bits))) for part, bits in self.widths),
            ]
            for layer in self.layers
        ]
        return str(tabulate(rows, header, tablefmt="simple", disable_numparse=True))

    def summary(self) -> str:
        lines = [
            f"{self.score} in {self.unit}, {self.how}, {self.rows} rows of data, {self.seconds:.1f} s; "
            "w4: weight in 4 bits, a4: data in 4 bits"
        ]
        lines += [str(self.agreement)] if self.agreement else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "score": self.score,
            "unit": self.unit,
            "mode": self.mode,
            "rows": self.rows,
            "layers": [
                {
                    "layer": layer.path,
                    "operator": layer.op,
                    "weights": layer.numel,
                    "macs": layer.macs,
                    **{part: self._of(layer.key, part) for part in PARTS},
                }
                for layer in self.layers
            ],
            "agreement": None if self.agreement is None else vars(self.agreement),
        }

    def _of(self, key: str, part: str) -> dict[int, float]:
        return {trial.bits: score for trial, score in self.scores.items() if (trial.key, trial.part) == (key, part)}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a bar for every layer and width into a file (``.png``, ``.svg``, ``.pdf``); needs matplotlib.

        Raises:
            ConfigError: the file is of no such kind, or matplotlib is not installed.
        """
        from qfx.sensitivity_plot import plot

        plot(self, path)

    def html(self) -> str:
        """One self-contained page: the table with coloured cells, and the bars where matplotlib is installed."""
        from qfx.sensitivity_page import page

        return page(self)

    def with_times(self, times: Mapping[str, tuple[tuple[Choice, float], ...]]) -> Sensitivity:
        """The same with the milliseconds of every layer's choices, by the layer's key."""
        return replace(self, layers=tuple(replace(layer, times=times.get(layer.key, ())) for layer in self.layers))


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's rank correlation of two lists of one length; 1 where all of one are equal, and so are the other's.

    Raises:
        ConfigError: they hold fewer than two values.
    """
    if len(x) < 2:
        raise ConfigError(f"a rank correlation needs two trials, not {len(x)}")
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 1.0 if len(set(x)) == len(set(y)) else 0.0
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: list[float]) -> NDArray[np.float64]:
    """Ranks from 1 on, ties their mean. scipy.stats has them too, but takes longer to import than a small scan."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (count.cumsum() - (count - 1) / 2)[place]
    return ranks


def shown(score: float | None) -> str:
    """The score in a table's cell."""
    return "" if score is None else "exact" if score == math.inf else f"{score:.3g}"
