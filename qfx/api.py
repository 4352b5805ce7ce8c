"""The verbs: ``quantize`` is ``prepare``, ``calibrate``, ``convert``; ``report`` tells what they did."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from qfx import agreement, clipping
from qfx import calibration as calibration_
from qfx.accuracy_control import Trials, control
from qfx.auto_recipe import AutoRecipe, as_recipe
from qfx.batch_statistics import reestimate
from qfx.bit_allocation import Allocation, allocate_bits
from qfx.calling import flat_inputs
from qfx.capture import original
from qfx.errors import CalibrationError, ConfigError, QfxWarning
from qfx.example_values import restore_values
from qfx.examples import Example, as_example
from qfx.graph_module import CapturedModule
from qfx.inference import freeze, storages
from qfx.kept_calls import keeping
from qfx.lowered import lower_beside
from qfx.memory import returned_at_once, trim
from qfx.meta import add_notes, graph_info, info, keep_calls, kept_calls, update_graph
from qfx.metrics import sqnr_db
from qfx.modes import evaluating
from qfx.native_report import as_it_runs
from qfx.node_table import (
    Report,
    before_lowering,
    build_report,
    keep_report,
    kept_report,
    rows_before,
    tensor_bytes,
)
from qfx.noise import Noise, measure
from qfx.pipeline import Pipeline, run_pass
from qfx.portable import portable
from qfx.recipe import Recipe
from qfx.regions import Regions, capture_regions
from qfx.roundings import fake_quants
from qfx.samples import few_rows
from qfx.score_cache import content_of
from qfx.shadow import undisturbed
from qfx.stage import Stage, stage_of
from qfx.targets import Target, choose
from qfx.trained_fake_quant import TrainedFakeQuantize

log = logging.getLogger(__name__)

_PLAN = "_qfx_plan"
_ROWS = 4  # of the inputs that noise is measured on


Measure = Callable[[fx.GraphModule, tuple[Any, ...]], Noise]
"""Measures the noise of a CALIBRATED graph on its flat inputs, as :func:`qfx.noise.measure` does."""


class UntrainedWarning(QfxWarning):
    """A model that was prepared for training is converted without."""


class TargetWarning(QfxWarning):
    """On this machine integers are likely to be slower than float."""


@dataclass(frozen=True)
class _Plan:
    """What a prepared model remembers until it is converted."""

    behind: Pipeline
    example: Example
    model: str
    weight_bytes: int
    nodes_before: int
    float_parts: tuple[str, ...] = ()
    last_call: Example | None = None
    calibration: tuple[str, ...] = ()
    mode: str = "ptq"
    fingerprints: tuple[float, ...] = ()
    placement: tuple[torch.device, torch.dtype] | None = None
    auto: AutoRecipe | None = None
    kept_rows: int = 0
    measure: Measure | None = None


def quantize(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    recipe: str | Recipe | AutoRecipe = "int8",
    target: str | Target = "auto",
    pipeline: Pipeline | None = None,
    dynamic_shapes: Any = None,
    inplace: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Quantize ``model`` after training; returns a model that is called exactly like it and runs integer kernels.

    Args:
        model: a float model; untouched unless ``inplace``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        calibration: any iterable of such inputs, a DataLoader with labels too. Without it the example is used, and a
            warning says so.
        recipe: a preset's name (``int8``, ``int8_dynamic``, ``w8a16``, ``w4a16``) or a plug-in's, a
            :class:`qfx.Recipe`, or for bit widths by sensitivity ``auto`` or a :class:`qfx.AutoRecipe`.
        target: ``auto`` (the fastest that this machine can run), ``x86``, ``reference``, a plug-in's name, or a target.
        pipeline: the passes to run, see :meth:`qfx.Pipeline.default`; it takes ``recipe`` and ``target`` from here.
        dynamic_shapes: as for ``torch.export.export``, for more than batch and token dimensions.
        inplace: give up the float weights layer by layer, for models that fit only once; afterwards the parameters of
            ``model`` are empty (on the meta device).
        verbose: print the before/after node table.

    Returns:
        An ``fx.GraphModule``; where capture had to stop at parts of the model, a copy of the user's module with
        quantized children. :func:`report` gives the table as values.

    Raises:
        CaptureError, ConfigError, CalibrationError, UnsupportedError: see :mod:`qfx.errors`; the model is unharmed.
    """
    data = [example_inputs] if calibration is None else calibration
    if inplace and isinstance(recipe, AutoRecipe) and recipe.metric is not None:
        raise ConfigError(
            "accuracy control converts the model more than once, so its float weights must stay",
            hint="leave out inplace=True, or max_drop and metric",
        )
    with returned_at_once() if inplace else nullcontext():
        trim(collect=inplace)
        prepared = prepare(
            model, example_inputs, recipe=recipe, target=target, pipeline=pipeline, dynamic_shapes=dynamic_shapes
        )
        trim(collect=inplace)  # what capture left behind
        calibrate(prepared, data)
        if inplace:
            _release(model)
        return _convert(prepared, foreign=frozenset() if inplace else storages(prepared), verbose=verbose)


