"""A model taken through the compiler with a recorder between the passes: what each did, and the graph at every stage.

Nothing of it touches a normal compile: the recorder runs as passes of a pipeline, each around the one that it watches.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from torch import Tensor, fx, nn

from qfx import api
from qfx.auto_recipe import AutoRecipe, as_recipe
from qfx.calling import flat_inputs
from qfx.dump_model import Change, Dump, Edit, PassView, StageView
from qfx.dump_noise import Values, measure_values
from qfx.dump_values import with_values
from qfx.errors import ConfigError
from qfx.examples import Example, as_example, calibration_call
from qfx.graph_module import CapturedModule
from qfx.meta import NODE_INFO_FIELDS, NodeInfo, graph_info, info, kept_calls
from qfx.node_table import Report
from qfx.node_views import Viewer, with_specs_of
from qfx.noise import Noise
from qfx.pipeline import Pass, Pipeline
from qfx.portable import twin_of
from qfx.printer import show_node
from qfx.recipe import Recipe
from qfx.stage import Stage, stage_of
from qfx.targets import Target, choose

ROWS = 4
"""Of the calibration data, at least one item, that times are measured on."""


@dataclass(frozen=True)
class Kept:
    """A runnable copy of the graph behind a pass, with shared tensors."""

    step: str
    stage: Stage
    gm: fx.GraphModule


@dataclass(frozen=True)
class Recording:
    """A dump, and the modules that it was taken of: what is measured is measured on these.

    ``values``: by the path of a graph, what was seen of them when it was converted. ``calibrated`` (those that nobody
    converted) and ``lowered``: graphs by path; ``inputs``: the flat inputs of each. ``steps``: the graph before the
    first pass and behind each, where they were to be kept and the model is one graph. ``call``: what they all are fed.
    """

    dump: Dump
    model: nn.Module | None = None
    values: Mapping[str, Values] = field(default_factory=dict)
    calibrated: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    lowered: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    inputs: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    steps: tuple[Kept, ...] = ()
    call: Example | None = None


def record(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: str | Recipe | AutoRecipe = "int8",
    target: str | Target = "auto",
    calibration: Iterable[Any] | None = None,
    pipeline: Pipeline | None = None,
    keep: bool = False,
) -> Recording:
    """Quantize a float model, as :func:`qfx.quantize` does, and record it all; ``model`` is untouched.

    Args:
        keep: keep a runnable copy of the graph behind every pass (weights are shared).

    Raises:
        CaptureError, ConfigError, CalibrationError, UnsupportedError: as for :func:`qfx.quantize`.
    """
    chosen, machine = as_recipe(recipe), choose(target)
    passes = Pipeline.default(chosen, machine) if pipeline is None else pipeline
    rules = chosen.base if isinstance(chosen, AutoRecipe) else chosen
    tape = Tape(Viewer(rules, machine), keep)
    prepared = api.prepare(model, example_inputs, recipe=chosen, target=machine, pipeline=tape.watching(passes))
    if not isinstance(chosen, AutoRecipe):  # which keeps as many rows as it measures on
        api.keep_rows(prepared, ROWS)
    parts = api.graphs(prepared)
    for gm in parts.values():
        tape.look(gm, Stage.PREPARED)
    api.calibrate(prepared, [example_inputs] if calibration is None else calibration)
    for gm in parts.values():
        tape.step("calibrate", Stage.CALIBRATED, gm)
    calls = {path: kept_calls(gm) for path, gm in parts.items()}
    api.measure_noise_by(prepared, tape.measure)
    qmodel = api.convert(prepared)
    lowered = api.graphs(qmodel)
    for gm in lowered.values():
        tape.look(gm, stage_of(gm))
    paths = {id(gm): path for found in (parts, lowered) for path, gm in found.items()}
    report = api.report(qmodel)
    first = next(iter(calls.values()), ())
    return Recording(
        Dump(report.model, report.recipe, report.target, tape.stages(paths), tape.done(paths), report.notes, report),
        model,
        tape.values(paths),
        lowered=lowered,
        inputs={path: found[0][0] for path, found in calls.items() if found},
        steps=tuple(tape.steps) if list(parts) == [""] else (),
        call=calibration_call(first[0][1], as_example(example_inputs)) if first else None,
    )


def record_prepared(prepared: nn.Module, example_inputs: Any = None) -> Recording:
    """The one stage of a prepared or calibrated model; measurements of it need ``example_inputs``."""
    parts = api.graphs(prepared)
    viewer = Viewer(graph_info(next(iter(parts.values()))).asked)
    views = tuple(viewer.view(gm, stage_of(gm), path) for path, gm in parts.items())
    known = graph_info(next(iter(parts.values())))
    dump = Dump(type(prepared).__name__, known.recipe, known.target, views, notes=_notes(parts))
    calibrated = {path: gm for path, gm in parts.items() if stage_of(gm) is Stage.CALIBRATED}
    return Recording(dump, calibrated=calibrated, inputs=_inputs(parts, example_inputs))


def record_quantized(qmodel: nn.Module, example_inputs: Any = None, *, model: str = "") -> Recording:
    """The CONVERTED and the LOWERED stage of a model that qfx quantized or loaded; ``model`` is its name.

    Measurements need ``example_inputs``.

    Raises:
        ConfigError: it is no such model.
    """
    parts = api.graphs(qmodel)
    if not parts:
        raise ConfigError(
            f"{type(qmodel).__name__} is no model that qfx prepared or quantized",
            hint="give example_inputs with a float model",
        )
    viewer = Viewer(graph_info(next(iter(parts.values()))).asked)
    views: list[StageView] = []
    for path, gm in parts.items():
        whole = example_inputs if list(parts) == [""] else None
        of_file, own = with_values(cast(CapturedModule, gm), whole)
        converted = viewer.view(of_file, Stage.CONVERTED, path)
        views.append(converted)
        if stage_of(gm) is Stage.LOWERED:
            views.append(with_specs_of(viewer.view(own, Stage.LOWERED, path), converted))
    found = _report(qmodel)
    known = graph_info(next(iter(parts.values())))
    dump = Dump(
        model or (found.model if found else type(qmodel).__name__),
        found.recipe if found else known.recipe,
        found.target if found else known.target,
        tuple(sorted(views, key=_order)),
        notes=_notes(parts),
        report=found,
    )
    lowered = {path: gm for path, gm in parts.items() if stage_of(gm) is Stage.LOWERED}
    return Recording(dump, lowered=lowered, inputs=_inputs(parts, example_inputs))


def _inputs(parts: Mapping[str, fx.GraphModule], example_inputs: Any) -> dict[str, tuple[Tensor, ...]]:
    """What the one graph is fed; of several only a run of the whole model would tell."""
    if example_inputs is None or list(parts) != [""]:
        return {}
    call = as_example(example_inputs)
    return {"": flat_inputs(parts[""], call.args, call.kwargs)}


def _report(qmodel: nn.Module) -> Report | None:
    try:
        return api.report(qmodel)
    except ConfigError:  # a saved model need not remember it
        return None


def _order(view: StageView) -> int:
    return Stage[view.stage.upper()]


def _notes(parts: Mapping[str, fx.GraphModule]) -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys(note for gm in parts.values() for note in graph_info(gm).notes))


# --- between the passes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """A pass that does what ``inner`` does, under its name and contract, and lets ``tape`` see it."""

    inner: Pass
    tape: Tape

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def stage(self) -> tuple[Stage, Stage]:
        return self.inner.stage

    @property
    def writes(self) -> frozenset[str]:
        return self.inner.writes

    def run(self, gm: fx.GraphModule) -> int:
        return self.tape.play(self.inner, gm)


Lines = Mapping[str, tuple[str, NodeInfo]]
Of = weakref.ref[fx.GraphModule]


class Tape:
    """What passes did, in the order in which they ran; graphs that are gone at the end (trials of a search) drop out.

    ``steps``: copies of the graph, if asked for.
    """

    def __init__(self, viewer: Viewer, keep: bool = False) -> None:
        self.viewer, self.keep = viewer, keep
        self.views: list[tuple[Of, StageView]] = []
        self.passes: list[tuple[Of, PassView]] = []
        self.seen: list[tuple[Of, Values]] = []
        self.steps: list[Kept] = []
        self._last: weakref.WeakKeyDictionary[fx.GraphModule, Lines] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        return self

    def watching(self, pipeline: Pipeline) -> Pipeline:
        """The same pipeline, watched."""
        return Pipeline(tuple(_Watched(p, self) for p in pipeline))

    def play(self, p: Pass, gm: fx.GraphModule) -> int:
        """Run ``p`` on ``gm`` and note what it did."""
        stage = stage_of(gm)
        reached = max(stage, p.stage[1])
        if reached > stage and stage is not Stage.PREPARED:
            self.look(gm, stage)
        if self.keep and not self.steps:
            self.step("capture", stage, gm)
        before, told = self._last.get(gm) or lines_of(gm), graph_info(gm).notes
        start = time.perf_counter()
        count = p.run(gm)
        seconds = time.perf_counter() - start
        after = self._last[gm] = lines_of(gm)
        notes = tuple(note for note in graph_info(gm).notes if note not in told)
        sizes = len(before), len(after)
        edits = changes(before, after)
        view = PassView(p.name, "", reached.name.lower(), count, *sizes, seconds * 1e3, edits, notes)
        self.passes.append((weakref.ref(gm), view))
        self.step(p.name, reached, gm)
        return count

    def look(self, gm: fx.GraphModule, stage: Stage) -> None:
        """View the graph as it is."""
        self.views.append((weakref.ref(gm), self.viewer.view(gm, stage)))

    def measure(self, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Noise:
        """Measure the noise of a graph that is about to be converted, and note what is seen of its values."""
        noise, values = measure_values(gm, inputs)
        self.seen.append((weakref.ref(gm), values))
        return noise

    def step(self, name: str, stage: Stage, gm: fx.GraphModule) -> None:
        """Keep a copy, if asked to."""
        if self.keep:
            self.steps.append(Kept(name, stage, twin_of(cast(CapturedModule, gm))))

    def stages(self, paths: Mapping[int, str]) -> tuple[StageView, ...]:
        """The views of the graphs whose ids are in ``paths``, by stage; the last one of each."""
        found = {(v.stage, path): replace(v, graph=path) for v, path in _named(self.views, paths)}
        for (stage, path), view in found.items():
            if stage == "lowered" and ("converted", path) in found:
                found[stage, path] = with_specs_of(view, found["converted", path])
        return tuple(sorted((_with_rules(v, found) for v in found.values()), key=_order))

    def done(self, paths: Mapping[int, str]) -> tuple[PassView, ...]:
        """What the passes did to those graphs."""
        return tuple(replace(v, graph=path) for v, path in _named(self.passes, paths))

    def values(self, paths: Mapping[int, str]) -> dict[str, Values]:
        """What was seen of the values of those graphs."""
        return {path: values for values, path in _named(self.seen, paths)}


View = TypeVar("View", StageView, PassView, Values)


def _named(seen: Iterable[tuple[Of, View]], paths: Mapping[int, str]) -> Iterator[tuple[View, str]]:
    for of, view in seen:
        gm = of()
        if gm is not None and id(gm) in paths:
            yield view, paths[id(gm)]


def _with_rules(view: StageView, found: Mapping[tuple[str, str], StageView]) -> StageView:
    """Refusals are asked for once, of the annotated graph, and hold for every stage behind it."""
    annotated = found.get(("annotated", view.graph))
    if annotated is None or _order(view) < Stage.ANNOTATED:
        return view
    known = annotated.by_name
    nodes = (replace(n, refusal=known[n.name].refusal) if n.name in known else n for n in view.nodes)
    return replace(view, nodes=tuple(nodes))


def lines_of(gm: fx.GraphModule) -> Lines:
    """Every node's line and facts."""
    return {n.name: (show_node(n), info(n)) for n in gm.graph.nodes}


def changes(before: Lines, after: Lines) -> tuple[Change, ...]:
    """What differs, in the order of the graph before; what was added stands last."""
    found = []
    for name, (line, known) in before.items():
        if name not in after:
            found.append(Change(Edit.REMOVED, name, line, ""))
        elif after[name] != (line, known):
            new, info_now = after[name]
            differing = tuple(f for f in NODE_INFO_FIELDS if getattr(known, f) != getattr(info_now, f))
            found.append(Change(Edit.CHANGED, name, line, new, tuple(sorted(differing))))
    added = (Change(Edit.ADDED, name, "", line) for name, (line, _) in after.items() if name not in before)
    return (*found, *added)
