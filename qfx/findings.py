"""What numbers of a layer are a finding, and what is to be done about it: thresholds and a table of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from qfx import remedies
from qfx.observers import Histogram, MinMax, MovingAverageMinMax, Mse
from qfx.remedies import Mending, Reader, Remedy
from qfx.spec import PerTensor

# --- when numbers are a finding ---------------------------------------------------------------------------------------

DRIFTED = 0.5
"""Widths beyond the range: a range half as wide again means other data; ranges from two images drift by less."""

UNUSED = 0.25
"""Of the range's width: with less, two bits or more are never used."""

OUTLYING = 16.0
"""Outliers that take so much of the range leave the bulk 4 bits fewer: of 8, the steps of int4."""

def clipped_too_much(bits: int) -> float:
    """The share of clipped values above which a range of so many bits is too narrow.

    Clipping that minimises the squared error of a normal distribution cuts 9 % of the values at 2 bits, 1.1 % at 4,
    0.1 % at 6 and 0.01 % at 8 (Banner et al., 2019, arXiv:1810.05723): a third of ``2 ** -bits`` at most. From 7 bits
    on, 1 %: fewer values change a result by less than rounding does.
    """
    return max(0.01, 2.0**-bits)


def ends_too_full(bits: int, count: int) -> float:
    """The share of ``count`` weights at the ends of their range above which it clips them.

    Twice what values have that spread evenly over it, ``2 * 2 ** -bits``, and three standard deviations of that, which
    is chance where there are few. At 2 bits that is all: there is hardly another place.
    """
    even = 2 * 2.0**-bits
    return 2 * even + 3 * math.sqrt(even / count)


# --- what is found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCheck:
    """The numbers of one value that is rounded; None where one is not defined for such a value.

    ``part``: ``activation``, ``dynamic`` (an activation whose scale is found at run time) or ``weight``. ``layer`` and
    ``operator``: what makes the value, or reads the weight. Shares lie in [0, 1].

    For activations :class:`qfx.range_use.RangeUse` says what is what: ``below`` and ``above`` (shares of clipped
    values), ``used`` (of the range), ``drift`` (in widths of the range), ``reach`` (of the range for outliers), and
    ``outliers`` (greatest magnitude over the 99.9th percentile). For weights ``zero_channels`` are those whose integers
    are all zero although their scale is not, and ``at_ends`` is the share of integers at the ends of the range.
    ``count``: how many values there were.
    """

    name: str
    part: str
    layer: str
    operator: str
    bits: int
    below: float | None = None
    above: float | None = None
    used: float | None = None
    outliers: float | None = None
    drift: float | None = None
    reach: float | None = None
    zero_channels: tuple[int, ...] = ()
    at_ends: float | None = None
    count: int = 0

    @property
    def clipped(self) -> float:
        """The share of values that are clipped at either end."""
        return (self.below or 0.0) + (self.above or 0.0)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a layer. ``remedy`` is a statement that changes ``recipe``, the model's, so that it is mended.

    It needs ``import qfx`` and ``from dataclasses import replace``; ``recipe`` is the one that the model was quantized
    by, of bits that a search found :meth:`qfx.Allocation.recipe`. ``severity``: ``error`` where the data are others
    than the ranges are made for, ``warning`` else.
    """

    rule: str
    severity: str
    layer: str
    operator: str
    text: str
    remedy: str

    def __str__(self) -> str:
        at = " ".join(word for word in (self.layer, self.operator) if word)
        return f"{self.severity}: {at}: {self.text}\n    {self.remedy}"


# --- the rules --------------------------------------------------------------------------------------------------------


_ELSE = "calibrate on data like these, or let what reads it do so in float"

Readers = Callable[[], tuple[Reader, ...]]
Holds = Callable[[LayerCheck, Readers], bool]


def _clips(row: LayerCheck, readers: Readers) -> bool:
    return row.clipped > clipped_too_much(row.bits)


def _drifts(row: LayerCheck, readers: Readers) -> bool:
    return _clips(row, readers) and (row.drift or 0.0) > DRIFTED


def _chosen(row: LayerCheck, readers: Readers) -> bool:
    """True where the observer leaves values out whatever that costs: Percentile, or one of the user's."""
    specs = [r.activation for r in readers() if r.activation is not None]
    return any(getattr(s.observer, "observer", s.observer) not in _FAITHFUL for s in specs)


_FAITHFUL = (None, MinMax, MovingAverageMinMax, Histogram, Mse)  # the extremes, or the least error, decide