def quantize_qat(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Callable[[nn.Module], object],
    calibration: Iterable[Any] | None = None,
    recipe: str | Recipe = "int8",
    target: str | Target = "auto",
    pipeline: Pipeline | None = None,
    dynamic_shapes: Any = None,
    verbose: bool = True,
) -> nn.Module:
    """Quantize ``model`` with training: prepare, train by ``train``, convert; returns the integer model.

    Args:
        train: called once with the prepared model, in training mode, to train it in place; what it returns is ignored.
        calibration: as for :func:`quantize`; without it ranges start with the first batch of training.

    The other arguments are those of :func:`quantize`; ``model`` is untouched.

    Raises:
        CaptureError, ConfigError, CalibrationError, UnsupportedError, VerifyError: see :mod:`qfx.errors`.
    """
    if not callable(train):
        raise ConfigError(f"train is a {type(train).__name__}", hint="give a function that trains what it is given")
    prepared = prepare(
        model,
        example_inputs,
        recipe=recipe,
        target=target,
        pipeline=pipeline,
        dynamic_shapes=dynamic_shapes,
        mode="qat",
    )
    if calibration is not None:
        calibrate(prepared, calibration)
    train(prepared)
    return convert(prepared.eval(), verbose=verbose)


def reestimate_batch_norm(prepared: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Measure the batch-norm statistics of a trained model anew on ``data``, in place; returns it.

    To be called before :func:`convert`, where batch norms trained with a small momentum or the weights moved until the
    end. Batch norms that the user's model had frozen stay.

    Raises:
        ConfigError: there are no data.
    """
    reestimate(prepared, data, _plan(prepared).example)
    return prepared


def clipped_weights(prepared: nn.Module) -> dict[str, float]:
    """The share of clipped weights of every layer, in [0, 1], of a model in training: something to log."""
    return {
        f"{path}.{layer}" if path else layer: share
        for path, gm in graphs(prepared).items()
        for layer, share in clipping.clipped_weights(gm).items()
    }


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    recipe: str | Recipe | AutoRecipe = "int8",
    target: str | Target = "auto",
    pipeline: Pipeline | None = None,
    dynamic_shapes: Any = None,
    mode: str = "ptq",
) -> nn.Module:
    """Capture, fuse and annotate ``model`` and insert its observers; arguments as for :func:`quantize`.

    Args:
        mode: ``ptq``: the result computes what the float model computes, until it is calibrated and converted; it
            shares the model's weights. ``qat``: the result has weights of its own and is trained in any loop. It rounds
            from the first batch on, with ranges from :func:`calibrate` or else from that batch; ``train()`` and
            ``eval()`` switch dropout and batch norm as in the float model, and in eval mode it computes what the float
            model computes until it has ranges. It is returned in training mode.

    Raises:
        CaptureError, ConfigError, UnsupportedError: see :mod:`qfx.errors`; the model is unharmed.
    """
    chosen_recipe, chosen_target = as_recipe(recipe), choose(target, _device(model))
    default = Pipeline.default(chosen_recipe, chosen_target, mode=mode)  # which refuses what does not fit
    passes = default if pipeline is None else pipeline
    auto = chosen_recipe if isinstance(chosen_recipe, AutoRecipe) else None
    passes = _bound(passes, chosen_recipe, chosen_target)
    example = as_example(example_inputs)
    captured = capture_regions(model, example, dynamic_shapes=dynamic_shapes, training=mode == "qat")
    before, behind = passes.split()
    nodes = sum(len(gm.graph.nodes) for gm in graphs(captured.model).values())
    for gm in graphs(captured.model).values():
        with torch.inference_mode(False):  # what observers keep is written to later
            before.run(gm)
        if slow := _why_slow(chosen_target):
            add_notes(gm, "target", [slow])
    plan = _Plan(behind, example, type(model).__name__, tensor_bytes(model), nodes, _float_parts(captured), mode=mode)
    plan = dataclasses.replace(
        plan, placement=_placement(captured.model), auto=auto, kept_rows=auto.rows if auto else 0
    )
    if auto is not None:
        _check_whole(plan)
    if mode == "qat":
        plan = dataclasses.replace(plan, fingerprints=_fingerprints(captured.model))
    setattr(captured.model, _PLAN, plan)
    return captured.model.train(mode == "qat")


def calibrate(prepared: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Run ``data`` through a prepared model and set its scales, in place; returns it.

    Raises:
        CalibrationError: the data are empty, of another structure, dtype or device than the example, or hold NaN or
            infinity; the text names the layer.
    """
    plan = _plan(prepared)
    if isinstance(data, Tensor | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        what = f"the calibration data are one {type(data).__name__}"
        raise CalibrationError(what, hint="give an iterable of calls: a list of it, a DataLoader, a generator")
    parts = graphs(prepared)
    all_graphs = list(parts.values())
    with undisturbed(), evaluating(prepared):
        for gm in all_graphs:
            calibration_.observe_weights(gm)
        trim()
        with keeping(parts, plan.kept_rows) as kept:
            _, last, seen = calibration_.run(prepared, all_graphs, data, plan.example, kept)
    for path, gm in parts.items():
        keep_calls(gm, tuple(kept.calls.get(path, ())))
        update_graph(gm, sensitivity=None, allocation=None)
    trim()
    setattr(prepared, _PLAN, dataclasses.replace(plan, last_call=last, calibration=seen))
    return prepared


def convert(prepared: nn.Module, *, check: bool | None = None, verbose: bool = False) -> nn.Module:
    """Turn a calibrated or trained model into an integer model; ``prepared`` stays as it is.

    Args:
        check: run both on the last calibration batch (or the example), layer by layer on the same inputs. None: where
            the model was prepared for training.
        verbose: print the before/after node table.

    Raises:
        CalibrationError: it has layers without ranges; the text names the first.
        ConfigError: it is in training mode.
        VerifyError: ``check`` found a layer whose integers are off by more than 1 LSB; the text names it.
    """
    prepared = original(prepared)
    plan = _plan(prepared)
    if plan.mode == "qat":
        _ready_to_convert(prepared, plan)
    shared = {id(t): t for t in (*prepared.parameters(), *prepared.buffers())}
    twin = copy.deepcopy(prepared, {**shared, id(plan): plan})
    check = plan.mode == "qat" if check is None else check
    return _convert(twin, foreign=storages(prepared), verbose=verbose, check=check)


def report(qmodel: nn.Module) -> Report:
    """What quantization did to a model that ``quantize`` or ``convert`` returned.

    Raises:
        ConfigError: it is no such model.
    """
    found = kept_report(qmodel)
    if found is None:
        raise ConfigError(
            f"{type(qmodel).__name__} is no model that qfx quantized", hint="pass what qfx.quantize returned"
        )
    return as_it_runs(found, qmodel) if isinstance(qmodel, fx.GraphModule) else found


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs that qfx compiles, by path: the model itself, or the children where capture stopped above them."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and graph_info(module).stage
    }


# --- inside -----------------------------------------------------------------------------------------------------------


def _fingerprints(model: nn.Module) -> tuple[float, ...]:
    """The sum of each weight, which copies and files keep; ranges that are learned do not count."""
    weights = (p.detach() for name, p in model.named_parameters() if "fake_quant." not in name)
    return tuple(float(p.sum(dtype=torch.float64)) for p in weights if p.is_floating_point())


def _ready_to_convert(prepared: nn.Module, plan: _Plan) -> None:
    """Refuse a model that is being trained or has no ranges; warn of one that nobody trained."""
    if any(kind.__name__ == "FSDPModule" for kind in type(prepared).__mro__):
        raise ConfigError(
            "the model is sharded by fully_shard: no rank holds whole weights",
            hint="prepare the float model again and load the full state dict of the sharded one into it",
        )
    if replaced := [path for path, m in prepared.named_modules() if isinstance(m, nn.SyncBatchNorm)]:
        raise ConfigError(
            f"{replaced[0]} has become a SyncBatchNorm since qfx.prepare, which cannot be folded",
            hint="train the batch norms that qfx.prepare made; statistics are each rank's own",
        )
    if prepared.training:
        raise ConfigError("the model is in training mode", hint="call prepared.eval() before qfx.convert(prepared)")
    for gm in graphs(prepared).values():
        for _, module in fake_quants(gm):
            if isinstance(module, TrainedFakeQuantize) and not module.ready:
                raise CalibrationError(
                    "no batch has reached this layer, so it has no range",
                    where=module.layer,
                    hint="train it, run qfx.calibrate(prepared, data), or leave the layer float with Recipe.skip",
                )
        update_graph(gm, stage=Stage.CALIBRATED.name)
    if _fingerprints(prepared) == plan.fingerprints:
        warnings.warn(
            UntrainedWarning(
                "no optimizer has changed a weight since qfx.prepare: this is post-training quantization. "
                "Train the prepared model first, or call qfx.quantize."
            ),
            stacklevel=3,
        )


def _float_parts(regions: Regions) -> tuple[str, ...]:
    """What stays Python code around the graphs, and why."""
    if not regions.stopped_by:
        return ()
    return (regions.stopped_by, *(f"{path}: {reason}" for path, reason in regions.skipped.items()))


def keep_rows(prepared: nn.Module, rows: int) -> None:
    """Let calibration keep the first rows of its data, for what is measured on them."""
    setattr(prepared, _PLAN, dataclasses.replace(_plan(prepared), kept_rows=rows))


def measure_noise_by(prepared: nn.Module, measure: Measure) -> None:
    """Let conversion measure noise by ``measure``, which may look at the values meanwhile."""
    setattr(prepared, _PLAN, dataclasses.replace(_plan(prepared), measure=measure))


def _check_whole(plan: _Plan) -> None:
    """Refuse to search where capture had to stop at parts: scores at the outputs of each do not compare."""
    if plan.float_parts:
        raise ConfigError(
            f"a search of bit widths needs a model captured whole; here capture stopped: {plan.float_parts[0]}",
            hint="quantize with a recipe that gives the bits, or change the line that stops capture",
        )


def _device(model: nn.Module) -> str:
    """The type of device that the model's tensors are on."""
    tensors = (t for t in (*model.parameters(), *model.buffers())) if isinstance(model, nn.Module) else ()
    return next((t.device.type for t in tensors if not t.is_meta), "cpu")


def _bound(pipeline: Pipeline, recipe: Recipe | AutoRecipe, target: Target) -> Pipeline:
    """The pipeline with every pass that takes a recipe or a target given those of this call."""
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(
            f"pipeline is a {type(pipeline).__name__}", hint="edit qfx.Pipeline.default() and pass the result"
        )
    auto = isinstance(recipe, AutoRecipe)
    if auto != any(p.name == "allocate-bits" for p in pipeline):
        raise ConfigError(
            "the pipeline and the recipe do not fit: "
            + ("nothing in it finds bit widths" if auto else "it finds bit widths, the recipe gives them"),
            hint="start from qfx.Pipeline.default(recipe) with the recipe of this call",
        )
    given = {"target": target, **({"auto": recipe, "recipe": recipe.base} if auto else {"recipe": recipe})}  # type: ignore[union-attr]

    def bind(p: Any) -> Any:
        wanted = {f.name for f in dataclasses.fields(p)} & given.keys() if dataclasses.is_dataclass(p) else set()
        return dataclasses.replace(p, **{name: given[name] for name in wanted}) if wanted else p

    return Pipeline(tuple(bind(p) for p in pipeline))


def _why_slow(target: Target) -> str | None:
    reason = target.slow()
    if reason:
        warnings.warn(TargetWarning(f"target {target.name}: {reason}"), stacklevel=4)
    return reason


def _plan(prepared: nn.Module) -> _Plan:
    plan = getattr(prepared, _PLAN, None)
    if not isinstance(plan, _Plan):
        done = kept_report(prepared) is not None
        raise ConfigError(
            f"{type(prepared).__name__} is " + ("quantized already" if done else "no model that qfx.prepare returned"),
            hint="call qfx.prepare(model, example_inputs) first",
        )
    return plan


def _release(model: nn.Module) -> None:
    """Let go of the float parameters: the captured graph holds the only reference. Tied ones stay tied."""
    empty = {
        p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = empty[parameter]


def _convert(prepared: nn.Module, *, foreign: frozenset[int], verbose: bool, check: bool = False) -> nn.Module:
    """Convert in place; memory in ``foreign`` belongs to a model that lives on: what stays float is copied from it."""
    plan = _plan(prepared)
    parts = graphs(prepared)
    for path, gm in parts.items():
        if stage_of(gm) is not Stage.CALIBRATED:
            what = f"the model is {stage_of(gm).name}, not CALIBRATED"
            raise CalibrationError(what, where=path, hint="run qfx.calibrate(prepared, data)")
    if plan.auto is not None and plan.auto.metric is not None:
        return _controlled(prepared, plan, plan.auto, foreign=foreign, verbose=verbose, check=check)
    with undisturbed():
        calls = _calls(prepared, parts, _fitted(plan.last_call or plan.example, plan, prepared))
        reports = [_convert_graph(gm, inputs, plan, foreign, check) for gm, inputs in calls]
    freeze(prepared, foreign)
    for gm in parts.values():
        keep_calls(gm, ())
    delattr(prepared, _PLAN)
    whole = _joined(reports, plan, prepared)
    keep_report(prepared, whole)
    if verbose:
        print(whole)
    return prepared


def _controlled(
    prepared: nn.Module, plan: _Plan, auto: AutoRecipe, *, foreign: frozenset[int], verbose: bool, check: bool
) -> nn.Module:
    """Convert by the allocation with which the user's metric holds."""
    ((_, gm),) = graphs(prepared).items()
    for p in plan.behind:
        if p.name.startswith("measure-"):
            run_pass(p, gm)
    measured = graph_info(gm).sensitivity
    assert auto.metric is not None and auto.max_drop is not None and measured is not None
    metric = auto.metric
    kept = [t for inputs, _ in kept_calls(gm) for t in inputs]
    shared = {id(t): t for t in (*prepared.parameters(), *prepared.buffers())}
    untold = dataclasses.replace(plan, auto=auto.without_control())

    def converted(allocation: Allocation, *, verbose: bool = False, check: bool = False) -> nn.Module:
        twin = copy.deepcopy(prepared, {**shared, id(plan): untold})
        ((_, graph),) = graphs(twin).items()
        update_graph(graph, allocation=allocation)
        return _convert(twin, foreign=foreign | storages(prepared), verbose=verbose, check=check)

    def evaluate(allocation: Allocation | None) -> Any:
        model = prepared if allocation is None else converted(allocation)
        with torch.no_grad(), undisturbed():
            return metric(model)

    start = allocate_bits(measured, auto.budget, pin=auto.pin_first_last, allow_float=auto.allow_float)
    named = getattr(metric, "__qualname__", type(metric).__qualname__)
    asked = f"{auto.without_control()!r} {named}"
    key = content_of(gm, kept) + graph_info(gm).target + re.sub(" at 0x[0-9a-f]+", "", asked)  # another run's addresses
    trials = Trials(hashlib.sha256(key.encode()).hexdigest(), Path(auto.state) if auto.state is not None else None)
    outcome = control(start, evaluate, trials, max_drop=auto.max_drop, time_budget=auto.time_budget)
    add_notes(gm, "accuracy", [str(outcome)])
    return converted(outcome.allocation, verbose=verbose, check=check)


def _fitted(call: Example, plan: _Plan, model: nn.Module) -> Example:
    """The call on the device that the model was moved to since it was prepared.

    Raises:
        ConfigError: its dtype has changed, which the graph was made for.
    """
    now = _placement(model)
    if now is None or plan.placement is None or now == plan.placement:
        return call
    (device, dtype), (_, before) = now, plan.placement
    if dtype != before:
        raise ConfigError(
            f"the model was prepared in {before} and is in {dtype} now",
            hint=f"convert it where it was prepared: prepared.to({before})",
        )
    return Example(*tree_map_only(Tensor, lambda t: t.to(device), (call.args, dict(call.kwargs))))


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of the model's first floating-point weight."""
    weights = ((name, p) for name, p in model.named_parameters() if "fake_quant." not in name)
    return next(((p.device, p.dtype) for _, p in weights if p.is_floating_point()), None)


def _calls(
    model: nn.Module, parts: Mapping[str, fx.GraphModule], call: Example
) -> list[tuple[fx.GraphModule, tuple[Tensor, ...]]]:
    """Every graph with the flat inputs that it gets in ``call`` of the whole model."""
    if list(parts) == [""]:
        return [(parts[""], flat_inputs(parts[""], call.args, dict(call.kwargs)))]
    seen: dict[str, tuple[fx.GraphModule, tuple[Tensor, ...]]] = {}

    def note(path: str, gm: fx.GraphModule) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(path, (gm, flat_inputs(gm, args, kwargs)))

        return gm.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    hooks = [note(path, gm) for path, gm in parts.items()]
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.values())


def _convert_graph(
    gm: fx.GraphModule, inputs: tuple[Tensor, ...], plan: _Plan, foreign: frozenset[int], check: bool
) -> Report:
    restore_values(gm, inputs)
    inputs = few_rows(gm, inputs, _ROWS)
    first, behind = plan.behind.split(Stage.CALIBRATED)
    live = agreement.record(gm, inputs) if check and plan.mode == "qat" else None
    first.run(gm)
    settled = agreement.record(gm, inputs, live) if check else None
    rows = rows_before(gm)
    groups = len({info(n).group for n in gm.graph.nodes} - {""})
    noise = (plan.measure or measure)(gm, inputs)
    trim()
    hook = None if foreign else lambda *_: trim()  # give back layer by layer what nobody shares
    convert_, lower_ = behind.split(Stage.CONVERTED)
    convert_.run(gm, hook=hook)
    lower_beside(gm, lower_, plan.model, foreign=foreign, without=_PLAN, hook=hook)
    made = build_report(
        plan.model,
        rows,
        gm,
        noise.by_node,
        nodes_before=plan.nodes_before,
        share_groups=groups,
        weight_bytes_before=plan.weight_bytes,
    )
    if settled is not None:
        trained = agreement.settled_agreement(live, settled) if live is not None else ()
        found = (*trained, *agreement.lowered_agreement(settled, gm, inputs))
        agreement.require(found)
        made = dataclasses.replace(made, agreement=found)
    with torch.no_grad():
        outputs = fx.Interpreter(gm).run(*inputs, enable_io_processing=False)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    made = as_it_runs(made, gm)  # behind the first run, which compiles
    made = dataclasses.replace(made, output_sqnr_db=_worst(noise.outputs, outputs), calibration=plan.calibration)
    if lower_ and isinstance(gm, CapturedModule):
        keep_report(portable(gm), before_lowering(made, rows, noise.by_node))
    return made


def _worst(reference: Iterable[Any], actual: Iterable[Any]) -> float | None:
    values = [
        sqnr_db(x, y)
        for x, y in zip(reference, actual, strict=True)
        if isinstance(x, Tensor) and x.is_floating_point()
    ]
    return min(values) if values else None


def _joined(reports: list[Report], plan: _Plan, model: nn.Module) -> Report:
    first = reports[0]
    if len(reports) == 1:
        return dataclasses.replace(first, weight_bytes_after=tensor_bytes(model), float_parts=plan.float_parts)
    values = [r.output_sqnr_db for r in reports if r.output_sqnr_db is not None]
    return dataclasses.replace(
        first,
        rows=tuple(row for r in reports for row in r.rows),
        nodes_after=sum(r.nodes_after for r in reports),
        crossings=sum(r.crossings for r in reports),
        regions=sum(r.regions for r in reports),
        share_groups=sum(r.share_groups for r in reports),
        agreement=tuple(layer for r in reports for layer in r.agreement),
        weight_bytes_after=tensor_bytes(model),
        output_sqnr_db=min(values) if values else None,
        notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
        float_parts=plan.float_parts,
    )
