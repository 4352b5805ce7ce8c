"""The verbs of bit-width search: ``sensitivity``, ``allocate``, ``pareto``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qfx import api
from qfx.auto_recipe import as_recipe
from qfx.bit_allocation import Allocation, Pin, allocate_bits, pareto_front
from qfx.budget import Budget
from qfx.divergence import Loss
from qfx.errors import ConfigError, UnsupportedError
from qfx.measure import Measurement, measure_sensitivity
from qfx.meta import graph_info, kept_calls, update_graph
from qfx.passes.measure_latency import MeasureLatency
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.samples import samples_of
from qfx.scan import Mode
from qfx.sensitivity_table import Sensitivity
from qfx.targets import Target, choose


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    *,
    data: Iterable[Any] | None = None,
    recipe: str | Recipe = "int8",
    target: str | Target = "auto",
    weight_bits: tuple[int, ...] = (2, 3, 4, 6, 8),
    activation_bits: tuple[int, ...] = (4, 6, 8),
    score: str | Loss = "fisher",
    mode: Mode = "only",
    rows: int = 32,
    check: int = 16,
    latency: bool = False,
    dynamic_shapes: Any = None,
) -> Sensitivity:
    """Measure which layers suffer at which bit width; ``model`` is untouched.

    Args:
        data: calibration data, as for :func:`qfx.quantize`; the scores are measured on its first rows.
        recipe: what is quantized at all, and how; the widths below take the place of its own.
        weight_bits, activation_bits: widths from 2 to 8, of weights and of the data that layers read; ``()`` for none.
        score: ``fisher`` estimates ``kl`` for all layers and widths from one backward pass a batch. ``kl`` and ``sqnr``
            are exact, by a replay of what follows each layer. ``loss(output, item) -> number`` is the user's own, lower
            is better, with ``item`` what ``data`` gave.
        mode: ``only`` one tensor rounded, or ``all_but`` one (``kl``, ``sqnr`` and losses).
        rows: how many rows of data, at least one item.
        check: how many trials of ``fisher`` are measured by ``kl`` too; their rank correlation is in the result.
        latency: time every choice of every layer as well, for a budget of latency.

    Raises:
        UnsupportedError: capture had to stop at parts of the model, or nothing is quantized.
        CaptureError, ConfigError, CalibrationError: see :mod:`qfx.errors`. Scores that were computed until then, or
            until Ctrl-C, are kept: the same call goes on from there, and one with more widths computes only those.
    """
    wanted = Measurement(weight_bits, activation_bits, score, mode, rows, check)
    prepared = api.prepare(model, example_inputs, recipe=_fixed(recipe), target=target, dynamic_shapes=dynamic_shapes)
    api.keep_rows(prepared, rows)
    parts = api.graphs(prepared)
    if list(parts) != [""]:
        raise UnsupportedError(
            f"capture stopped at {len(parts)} parts of this model, whose scores do not compare",
            hint="measure each part as a model of its own, or change the line that stops capture",
        )
    api.calibrate(prepared, [example_inputs] if data is None else data)
    gm = parts[""]
    samples = samples_of(gm, kept_calls(gm), rows=rows, split=wanted.splits)
    chosen = choose(graph_info(gm).target)
    found = measure_sensitivity(gm, samples, wanted, recipe=_fixed(recipe), target=chosen, model=type(model).__name__)
    if not latency:
        return found
    update_graph(gm, sensitivity=found)
    run_pass(MeasureLatency(chosen), gm)
    timed = graph_info(gm).sensitivity
    assert timed is not None
    return timed


def allocate(
    sensitivity: Sensitivity,
    *,
    average_weight_bits: float | None = None,
    weight_bytes: float | None = None,
    bit_operations: float | None = None,
    latency_ms: float | None = None,
    pin_first_last: Pin = 8,
    allow_float: bool = False,
) -> Recipe:
    """The recipe of least damage within a budget: exact, by an integer programme.

    Args:
        average_weight_bits, weight_bytes, bit_operations, latency_ms: see :class:`qfx.budget.Budget`; together they all
            hold. Without any: three quarters of the weight bytes of the recipe that was measured.
        pin_first_last: bits of the weights of first and last layers (found in the graph), ``float``, or None.
        allow_float: layers may stay float where the budget allows it.

    Raises:
        ConfigError: no choices meet the budget; the text says what the least is. Or the scores cannot be added up.
    """
    budget = Budget(average_weight_bits, weight_bytes, bit_operations, latency_ms)
    return allocate_bits(sensitivity, budget, pin=pin_first_last, allow_float=allow_float).recipe()


def pareto(
    sensitivity: Sensitivity,
    resource: str = "weight_bytes",
    *,
    points: int = 20,
    pin_first_last: Pin = 8,
    allow_float: bool = False,
) -> tuple[Allocation, ...]:
    """The Pareto front of damage and one resource: :func:`qfx.bit_allocation.pareto_front`."""
    return pareto_front(sensitivity, resource, points=points, pin=pin_first_last, allow_float=allow_float)


def _fixed(recipe: str | Recipe) -> Recipe:
    found = as_recipe(recipe)
    if not isinstance(found, Recipe):
        raise ConfigError("this recipe finds its bits itself", hint="give its base: the recipe whose layers to measure")
    return found
