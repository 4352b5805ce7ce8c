"""Accuracy control: give back bits, worst layers first, until a metric on real data holds.

The allocation is the first rung of a ladder; each further rung gives the group of layers that does most damage its next
wider choice, float at last. The top rung is the float model, so that one rung always holds. The search gallops up the
ladder and then bisects: some twenty trials for a hundred layers.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qfx.bit_allocation import Allocation, ladder
from qfx.errors import ConfigError, QfxError, QfxWarning
from qfx.whole_file import write_whole

VERSION = 1


class AccuracyWarning(QfxWarning):
    """Accuracy control ended before the metric held: the model that it returns is the best so far."""


@dataclass(frozen=True)
class Outcome:
    """The allocation that was found, its metric beside the float model's, and how many trials it took.

    ``holds``: the drop is within what was allowed. ``ended``: what ended the search early, or "".
    """

    allocation: Allocation
    metric: float
    reference: float
    trials: int
    holds: bool
    ended: str = ""

    def __str__(self) -> str:
        drop = self.reference - self.metric
        text = f"metric {self.metric:g}, float {self.reference:g}: drop {drop:.4g} after {self.trials} trials"
        return f"{text}; ended by {self.ended}" if self.ended else text


@dataclass
class Trials:
    """The metric of every allocation that was tried, kept in ``file`` where there is one.

    Raises:
        ConfigError: the file is of another search, or no such file.
    """

    content: str
    file: Path | None = None
    reference: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None or not self.file.exists():
            return
        try:
            found = json.loads(self.file.read_text())
            version, content = found["version"], found["content"]
            reference = None if found["reference"] is None else float(found["reference"])
            metrics = {str(k): float(v) for k, v in found["metrics"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.file} is no state of a search: {type(error).__name__}: {error}", hint="name another file"
            ) from error
        if version != VERSION or content != self.content:
            raise ConfigError(
                f"{self.file} is the state of another search",
                hint="its model, data or options were others: delete it, or name another file",
            )
        self.reference, self.metrics = reference, metrics

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.file is None:
            return
        state = {"version": VERSION, "content": self.content, "reference": self.reference, "metrics": self.metrics}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps(state, indent=1).encode())


def control(
    start: Allocation,
    evaluate: Callable[[Allocation | None], Any],
    trials: Trials,
    *,
    max_drop: float,
    time_budget: float | None = None,
) -> Outcome:
    """Find the first rung of the ladder whose metric holds.

    Args:
        evaluate: the metric of an allocation; of the float model for None.
        time_budget: seconds; at least one trial is made.

    Raises:
        ConfigError: the metric fails, or is no finite number; what was tried before is in ``trials``.
        KeyboardInterrupt: before the first trial was done.
    """
    began = time.monotonic()
    if trials.reference is None:
        trials.reference = _number(evaluate, None)
        trials.save()
    search = _Search(ladder(start), evaluate, trials, trials.reference, max_drop)

    def out_of_time() -> bool:
        return time_budget is not None and time.monotonic() - began > time_budget

    ended = ""
    try:
        search.try_(0)
        while (rung := search.next()) is not None:
            if out_of_time():
                ended = "its time budget"
                break
            search.try_(rung)
    except KeyboardInterrupt:
        if not search.done:
            raise
        ended = "Ctrl-C"
    outcome = search.outcome(ended or ("" if search.met else "the recipe's own rules, which fix the rest"))
    if not outcome.holds:
        warnings.warn(
            AccuracyWarning(
                f"accuracy control was ended by {outcome.ended}: the drop is {outcome.reference - outcome.metric:.4g}, "
                f"more than {max_drop:g}. The model returned is the best of {outcome.trials}."
            ),
            stacklevel=3,
        )
    return outcome


class _Search:
    """The rungs that were tried, and which to try next."""

    def __init__(
        self,
        rungs: tuple[Allocation, ...],
        evaluate: Callable[[Allocation | None], Any],
        trials: Trials,
        reference: float,
        max_drop: float,
    ) -> None:
        self.rungs, self.evaluate, self.trials = rungs, evaluate, trials
        self.reference, self.max_drop = reference, max_drop
        self.done: dict[int, float] = {}

    def try_(self, rung: int) -> None:
        allocation = self.rungs[rung]
        name = " ".join(str(choice) for choice in allocation.choices)
        if name not in self.trials.metrics:
            if rung == len(self.rungs) - 1 and all(choice.is_float for choice in allocation.choices):
                self.trials.metrics[name] = self.reference  # no layer is quantized: it is the float model
            else:
                self.trials.metrics[name] = _number(self.evaluate, allocation)
            self.trials.save()
        self.done[rung] = self.trials.metrics[name]

    def holds(self, rung: int) -> bool:
        # A metric that fell by exactly what is allowed may come out a rounding error lower.
        return self.reference - self.done[rung] <= self.max_drop + 1e-9 * max(1.0, abs(self.reference))

    @property
    def met(self) -> bool:
        return any(self.holds(rung) for rung in self.done)

    def next(self) -> int | None:
        """The rung to try: twice as far up until one holds, then halfway down to the highest that does not."""
        holding = [rung for rung in self.done if self.holds(rung)]
        top = min(holding, default=None)
        failed = max((rung for rung in self.done if not self.holds(rung) and (top is None or rung < top)), default=-1)
        if top is None:
            last = len(self.rungs) - 1
            return min(max(2 * failed, 1), last) if failed < last else None
        return None if top - failed <= 1 else (top + failed) // 2

    def outcome(self, ended: str) -> Outcome:
        holding = [rung for rung in self.done if self.holds(rung)]
        rung = min(holding) if holding else max(self.done, key=lambda r: self.done[r])
        return Outcome(
            self.rungs[rung], self.done[rung], self.reference, len(self.done), bool(holding), ended
        )


def _number(evaluate: Callable[[Allocation | None], Any], allocation: Allocation | None) -> float:
    try:
        value = evaluate(allocation)
    except QfxError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the metric failed: {type(error).__name__}: {error}",
            hint="it is called as metric(model), with a model that is called like the float one",
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a tensor of several numbers: RuntimeError
        raise ConfigError(f"the metric gave a {type(value).__name__}", hint="metric(model) gives a number") from error
    if not math.isfinite(number):
        raise ConfigError(f"the metric gave {number}", hint="metric(model) gives a finite number; higher is better")
    return number
