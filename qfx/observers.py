"""Observers: what they see of a tensor decides the range that becomes its scale.

An observer is a module without parameters, built by ``factory(spec)``; the classes here are such factories, and
``Histogram.with_options(bins=512)`` makes one that still compares and hashes as a value. ``observe(x)`` takes a
floating-point tensor of any shape; ``range()`` gives ``(low, high)`` of the scale's shape. Ranges follow the spec's
granularity, so MinMax on a ``PerAxis`` spec is the per-channel observer.

To plug in one's own: subclass :class:`Observer`, write ``observe`` and ``range``, and name the class in a QuantSpec.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qfx import affine
from qfx.errors import CalibrationError, ConfigError
from qfx.ops import fake_quantize
from qfx.spec import PerTensor, QuantSpec, Scheme


@dataclass(frozen=True)
class Factory:
    """An observer class with options, as a value."""

    observer: type[Observer]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, spec: QuantSpec) -> Observer:
        return self.observer(spec, **dict(self.options))

    def __str__(self) -> str:
        return f"{self.observer.__name__}({', '.join(f'{k}={v}' for k, v in self.options)})"


class Observer(nn.Module):
    """Base class. ``seen`` says whether any data has been observed; ``layer`` is named in errors."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.axis, self.group_size = spec.granularity.layout()
        self.layer = ""
        self.seen = False

    @classmethod
    def with_options(cls, **options: Any) -> Factory:
        """A factory of this class with keyword options; equal options give equal factories."""
        return Factory(cls, tuple(sorted(options.items())))

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it unchanged. Empty tensors are ignored.

        Raises:
            CalibrationError: ``x`` holds NaN or infinity; the text names the layer.
        """
        if x.numel():
            self.observe(x.detach())
            self.seen = True
        return x

    def observe(self, x: Tensor) -> None:
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """The range that the scale shall cover: two float32 tensors of the scale's shape."""
        raise NotImplementedError

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) for what was seen."""
        low, high = self.range()
        return affine.choose_qparams(
            low,
            high,
            symmetric=self.spec.scheme is Scheme.SYMMETRIC,
            quant_min=self.spec.quant_min,
            quant_max=self.spec.quant_max,
            scale_dtype=self.spec.scale_dtype,
        )

    def with_spec(self, spec: QuantSpec) -> Observer:
        """A copy that has seen the same data, for a spec of another width; its layout stays.

        Raises:
            ConfigError: what this observer keeps of the data is good for its own spec only.
        """
        if spec.granularity.layout() != (self.axis, self.group_size):
            raise ConfigError(f"ranges were observed {self.spec.granularity}, not {spec.granularity}")
        twin = copy.deepcopy(self)
        twin.spec = spec
        return twin

    def min_max(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Finite extremes of ``x`` at the spec's granularity, float32."""
        low, high = affine.min_max(x, self.axis, self.group_size)
        low, high = low.float(), high.float()
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            kind = "NaN" if bool(torch.isnan(x).any()) else "infinity"
            raise CalibrationError(
                f"calibration data give {kind} here",
                where=self.layer,
                hint="look for a division by zero, an unmasked -inf or a half-precision overflow before this layer, "
                "or leave the layer float with Recipe.skip",
            )
        return low, high


class MinMax(Observer):
    """The extremes of all data seen, per tensor, per channel or per group."""

    low: Tensor
    high: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.zeros(0))

    def observe(self, x: Tensor) -> None:
        low, high = self.min_max(x)
        if self.seen:
            low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.low, self.high = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverageMinMax(MinMax):
    """Exponential moving average of every batch's extremes: ``r += averaging_constant * (batch - r)``.

    Method: Jacob et al., 2018 (arXiv:1712.05877), section 3.1.
    """

    def __init__(self, spec: QuantSpec, averaging_constant: float = 0.01) -> None:
        super().__init__(spec)
        if not 0.0 < averaging_constant <= 1.0:
            raise ConfigError(f"averaging_constant lies in (0, 1], got {averaging_constant}")
        self.averaging_constant = averaging_constant

    def observe(self, x: Tensor) -> None:
        low, high = self.min_max(x)
        if self.seen:
            low = torch.lerp(self.low, low, self.averaging_constant)
            high = torch.lerp(self.high, high, self.averaging_constant)
        self.low, self.high = low, high


_DOWN = 2.0**-20


