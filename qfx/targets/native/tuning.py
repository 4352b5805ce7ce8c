"""Which kernel and which block sizes each layer of a region is fastest with, by measurement.

One program has every layer in all its variants, one behind the other, each writing the same output; its steps are timed
in their own surroundings, with the caches as the layers before have left them. What was found is kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from qfx.targets.native import library, tuning_cache
from qfx.targets.native.choice import SCALES, Choice, Tune, Vary
from qfx.targets.native.compiled import build, emitted
from qfx.targets.native.isa import Isa

RUNS: dict[Tune, int] = {"fast": 5, "full": 20}
"""The least time of so many runs counts."""


def tune(gm: fx.GraphModule, inputs: Sequence[Tensor], isa: Isa, level: Tune) -> dict[str, Choice]:
    """The best choice for each layer, by its node's name.

    Raises:
        NotNative: as :func:`qfx.targets.native.compiled.build`.
        NativeError: the compiler failed.
    """
    known = tuning_cache.read()
    steps = emitted(gm, inputs, isa)[0].program.steps
    common = f"{library.digest()} {level} {isa.name} {inputs[0].shape[0]}"
    keys = {step.source: f"{common} {step.layer}" for step in steps if step.layer}
    open_ = {key: source for source, key in keys.items() if key not in known}
    if open_:
        found = _measure(gm, inputs, isa, level, set(open_.values()))
        known |= {keys[source]: choice.plain() for source, choice in found.items()}
        tuning_cache.add({keys[source]: choice.plain() for source, choice in found.items()})
    return {source: Choice.of(known[key]) for source, key in keys.items() if key in known}


def _measure(
    gm: fx.GraphModule, inputs: Sequence[Tensor], isa: Isa, level: Tune, layers: set[str]
) -> Mapping[str, Choice]:
    """Time the variants of ``layers``."""
    program = build(gm, inputs, isa, vary=Vary(frozenset(layers), SCALES[level], parts=level == "full"))
    contiguous = [x.contiguous() for x in inputs]
    times = [program.profile(*contiguous) for _ in range(RUNS[level])]
    least = [min(run[i] for run in times) for i in range(len(program.steps))]
    best: dict[str, tuple[int, Choice]] = {}
    for step, time in zip(program.steps, least, strict=True):
        if step.choice is not None and (step.source not in best or time < best[step.source][0]):
            best[step.source] = (time, step.choice)
    return {source: choice for source, (_, choice) in best.items()}
