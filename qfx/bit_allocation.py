"""From sensitivity and a budget to every layer's bits: the choices of least damage that the budget allows.

A multiple-choice knapsack: each group of coupled layers takes one of its choices, the damages add up. That is exact
where errors of layers are independent and small, as in Dong et al., 2020 (HAWQ-V2, arXiv:1911.03852), and Yao et al.,
2021 (HAWQ-V3, arXiv:2011.10680), who solve the same integer programme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qfx.allocation import InfeasibleBudget, Option, pareto, solve
from qfx.budget import Budget
from qfx.choices import FLOAT, FLOAT_BITS, Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import QuantRule, Recipe
from qfx.sensitivity_table import Sensitivity
from qfx.widths import Trial, at_choice

Pin = int | Literal["float"] | None
"""What first and last layers get: a number of bits for their weights, float, or what the search finds (None)."""


@dataclass(frozen=True)
class Allocation:
    """One choice for every layer of ``sensitivity``, in its order; ``pin`` as it was asked for."""

    sensitivity: Sensitivity
    choices: tuple[Choice, ...]
    pin: Pin

    @property
    def damage(self) -> float:
        """The sum of what the choices do, by the score's damage."""
        pairs = zip(self.sensitivity.layers, self.choices, strict=True)
        return math.fsum(self.sensitivity.damage(layer, choice) for layer, choice in pairs)

    @property
    def costs(self) -> Mapping[str, float]:
        """The total of every resource (:class:`qfx.budget.Budget`); latency where every layer's was measured."""
        every = [layer.costs(choice) for layer, choice in zip(self.sensitivity.layers, self.choices, strict=True)]
        known = set.intersection(*(set(costs) for costs in every))
        totals = {name: math.fsum(costs[name] for costs in every) for name in sorted(known)}
        elements = sum(layer.numel for layer in self.sensitivity.layers)
        return {"average_weight_bits": totals.pop("weight_bits") / max(elements, 1), **totals}

    def score(self, layer: LayerFacts, choice: Choice) -> float | None:
        """The score of the layer's choice: of its weight, or else of its data; None where neither was measured."""
        asked = (Trial(layer.key, "weight", choice.weight or 0), Trial(layer.key, "activation", choice.activation or 0))
        return next((self.sensitivity.scores[trial] for trial in asked if trial in self.sensitivity.scores), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "choices": {
                layer.key: {"weight": choice.weight, "activation": choice.activation}
                for layer, choice in zip(self.sensitivity.layers, self.choices, strict=True)
            },
            "damage": self.damage,
            "costs": dict(self.costs),
            "pin_first_last": self.pin,
            "sensitivity": self.sensitivity.to_dict(),
        }

    def recipe(self) -> Recipe:
        """The recipe that was measured, with a rule for every layer in front that says why it got its bits."""
        base = self.sensitivity.recipe
        pairs = zip(self.sensitivity.layers, self.choices, strict=True)
        rules = [
            QuantRule(at_choice(layer.qconfig, choice), layer.op, layer.path, why=self.why(layer, choice), exact=True)
            for layer, choice in pairs
            if not layer.fixed
        ]
        rules = list({(rule.op, rule.layer): rule for rule in reversed(rules)}.values())[::-1]  # one for each place
        return replace(base, name=f"{base.name}_auto", rules=(*rules, *base.rules))

    def why(self, layer: LayerFacts, choice: Choice) -> str:
        """The reason in words: the scores of what was chosen."""
        scores = self.sensitivity.scores
        parts = (("weight", choice.weight), ("activation", choice.activation))
        found = [(f"{part[0].upper()}{bits}", scores.get(Trial(layer.key, part, bits or 0))) for part, bits in parts]
        measured = [f"{score:.2g} at {name}" for name, score in found if score is not None]
        words = ["a first or last layer"] if layer.end and self.pin is not None else []
        if measured:
            words.append(f"{self.sensitivity.score} {', '.join(measured)} ({self.sensitivity.unit})")
        return "; ".join(words) or f"the search chose {choice}"


def allocate_bits(
    sensitivity: Sensitivity, budget: Budget, *, pin: Pin = 8, allow_float: bool = False
) -> Allocation:
    """The choices of least damage within ``budget``.

    Args:
        pin: see :data:`Pin`; layers coupled with a first or last layer are pinned with it.
        allow_float: layers may stay float where the budget allows it.

    Raises:
        InfeasibleBudget: no choices meet it; the text says which would.
        ConfigError: the scores are those of all layers but one, or latency was not measured.
    """
    problem = _Problem(sensitivity, pin, allow_float)
    bounds = budget.bounds(sensitivity.layers)
    problem.require(bounds)
    try:
        return problem.allocation(solve(problem.options, bounds))
    except InfeasibleBudget as error:
        if not budget.given:  # nobody asked for that bound: where pinned layers take more, the least is as good
            return problem.allocation(solve(problem.options, error.least))
        raise _in_users_terms(error, sensitivity) from error


def pareto_front(
    sensitivity: Sensitivity,
    resource: str = "weight_bytes",
    *,
    points: int = 20,
    pin: Pin = 8,
    allow_float: bool = False,
) -> tuple[Allocation, ...]:
    """Allocations that are better in damage or in ``resource`` than any other, from the cheapest to the best.

    Args:
        resource: ``average_weight_bits``, ``weight_bytes``, ``bit_operations`` or ``latency_ms``.
        points: how many at most.

    Raises:
        ConfigError: as for :func:`allocate_bits`.
    """
    problem = _Problem(sensitivity, pin, allow_float)
    name = {"average_weight_bits": "weight_bits"}.get(resource, resource)
    problem.require({name: 0.0})
    return tuple(problem.allocation(chosen) for chosen in pareto(problem.options, name, points=points))


