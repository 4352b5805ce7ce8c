"""A search for bit widths as one HTML page that needs nothing else: scores as coloured cells, bits, the drawing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qfx.bit_allocation import Allocation
from qfx.choices import Choice, LayerFacts
from qfx.html_page import render
from qfx.sensitivity_plot import COSTS, DAMAGES, NoMatplotlib, names_of, printable, svg
from qfx.sensitivity_table import Sensitivity, shown
from qfx.widths import Trial


@dataclass(frozen=True)
class Cell:
    """One score. ``level`` is where its damage stands between the least and the greatest, in [0, 1]."""

    text: str
    damage: float
    level: float
    chosen: bool

    @property
    def key(self) -> str:
        """What the page sorts by: the damage as a number of JavaScript."""
        return "Infinity" if self.damage == math.inf else str(self.damage)


@dataclass(frozen=True)
class Row:
    """One layer; ``cells`` in the order of the sensitivity's widths, None where nothing was measured."""

    name: str
    facts: LayerFacts
    choice: Choice | None
    cells: tuple[Cell | None, ...]


def page(what: Sensitivity | Allocation) -> str:
    """The page: what was measured and how, a row for each layer, and the drawing where matplotlib is installed.

    Of an Allocation also its bits and costs; the scores of the chosen widths are outlined. Names are escaped.
    """
    sensitivity, allocation = (what, None) if isinstance(what, Sensitivity) else (what.sensitivity, what)
    drawing, missing = "", ""
    try:
        drawing = svg(what)
    except NoMatplotlib as error:
        missing = f"{error.what}: {error.hint}"
    return render(
        "sensitivity_page.html",
        title=printable(sensitivity.model),
        facts=_facts(sensitivity),
        bits=_bits(allocation) if allocation else {},
        widths=[f"{part[0]}{bits}" for part, bits in sensitivity.widths],
        rows=_rows(sensitivity, allocation),
        drawing=drawing,
        missing=missing,
    )


def _facts(sensitivity: Sensitivity) -> dict[str, str]:
    """What was measured, and how."""
    damage, unit = DAMAGES.get(sensitivity.score, (sensitivity.score, ""))
    return {
        "score": f"{sensitivity.score} in {sensitivity.unit}",
        "damage": f"{damage}, {unit}" if unit else damage,
        "measured": f"{sensitivity.how}, on {sensitivity.rows} rows of data, in {sensitivity.seconds:.1f} s",
        "agreement": str(sensitivity.agreement or "not checked"),
        "recipe, target": f"{sensitivity.recipe.name}, {sensitivity.target}",
    }


def _bits(allocation: Allocation) -> dict[str, str]:
    """The allocation in figures."""
    count = Counter(map(str, allocation.choices))
    costs = {name: (COSTS[name], cost) for name, cost in allocation.costs.items()}
    pin = "as the search found" if allocation.pin is None else str(allocation.pin)
    return {
        "layers": ", ".join(f"{choice}: {number}" for choice, number in count.most_common()),
        "bits of first and last layers": pin,
        "damage of all layers": f"{allocation.damage:.3g}",
        **{words: f"{cost / size:,.2f} {unit}".rstrip() for (words, unit, size), cost in costs.values()},
    }


def _rows(sensitivity: Sensitivity, allocation: Allocation | None) -> list[Row]:
    levels = _levels(sensitivity.damages)
    choices: Iterable[Choice | None] = allocation.choices if allocation else [None] * len(sensitivity.layers)
    rows = []
    for name, layer, choice in zip(names_of(sensitivity), sensitivity.layers, choices, strict=True):
        trials = [Trial(layer.key, part, bits) for part, bits in sensitivity.widths]
        cells = (
            Cell(shown(sensitivity.scores[t]), sensitivity.damages[t], levels[t], _is_chosen(t, choice))
            if t in sensitivity.scores
            else None
            for t in trials
        )
        rows.append(Row(name, layer, choice, tuple(cells)))
    return rows


def _is_chosen(trial: Trial, choice: Choice | None) -> bool:
    return choice is not None and getattr(choice, trial.part) == trial.bits


def _levels(damages: Mapping[Trial, float]) -> dict[Trial, float]:
    """Where each damage stands between the least and the greatest on a logarithmic scale; 0 for none at all."""
    finite = [math.log(damage) for damage in damages.values() if 0.0 < damage < math.inf]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def level(damage: float) -> float:
        if not 0.0 < damage < math.inf:
            return 0.0 if damage == 0.0 else 1.0
        return (math.log(damage) - low) / (high - low) if high > low else 1.0

    return {trial: level(damage) for trial, damage in damages.items()}
