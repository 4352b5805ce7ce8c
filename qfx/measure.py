"""Sensitivity of one calibrated graph: its layers, their trials, their scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import fx

from qfx import affine
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.divergence import SCORES, Kl, Loss, Score, Task
from qfx.errors import ConfigError, UnsupportedError
from qfx.layers import Layer, coupled, layers_of, weight_of
from qfx.operators import lookup, name_of
from qfx.origin import module_classes
from qfx.recipe import Recipe, Subject
from qfx.samples import Sample, labels, rows_of, tensors
from qfx.scan import Mode, scan, scan_fisher
from qfx.score_cache import cache_for, content_of
from qfx.sensitivity_table import Agreement, Sensitivity, rank_correlation
from qfx.spec import MAX_BITS, MIN_BITS
from qfx.targets import Target
from qfx.widths import Rounders, Trial, at_choice

_CHECKED = 2  # parts of the data on which fisher is held against the exact score


@dataclass(frozen=True)
class Measurement:
    """What to measure: the widths of weights and of data, the score, and on how many rows of data.

    ``score``: ``sqnr``, ``kl``, ``fisher``, or a loss of the user's. ``check``: how many trials of ``fisher`` are
    scored by ``kl`` as well, for the rank correlation of the two; 0: none.
    """

    weight_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    activation_bits: tuple[int, ...] = (8,)
    score: str | Loss = "fisher"
    mode: Mode = "only"
    rows: int = 32
    check: int = 16

    def __post_init__(self) -> None:
        for name, widths in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if not isinstance(widths, tuple):
                raise ConfigError(f"{name} is a {type(widths).__name__}", hint="give a tuple of widths, such as (4, 8)")
            if bad := [b for b in widths if not isinstance(b, int) or not MIN_BITS <= b <= MAX_BITS]:
                raise ConfigError(
                    f"{name} holds {bad[0]!r}", hint=f"widths are whole numbers from {MIN_BITS} to {MAX_BITS}"
                )
        known = (*SCORES, "fisher")
        if not callable(self.score) and self.score not in known:
            raise ConfigError(
                f"there is no score {self.score!r}",
                hint="choose one of " + ", ".join(known) + ", or give a function loss(output, item)",
            )
        if self.mode not in ("only", "all_but"):
            raise ConfigError(f"there is no mode {self.mode!r}", hint="choose 'only' or 'all_but'")
        if self.mode == "all_but" and self.score == "fisher":
            raise ConfigError("fisher scores one rounded tensor alone", hint="choose score='kl' for mode='all_but'")
        if self.rows < 1:
            raise ConfigError(f"sensitivity is measured on {self.rows} rows of data", hint="give 1 or more")

    @property
    def judge(self) -> Score:
        """The exact score: of ``fisher`` what it estimates."""
        if isinstance(self.score, str):
            return SCORES.get(self.score, Kl())
        return Task(self.score)

    @property
    def name(self) -> str:
        return self.score if isinstance(self.score, str) else self.judge.name

    @property
    def splits(self) -> bool:
        """Whether a data item may be taken apart: a loss of the user's needs it whole."""
        return isinstance(self.score, str)