class _Binned(Observer):
    """Counts of values in equal bins over a range that grows as data demand; per tensor only.

    When the range grows by k, k neighbouring bins become one, so no count is ever split between bins. Exact zeros
    are counted apart: they have no rounding error.
    """

    counts: Tensor

    def __init__(self, spec: QuantSpec, bins: int = 2048) -> None:
        super().__init__(spec)
        if not isinstance(spec.granularity, PerTensor):
            raise ConfigError(
                f"{type(self).__name__} observes per tensor, the spec asks for {spec.granularity}",
                hint="use MinMax or Mse for weights and other per-channel specs",
            )
        if bins < 2:
            raise ConfigError(f"{type(self).__name__} counts in at least 2 bins, got {bins}", hint="leave out bins=")
        self.bins = bins
        self.low = self.width = 0.0
        self.extremes = (0.0, 0.0)
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))

    def observe(self, x: Tensor) -> None:
        low, high = (float(t) for t in self.min_max(x))
        if not self.seen:
            self.extremes = (low, high)
            smallest = max(abs(low), abs(high), 2.0**-84) * 2.0**-16
            self.width = max((high - low) / (self.bins - 1), smallest)
            self.low = low - self.width / 2  # the extremes, where values often pile up, are centres of bins
        else:
            self.extremes = (min(low, self.extremes[0]), max(high, self.extremes[1]))
            self._grow(low, high)
        end = self.low + self.width * self.bins
        # Scaled down, which is exact, because histc takes x's distance from the end times the bins in float32.
        count = partial(torch.histc, bins=self.bins, min=self.low * _DOWN, max=end * _DOWN)
        zeros = count(x.new_zeros(1, dtype=torch.float32)).double() * (x == 0).sum()
        self.counts += count(x.float() * _DOWN).double() - zeros

    def _grow(self, low: float, high: float) -> None:
        below = max(0, int((self.low - low) / self.width) + 1) if low < self.low else 0
        above = max(0, int((high - self.low) / self.width) + 1 - self.bins)
        if not below and not above:
            return
        factor = -(-(self.bins + below + above) // self.bins)
        # In float64, because ranges may grow by more than an integer holds: from all zeros, say.
        index = (torch.arange(self.bins, dtype=torch.float64, device=self.counts.device) + float(below)) / float(factor)
        index = index.floor().clamp(max=self.bins - 1).long()
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)
        self.low -= below * self.width
        self.width *= factor

    def edges(self) -> Tensor:
        """The ``bins + 1`` edges, float64."""
        steps = torch.arange(self.bins + 1, dtype=torch.float64, device=self.counts.device)
        return self.low + self.width * steps

    def as_range(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(low, device=self.counts.device), torch.tensor(high, device=self.counts.device)


class Percentile(_Binned):
    """Clips so that ``percentile`` per cent of the values lie inside, the rest split evenly over both tails.

    Exact zeros are left out: they lie inside every range.
    """

    def __init__(self, spec: QuantSpec, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(spec, bins)
        if not 50.0 < percentile <= 100.0:
            raise ConfigError(f"percentile lies in (50, 100], got {percentile}")
        self.percentile = percentile

    def range(self) -> tuple[Tensor, Tensor]:
        total = self.counts.cumsum(0)
        if not float(total[-1]):
            return self.as_range(*self.extremes)
        tail = (1.0 - self.percentile / 100.0) / 2 * float(total[-1])
        edges = self.edges()
        first = int(torch.searchsorted(total, tail, right=True))
        last = int(torch.searchsorted(total, float(total[-1]) - tail))
        low = max(float(edges[min(first, self.bins)]), self.extremes[0])
        high = min(float(edges[min(last + 1, self.bins)]), self.extremes[1])
        return self.as_range(low, high)


class Histogram(_Binned):
    """Clips where the expected squared error of clipping plus rounding is smallest.

    The values are taken as spread evenly within each bin. Every candidate range is turned into a scale and a zero
    point as in :meth:`qparams`, and its error is computed exactly for that density. Candidates are a geometric grid
    over both ends of the range, refined around the best. Method: minimal mean squared error clipping, as in Banner et
    al., 2019 (arXiv:1810.05723), on the empirical distribution.
    """

    candidates = 96  # at most, for each end of the range
    lookups = 2**15  # at most, for each grid: what a range costs, and what torch does in one thread
    rounds = 6

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = min(self.extremes[0], 0.0), max(self.extremes[1], 0.0)
        symmetric = self.spec.scheme is Scheme.SYMMETRIC
        if symmetric:  # the larger bound says all
            low, high = 0.0, max(-low, high)
        if float(self.counts.sum()) and low < high:
            low, high = self._search(low, high)
        return self.as_range(-high if symmetric else low, high)

    def _search(self, low: float, high: float) -> tuple[float, float]:
        """The best range; an end that is 0 stays 0."""
        levels = self.spec.quant_max - self.spec.quant_min + 1
        ends = (low < 0.0) + (high > 0.0)
        number = min(self.candidates, int((self.lookups / levels) ** (1 / ends)))
        # Few levels may want a range beyond the data, so that a level comes to lie on the extreme.
        least, most = 2.0**-10, 1.0 + 2.0 / levels
        middle, reach = math.sqrt(least * most), math.log(most / least) / 2
        low, high = low * middle, high * middle
        steps = torch.linspace(1.0, -1.0, number, dtype=torch.float64, device=self.counts.device)  # ties: the widest
        largest = torch.finfo(torch.float32).max
        for _ in range(self.rounds):
            ratios = (reach * steps).exp()
            pairs = torch.cartesian_prod(*(end * (ratios if end else ratios[:1]) for end in (low, high)))
            pairs = pairs.clamp(-largest, largest)
            best = int(self._error(pairs[:, 0], pairs[:, 1]).argmin())
            low, high = pairs[best].tolist()
            reach *= 3.0 / (number - 1)  # beyond the neighbours: zero points are integers, so errors are jagged
        return low, high

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        """Squared error of all values for each range, up to a constant.

        With levels v and the borders b between their cells, a step apart, summation by parts turns the sum over the
        cells into ``v_last^2 * n - 2 * v_last * sum(x) - 2 * step * sum_b S(b)``, where ``S(b)``, the sum of
        ``b - x`` over all values x below b, is looked up in one table.
        """
        scale, zero_point = affine.choose_qparams(
            low,
            high,
            symmetric=self.spec.scheme is Scheme.SYMMETRIC,
            quant_min=self.spec.quant_min,
            quant_max=self.spec.quant_max,
            scale_dtype=self.spec.scale_dtype,
        )
        step, offset = scale.double().unsqueeze(1), zero_point.double().unsqueeze(1)
        number = torch.arange(self.spec.quant_min, self.spec.quant_max + 1, dtype=torch.float64, device=low.device)
        levels = (number - offset) * step
        last = levels[:, -1]
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])  # nothing lies behind the last bin
        below = counts.cumsum(0) - counts
        edges = self.edges()
        shortfall = torch.cat([counts.new_zeros(1), ((below + counts / 2)[:-1] * self.width).cumsum(0)])
        place = ((levels[:, :-1] + step / 2 - self.low) / self.width).clamp(min=0.0).flatten()
        left = place.long().clamp(max=self.bins)
        within = place - left
        at = [table.index_select(0, left) for table in (shortfall, below, counts)]
        looked_up = (at[0] + self.width * within * (at[1] + at[2] * within / 2)).view(len(last), -1)
        total, weighted = below[-1], edges[-1] * below[-1] - shortfall[-1]
        return last * last * total - 2 * last * weighted - 2 * step.squeeze(1) * looked_up.sum(1)


