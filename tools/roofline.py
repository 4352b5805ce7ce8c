"""Each step of a native model: its time, its speed, and the share of the CPU's measured int8 peak that this is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

import qfx
from qfx.meta import info
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.isa import find
from qfx.targets.native.peak import measured_peak
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.running import programs_of
from qfx.tools.bench_calls import call
from qfx.tools.latency_subject import subject

RUNS = 20
"""The least time of so many runs counts."""


@dataclass(frozen=True)
class StepTime:
    """``seconds`` of one step in a run of the whole, for ``macs`` multiply-accumulates."""

    layer: str
    kernel: str
    seconds: float
    macs: int


def step_times(model: fx.GraphModule, example: Any) -> list[StepTime]:
    """Every step of every native program of ``model``, called on ``example``."""
    layers = {node.name: info(node).origin or node.name for node in inlined(model).graph.nodes}
    found: list[StepTime] = []
    regions = set(regions_of(model).values())

    def note(region: NativeRegion, inputs: tuple[Tensor, ...]) -> None:
        for _, program, called in programs_of(region, inputs):
            given = [x.contiguous() for x in called]
            runs = [program.profile(*given) for _ in range(RUNS)]
            for i, step in enumerate(program.steps):
                seconds = min(run[i] for run in runs) * 1e-9
                layer = layers.get(step.source, step.source)
                found.append(StepTime(layer, step.kernel, seconds, step.macs * len(given[0])))

    hooks = [region.register_forward_pre_hook(note) for region in regions]
    try:
        call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def of_reference_model(name: str, batch: int) -> str:
    """The table of a model of ``qfx.models.MODELS`` on the target ``native``."""
    made = subject(name, batch, Path())
    model = qfx.quantize(made.model, made.example, calibration=made.calibration, target="native", verbose=False)
    assert isinstance(model, fx.GraphModule)
    return roofline(model, made.held_out[0])


def roofline(model: fx.GraphModule, example: Any, isa: str | None = None) -> str:
    """The table, in the order of the steps; two operations make one multiply-accumulate."""
    peak = measured_peak(find(isa), torch.get_num_threads())
    steps = step_times(model, example)
    whole = StepTime("all steps", "", sum(s.seconds for s in steps), sum(s.macs for s in steps))
    rows = [[s.layer, s.kernel, s.seconds * 1e6, *_speed(s, peak)] for s in (*steps, whole)]
    table = tabulate(
        rows, ["layer", "kernel", "µs", "TOPS", "of the peak"], floatfmt=("", "", ".1f", ".3f", ".0%"), missingval=""
    )
    return f"{table}\n\nmeasured int8 peak: {2e-12 * peak:.3f} TOPS; Winograd saves products, and may pass it\n"


def _speed(step: StepTime, peak: float) -> tuple[float | None, float | None]:
    """TOPS, and the share of ``peak``; None where nothing is multiplied."""
    if not step.macs:
        return None, None
    rate = step.macs / step.seconds
    return 2e-12 * rate, rate / peak