def ladder(start: Allocation) -> tuple[Allocation, ...]:
    """Allocations of ever more bits, from ``start`` to all layers in float.

    From each to the next, the group of layers that does most damage gets its next wider choice.
    """
    problem = _Problem(start.sensitivity, None, True)
    layers = start.sensitivity.layers
    current = list(start.choices)
    rungs = [start]
    while True:
        wider = [
            (math.fsum(start.sensitivity.damage(layers[i], current[i]) for i in members), -k, found)
            for k, members in enumerate(start.sensitivity.groups)
            if (found := _wider(problem.meanings[k], current)) is not None
        ]
        if not wider:
            return tuple(rungs)
        for i, choice in max(wider, key=lambda entry: entry[:2])[2].items():
            current[i] = choice
        rungs.append(Allocation(start.sensitivity, tuple(current), start.pin))


def _wider(meanings: Sequence[Mapping[int, Choice]], current: Sequence[Choice]) -> Mapping[int, Choice] | None:
    """The narrowest choice of a group in which every member has at least the bits it has, and some have more."""

    def bits(choice: Choice) -> tuple[int, int]:
        return choice.weight or FLOAT_BITS, choice.activation or FLOAT_BITS

    def widens(meaning: Mapping[int, Choice]) -> bool:
        pairs = [(bits(current[i]), bits(choice)) for i, choice in meaning.items()]
        return any(a != b for a, b in pairs) and all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairs)

    return min((m for m in meanings if widens(m)), key=lambda m: sum(sum(bits(c)) for c in m.values()), default=None)


class _Problem:
    """The knapsack's groups: layers that choose alike, with what each choice means for every one of them."""

    def __init__(self, sensitivity: Sensitivity, pin: Pin, allow_float: bool) -> None:
        if sensitivity.mode != "only":
            raise ConfigError(
                "scores of all layers but one do not add up", hint="measure sensitivity with mode='only'"
            )
        self.sensitivity, self.pin = sensitivity, pin
        self.meanings = [self._meanings(members, allow_float) for members in sensitivity.groups]
        self.options = [[self._option(meaning) for meaning in meanings] for meanings in self.meanings]

    def _meanings(self, members: tuple[int, ...], allow_float: bool) -> list[dict[int, Choice]]:
        """The choices of a group: for each, what every member gets."""
        layers = [self.sensitivity.layers[i] for i in members]
        asked = dict.fromkeys(choice for layer in layers for choice in self._offered(layer, allow_float))
        if self.pin is not None and any(layer.end for layer in layers):
            asked = dict.fromkeys([FLOAT] if self.pin == "float" else [Choice(self.pin, c.activation) for c in asked])
            asked = dict.fromkeys(sorted(asked, key=lambda c: -(c.activation or 0))[:1])
        found: list[dict[int, Choice]] = []
        for choice in asked:
            meaning = {i: _meant(layer, choice) for i, layer in zip(members, layers, strict=True)}
            if meaning not in found and all(c in self.sensitivity.layers[i].choices for i, c in meaning.items()):
                found.append(meaning)
        if not found:
            names = ", ".join(layer.path for layer in layers)
            raise ConfigError(
                f"there is no choice of bits that {names} can all have on target {self.sensitivity.target}",
                hint="measure more widths, choose pin_first_last=None, or give these layers a rule of their own",
            )
        return found

    @staticmethod
    def _offered(layer: LayerFacts, allow_float: bool) -> list[Choice]:
        if layer.fixed:
            return [layer.given]
        return [choice for choice in layer.choices if allow_float or not choice.is_float]

    def _option(self, meaning: Mapping[int, Choice]) -> Option:
        layers = self.sensitivity.layers
        costs = [layers[i].costs(choice) for i, choice in meaning.items()]
        names = set.intersection(*(set(c) for c in costs))
        return Option(
            math.fsum(self.sensitivity.damage(layers[i], choice) for i, choice in meaning.items()),
            {name: math.fsum(c[name] for c in costs) for name in sorted(names)},
        )

    def require(self, bounds: Mapping[str, float]) -> None:
        if "latency_ms" in bounds and any(not layer.times for layer in self.sensitivity.layers):
            raise ConfigError(
                "no layer's time was measured", hint="measure sensitivity with latency=True for a budget of latency"
            )

    def allocation(self, chosen: tuple[int, ...]) -> Allocation:
        by_layer = {i: c for k, meanings in zip(chosen, self.meanings, strict=True) for i, c in meanings[k].items()}
        return Allocation(self.sensitivity, tuple(by_layer[i] for i in range(len(by_layer))), self.pin)


def _meant(layer: LayerFacts, choice: Choice) -> Choice:
    """What the group's choice is for the layer: a product has no weight, data that stay float have no bits."""
    if layer.fixed:
        return layer.given
    if choice.is_float:
        return FLOAT
    weight = None if layer.given.weight is None else choice.weight or layer.given.weight
    return Choice(weight, None if layer.given.activation is None else choice.activation or layer.given.activation)


def _in_users_terms(error: InfeasibleBudget, sensitivity: Sensitivity) -> InfeasibleBudget:
    """The error with average bits in place of their sum."""
    elements = sum(layer.numel for layer in sensitivity.layers)

    def averaged(numbers: Mapping[str, float]) -> dict[str, float]:
        return dict(
            ("average_weight_bits", number / elements) if name == "weight_bits" else (name, number)
            for name, number in numbers.items()
        )

    return InfeasibleBudget(averaged(error.budgets), averaged(error.least), averaged(error.alone))