def measure_sensitivity(
    gm: fx.GraphModule, samples: Sequence[Sample], wanted: Measurement, *, recipe: Recipe, target: Target, model: str
) -> Sensitivity:
    """Score every layer of a CALIBRATED graph; ``recipe`` is what it was annotated with.

    Raises:
        UnsupportedError: the graph has no layer that is quantized.
        ConfigError: the user's loss fails or is not finite, or the graph returns nothing to score. What was computed
            until then is kept: the same call again goes on from there.
    """
    start = time.monotonic()
    layers = layers_of(gm)
    if not layers:
        raise UnsupportedError("this model has no layer that is quantized", hint="see the reasons in qfx.report(...)")
    facts = tuple(facts_of(gm, layer, wanted, recipe, target) for layer in layers)
    trials = tuple(_trials(layers, wanted))
    if not trials:
        raise ConfigError("there is nothing to measure", hint="give weight_bits or activation_bits")
    rounders = Rounders(gm)
    content = content_of(gm, tensors(samples), words=[repr(layer.qconfig) for layer in layers])
    judge = wanted.judge
    if isinstance(wanted.score, str):
        exact = cache_for(content, judge, on_disk=True)
    else:  # a loss of the user's sees the data items whole
        exact = cache_for(content + labels(samples), judge, on_disk=False)
    agreement = None
    if wanted.score == "fisher":
        cache = cache_for(content, "fisher", on_disk=True)
        scores = scan_fisher(gm, layers, trials, samples, cache=cache, rounders=rounders)
        some = _spread(trials, scores, wanted.check)
        if len(some) > 1:
            few = samples[:_CHECKED]
            cheap = scan_fisher(gm, layers, some, few, cache=cache, rounders=rounders)
            checked = scan(gm, layers, some, few, judge, cache=exact, rounders=rounders)
            found = rank_correlation([cheap[t] for t in some], [checked[t] for t in some])
            agreement = Agreement(judge.name, found, len(some))
    else:
        scores = scan(gm, layers, trials, samples, judge, mode=wanted.mode, cache=exact, rounders=rounders)
    return Sensitivity(
        model=model,
        recipe=recipe,
        target=target.name,
        score=wanted.name,
        unit=judge.unit,
        mode=wanted.mode,
        rows=rows_of(gm, samples),
        layers=facts,
        groups=coupled(gm, layers),
        scores=scores,
        damages={trial: judge.damage(score) for trial, score in scores.items()},
        agreement=agreement,
        seconds=time.monotonic() - start,
    )


def _trials(layers: Sequence[Layer], wanted: Measurement) -> list[Trial]:
    found = []
    for layer in layers:
        if layer.qconfig.weight is not None:
            found += [Trial(layer.key, "weight", bits) for bits in wanted.weight_bits]
        if layer.observed:
            found += [Trial(layer.key, "activation", bits) for bits in wanted.activation_bits]
    return found


def _spread(trials: Sequence[Trial], scores: dict[Trial, float], count: int) -> list[Trial]:
    """``count`` trials, evenly from the best score to the worst."""
    ordered = sorted(trials, key=lambda t: scores[t])
    if count >= len(ordered):
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)] if count > 1 else []


def facts_of(gm: fx.GraphModule, layer: Layer, wanted: Measurement, recipe: Recipe, target: Target) -> LayerFacts:
    """What allocation needs to know of the layer."""
    subject = Subject(name_of(layer.calls[0]), layer.path, module_classes(layer.calls[0]))
    rule = next((rule for rule in recipe.rules if rule.matches(subject)), None)
    weight, activation = layer.qconfig.weight, layer.qconfig.activation if layer.observed else None
    given = Choice(weight.bits if weight else None, activation.bits if activation else None)
    widths = {given.weight, *(wanted.weight_bits if weight else ())}
    data_widths = {given.activation, *(wanted.activation_bits if activation else ())}
    possible = (Choice(w, a) for w, a in product(sorted(widths, key=_order), sorted(data_widths, key=_order)))
    return LayerFacts(
        key=layer.key,
        path=layer.path,
        op=layer.op,
        weight_shape=layer.shape,
        scales=_scales(gm, layer),
        macs=layer.macs,
        end=layer.end,
        qconfig=layer.qconfig,
        given=given,
        fixed=rule is not None and not rule.own,
        choices=(*(c for c in possible if _fits(layer, c, target)), FLOAT),
    )


def _order(bits: int | None) -> int:
    return bits or 0


def _scales(gm: fx.GraphModule, layer: Layer) -> int:
    """How many scales the weight has."""
    if layer.qconfig.weight is None:
        return 0
    return math.prod(affine.scale_shape(weight_of(gm, layer), *layer.qconfig.weight.granularity.layout()))


def _fits(layer: Layer, choice: Choice, target: Target) -> bool:
    """Whether the target can run the layer so."""
    row, qconfig = lookup(layer.calls[0]), at_choice(layer.qconfig, choice)
    assert row is not None and qconfig is not None
    return all(target.refuses(call, row, qconfig) is None for call in layer.calls)