class Mse(Observer):
    """Clips by the factor, out of ``steps`` in (0.2, 1], whose squared error on the data themselves is smallest.

    Works at every granularity. Over several batches the ranges are averaged. Method: grid search as in
    Choukroun et al., 2019 (arXiv:1902.06822).
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: QuantSpec, steps: int = 80) -> None:
        super().__init__(spec)
        if steps < 1:
            raise ConfigError(f"Mse tries at least 1 range, got steps={steps}", hint="leave out steps=")
        self.steps = steps
        self.batches = 0
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.zeros(0))

    def observe(self, x: Tensor) -> None:
        low, high = self.min_max(x)
        x = x.float()
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low, high
        for ratio in torch.linspace(1.0, 0.2, self.steps).tolist():
            scale, zero_point = affine.choose_qparams(
                low * ratio,
                high * ratio,
                symmetric=self.spec.scheme is Scheme.SYMMETRIC,
                quant_min=self.spec.quant_min,
                quant_max=self.spec.quant_max,
                scale_dtype=self.spec.scale_dtype,
            )
            rounded, _ = fake_quantize(
                x,
                scale,
                zero_point,
                axis=self.axis,
                group_size=self.group_size,
                quant_min=self.spec.quant_min,
                quant_max=self.spec.quant_max,
            )
            error = self._reduce((rounded - x).square())
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, low * ratio, best_low)
            best_high = torch.where(better, high * ratio, best_high)
        self.batches += 1
        if self.seen:
            best_low = self.low + (best_low - self.low) / self.batches
            best_high = self.high + (best_high - self.high) / self.batches
        self.low, self.high = best_low, best_high

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def with_spec(self, spec: QuantSpec) -> Observer:
        if spec != self.spec:
            raise ConfigError(
                f"Mse chose its ranges for {self.spec} while it saw the data; {spec} needs the data again",
                where=self.layer,
                hint="let Histogram observe activations whose width is to be chosen",
            )
        return super().with_spec(spec)

    def _reduce(self, error: Tensor) -> Tensor:
        """Sum of squared errors at the scale's shape."""
        if self.axis is None:
            return error.sum()
        axis = self.axis % error.ndim
        if self.group_size is None:
            return error.movedim(axis, 0).flatten(1).sum(1) if error.ndim > 1 else error
        if self.group_size == -1:
            return error.sum(axis, keepdim=True)
        rows = error.movedim(axis, -1)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.group_size))
        grouped: Tensor = rows.unflatten(-1, (-1, self.group_size))
        return grouped.sum(-1).movedim(-1, axis)