def _all_of(*holds: Holds, but: Holds | None = None) -> Holds:
    return lambda row, readers: all(h(row, readers) for h in holds) and not (but is not None and but(row, readers))


def _unused(row: LayerCheck, readers: Readers) -> bool:
    return (1.0 if row.used is None else row.used) < UNUSED


def _outlying(row: LayerCheck, readers: Readers) -> bool:
    reach = row.outliers if row.part == "dynamic" else row.reach
    return (reach or 0.0) > OUTLYING


def _loses_channels(row: LayerCheck, readers: Readers) -> bool:
    return bool(row.zero_channels)


def _one_scale(row: LayerCheck, readers: Readers) -> bool:
    return any(r.weight is not None and r.weight.granularity == PerTensor() for r in readers())


def _full_ends(row: LayerCheck, readers: Readers) -> bool:
    return row.at_ends is not None and row.at_ends > ends_too_full(row.bits, row.count)


def _observed_whole(row: LayerCheck, readers: Readers) -> bool:
    """True where MinMax observes the weight: if it is clipped, its range was kept or learned in training."""
    return any(r.weight is not None and r.weight.observer in (None, MinMax) for r in readers())


@dataclass(frozen=True)
class Rule:
    """Where ``holds`` is true of a row of ``part``: ``text`` (a format over its fields) and ``remedy`` tell."""

    name: str
    severity: str
    part: str
    holds: Holds
    text: str
    remedy: Remedy


RULES = (
    Rule(
        "clipping",
        "warning",
        "activation",
        _all_of(_clips, _chosen),
        "{clipped:.1%} of the values are clipped, for its observer leaves them out: observe all",
        remedies.whole_range,
    ),
    Rule(
        "drift",
        "error",
        "activation",
        _all_of(_drifts, but=_chosen),
        f"values reach {{drift:.2g}} widths beyond the calibrated range, {{clipped:.1%}} are clipped: {_ELSE}",
        remedies.float_activations,
    ),
    Rule(
        "clipping",
        "warning",
        "activation",
        _all_of(_clips, but=lambda row, readers: _chosen(row, readers) or _drifts(row, readers)),
        f"{{clipped:.1%}} of the values are clipped: {_ELSE}",
        remedies.float_activations,
    ),
    Rule(
        "unused",
        "warning",
        "activation",
        _unused,
        f"only {{used:.1%}} of the calibrated range is used: {_ELSE}",
        remedies.float_activations,
    ),
    Rule(
        "outliers",
        "warning",
        "activation",
        _all_of(_outlying, but=_unused),
        "the range reaches {reach:.0f} times as far as 99.9 % of the values, for which few of its steps are left",
        remedies.float_activations,
    ),
    Rule(
        "outliers",
        "warning",
        "dynamic",
        _outlying,
        "values reach {outliers:.0f} times as far as 99.9 % of them, for which few of the steps are left",
        remedies.float_activations,
    ),
    Rule(
        "zero channels",
        "warning",
        "weight",
        _all_of(_loses_channels, _one_scale),
        "{zero} of the weight's channels are all zero: they share one scale with far greater ones",
        remedies.scale_per_channel,
    ),
    Rule(
        "zero channels",
        "warning",
        "weight",
        _all_of(_loses_channels, but=_one_scale),
        "{zero} of the weight's channels are all zero: their scales are greater than they are",
        remedies.in_float,
    ),
    Rule(
        "clipped weight",
        "warning",
        "weight",
        _all_of(_full_ends, but=_observed_whole),
        "{at_ends:.1%} of the weights lie at the ends of their range, which clips them: observe all",
        remedies.whole_weight,
    ),
    Rule(
        "clipped weight",
        "warning",
        "weight",
        _all_of(_full_ends, _observed_whole),
        "{at_ends:.1%} of the weights lie at the ends of a range that was learned, or kept while they changed",
        remedies.in_float,
    ),
)
"""Each that holds gives a finding. Of those on one activation, at most one does."""


def findings_of(row: LayerCheck, readers: Readers, mending: Mending) -> Iterator[Finding]:
    """What the rules say of a row; ``readers`` gives those whose rules in the recipe decide how it is rounded."""
    for rule in RULES:
        if rule.part == row.part and rule.holds(row, readers):
            text = rule.text.format(**{**asdict(row), "clipped": row.clipped, "zero": len(row.zero_channels)})
            remedy = mending.statement(rule.remedy, readers())
            yield Finding(rule.name, rule.severity, row.layer, row.operator, text, remedy)
