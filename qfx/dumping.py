"""``qfx.dump``: what a model is at any stage of the compiler, and what happened in between, as text."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qfx import api
from qfx.auto_recipe import AutoRecipe
from qfx.dump_bisect import bisect as bisected
from qfx.dump_diff import differences
from qfx.dump_formats import FORMATS, Format, Shown
from qfx.dump_measures import measured
from qfx.dump_model import Dump
from qfx.dump_why import explain, in_layer, layers_of, nearest
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.recording import Recording, record, record_prepared, record_quantized
from qfx.stage import Stage, stage_of
from qfx.targets import Target

STAGES = tuple(stage.name.lower() for stage in Stage)


def dump(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    stages: str | Sequence[str] | None = None,
    diff: str | None = None,
    layer: str | None = None,
    why: str | None = None,
    pass_by_pass: bool = False,
    bisect: float | None = None,
    format: str = "text",
    measure: bool | None = None,
    recipe: str | Recipe | AutoRecipe = "int8",
    target: str | Target = "auto",
    calibration: Iterable[Any] | None = None,
) -> str:
    """Show a model at stages of the compiler, and what became of it in between; returns text, and prints nothing.

    Args:
        model: a float model, with ``example_inputs``: it is quantized as :func:`qfx.quantize` would, and all stages can
            be shown; what ``qfx.quantize`` returned, or the path of a saved model: ``converted`` and ``lowered``; what
            ``qfx.prepare`` returned: its own stage.
        stages: names, as a sequence or with commas between: ``captured``, ``canonical``, ``fused``, ``annotated``,
            ``prepared``, ``calibrated``, ``converted``, ``lowered``. None: nothing but what is asked for below, or else
            the last stage (``json``, ``html``: all).
        diff: ``"fused..lowered"``: what became of each node between two stages.
        layer: a pattern of layer paths, as in a recipe's rules; other layers are left out.
        why: a node, or a layer: everything that decided about it, near misses and history.
        pass_by_pass: what each pass rewrote, in how much time.
        bisect: a bound in dB: the first pass behind which the output's SQNR against the float model is lower.
        format: ``table``, ``text``, ``dot`` (graphviz), ``json`` or ``html`` (a page to look at).
        measure: measure noise, histograms and times of the nodes; None: where the format shows them.
        recipe, target, calibration: as for :func:`qfx.quantize`, for a float model; ``target`` for a saved one too.

    Raises:
        ConfigError: an unknown format, stage, layer or node, or something that this model cannot show.
        CaptureError, CalibrationError, UnsupportedError, ArtifactError: from quantizing or loading.
    """
    form = _format(format, sections=bool(diff or why or pass_by_pass or bisect is not None))
    names = _stages(stages)
    pair = _pair(diff)
    recording = _recording(model, example_inputs, recipe, target, calibration, keep=bisect is not None)
    if (pass_by_pass or bisect is not None) and not recording.dump.passes:
        raise ConfigError(
            "the passes of this model ran long ago: only a float model can be shown pass by pass",
            hint="give the float model and its example_inputs",
        )
    _check_reached(recording.dump, (*(names or ()), *pair))
    _check_layer(recording.dump, layer)
    wanted = form.measures if measure is None else measure
    taken = measured(recording) if wanted else recording.dump
    others = bool(pair or why or pass_by_pass or bisect is not None)
    last = () if others else taken.reached[-1:]
    shown = Shown(
        taken,
        names if names is not None else taken.reached if form.every else last,
        layer,
        differences(taken, pair[0], pair[1], lambda path: layer is None or in_layer(path, layer)) if pair else (),
        explain(taken, why) if why else (),
        pass_by_pass,
        None if bisect is None else bisected(recording, bisect),
    )
    return form.write(shown)


def _recording(
    model: nn.Module | str | os.PathLike[str],
    example: Any,
    recipe: str | Recipe | AutoRecipe,
    target: str | Target,
    calibration: Iterable[Any] | None,
    *,
    keep: bool,
) -> Recording:
    if isinstance(model, str | os.PathLike):
        from qfx.artifact import load

        return record_quantized(load(model, target=target), example, model=Path(model).name)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{type(model).__name__} cannot be shown", hint="give a model, or the path of a saved one")
    parts = api.graphs(model)
    if any(stage_of(gm) >= Stage.CONVERTED for gm in parts.values()):
        return record_quantized(model, example)
    if parts:
        return record_prepared(model, example)
    if example is None:
        raise ConfigError(f"{type(model).__name__} is a float model", hint="give its example_inputs too")
    return record(model, example, recipe=recipe, target=target, calibration=calibration, keep=keep)


# --- what was asked for -----------------------------------------------------------------------------------------------


def _format(name: str, *, sections: bool) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}", hint="choose one of " + ", ".join(FORMATS))
    if sections and not FORMATS[name].sections:
        able = ", ".join(n for n, form in FORMATS.items() if form.sections)
        raise ConfigError(f"the format {name!r} shows stages alone", hint=f"choose one of {able} for the rest")
    return FORMATS[name]


def _stages(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = given.split(",") if isinstance(given, str) else list(given)
    return tuple(sorted((_stage(name) for name in names), key=STAGES.index))


def _stage(name: str) -> str:
    found = name.strip().lower()
    if found not in STAGES:
        near = difflib.get_close_matches(found, STAGES, n=1)
        raise ConfigError(
            f"there is no stage {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint="choose from " + ", ".join(STAGES),
        )
    return found


def _pair(diff: str | None) -> tuple[str, ...]:
    """The two stages of ``"fused..lowered"``, or none."""
    if diff is None:
        return ()
    before, dots, after = diff.partition("..")
    if not dots:
        raise ConfigError(f"{diff!r} names no two stages", hint="write two with dots between, such as fused..lowered")
    pair = _stage(before), _stage(after)
    if STAGES.index(pair[0]) >= STAGES.index(pair[1]):
        raise ConfigError(f"{pair[0]} does not come before {pair[1]}", hint=f"write {pair[1]}..{pair[0]}")
    return pair


def _check_reached(dump: Dump, wanted: Iterable[str]) -> None:
    for stage in wanted:
        if stage not in dump.reached:
            kept = "and remembers no other" if len(dump.reached) == 1 else "what came before is not kept"
            raise ConfigError(
                f"this model has no stage {stage!r}: it has {' and '.join(dump.reached)}, {kept}",
                hint="for all stages give the float model and its example_inputs",
            )


def _check_layer(dump: Dump, layer: str | None) -> None:
    if layer is not None and not any(in_layer(n.layer, layer) for view in dump.stages for n in view.nodes):
        raise ConfigError(f"there is no layer {layer!r}", hint=nearest(layer, layers_of(dump)))
