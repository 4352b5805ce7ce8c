"""The front of the compiler: the user's module → a graph of ATen operators that is called like the module.

``torch.export`` (non-strict) does the tracing. Around it: a stand-in copy in eval mode (:mod:`qfx.shadow`), examples of
batch 1 grown to 2 so that the batch stays free, a ladder from every free size down to none, a graph without guards and
assertions (:mod:`qfx.exported`), call binding (:mod:`qfx.calling`), and a comparison with the model itself
(:mod:`qfx.attempt`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from qfx.attempt import DataDependentError, FixedBatchError, Sizes, UncapturableError, attempt, short, where_fixed
from qfx.calling import codegen_of
from qfx.carried import carry_over
from qfx.errors import CaptureError, QfxWarning
from qfx.examples import as_example
from qfx.graph_module import CapturedModule
from qfx.growth import batch_of, resized, row_disagreement
from qfx.meta import add_notes, graph_info
from qfx.origin import error_line
from qfx.shadow import shadow_of, train_flags, trainable_copy, undisturbed
from qfx.shapes import Freedom
from qfx.structure import flatten
from qfx.subject import Subject

log = logging.getLogger(__name__)

NOTES = "capture"
"""The topic of capture's notes in :attr:`qfx.meta.GraphInfo.notes`."""


class TrainingModeWarning(QfxWarning):
    """The model is in training mode; it is captured as it behaves in eval mode."""


class FixedSizeWarning(QfxWarning):
    """The captured graph runs only at the example's batch size."""


def capture(
    model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None, training: bool = False
) -> fx.GraphModule:
    """The model's graph of ATen operators, in eval mode, called exactly like the model.

    Weights are shared with the model, not copied. Free are dimension 0 of every tensor and all dimensions of integer
    and boolean tensors, as far as the model allows; what had to be fixed, and why, is in
    ``qfx.meta.graph_info(gm).notes`` under ``"capture"``.

    Args:
        model: the float model; it is left bit-identical.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        dynamic_shapes: which sizes are free, in the format of ``torch.export.export``, instead of the above.
        training: capture for training: the graph stands in eval form, has weights of its own, and its nodes are marked
            with what they do in training (:mod:`qfx.eval_form`). A model in training mode keeps what it holds in eval
            mode (frozen batch norms, say); of a model in eval mode everything trains.

    Raises:
        CaptureError: the model, the example or the two together cannot be captured; the text names the user's line.
        ConfigError: ``dynamic_shapes`` names an argument that the model has not.
    """
    model = original(model)
    check_model(model)
    model = trainable_copy(model) if training else model
    with undisturbed():
        shadow, notes = shadow_of(model)
        flags = train_flags(model, shadow) if training else None
        subject = Subject.of(model, shadow, as_example(example_inputs), flags=flags)
        gm = capture_subject(subject, subject.ladder(dynamic_shapes), exactly=dynamic_shapes is not None)
    add_notes(gm, NOTES, notes)
    carry_over(shadow, gm)
    if not training:
        warn_of_training(model)
    return gm


def is_captured(model: nn.Module) -> bool:
    """Whether ``model``, or a module in it, was made by qfx."""
    return any(graph_info(m).stage for m in model.modules())


def original(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped; any other module as it is."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod") if isinstance(model, nn.Module) else None
    return inner if isinstance(inner, nn.Module) else model


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, was captured already, or has no data.

    Raises:
        CaptureError: naming the layer.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}", hint="give a torch.nn.Module")
    for path, module in model.named_modules():
        if graph_info(module).stage:
            raise CaptureError(
                "the model is already captured or quantized by qfx", where=path, hint="give the float model"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device: it has no values", hint="load the weights first")
        if type(tensor).__name__ == "FakeTensor":
            raise CaptureError(
                f"{name} is a FakeTensor: it has no values", hint="build the model outside FakeTensorMode"
            )


def warn_of_training(model: nn.Module) -> None:
    """Warn where ``eval()`` was forgotten."""
    if training := [path for path, m in model.named_modules() if m.training]:
        who = "the model is" if "" in training else f"{training[0]!r} and {len(training) - 1} more modules are"
        warnings.warn(
            f"{who} in training mode; captured is what the model does in eval mode (forgotten eval()?)",
            TrainingModeWarning,
            stacklevel=3,
        )


def capture_subject(subject: Subject, ladder: Sequence[Freedom], *, exactly: bool = False) -> CapturedModule:
    """The graph of ``subject`` at the first step of ``ladder`` that exports and runs; to be called ``undisturbed``.

    Args:
        exactly: the user asked for these sizes: nothing else is tried.

    Raises:
        CaptureError: no step does; the error is that of the last.
    """
    given = _own_results(subject, subject.tensors)
    free = _sizes(subject, given)
    fixed = Sizes(subject.tensors, ((subject.tensors, given),))
    steps = [(f, free) for f in ladder if any(0 in dims for dims in f)]
    if free.fixed and exactly and steps:
        raise UncapturableError(f"the batch of {subject.name} cannot be free as dynamic_shapes asks: {free.fixed}")
    steps = [] if free.fixed else steps
    if not exactly or not steps:
        steps += [(f, fixed) for f in _without_batch(ladder)]
    why, refused = free.fixed, ""
    while True:
        freedom, sizes = steps.pop(0)
        try:
            gm = attempt(subject, freedom, sizes)
        except CaptureError as error:
            log.debug("%s is not captured with %s free: %s", subject.name, freedom, error)
            if isinstance(error, FixedBatchError):
                why, steps = error.what, [step for step in steps if step[1] is not free]
            if not steps or isinstance(error, DataDependentError):
                raise
            refused = refused or error.what
            continue
        _explain(gm, subject.tensors, ladder[0], why, refused)
        return gm


def _without_batch(ladder: Sequence[Freedom]) -> list[Freedom]:
    found = [tuple({d: size for d, size in dims.items() if d != 0} for dims in freedom) for freedom in ladder]
    return [freedom for i, freedom in enumerate(found) if freedom not in found[:i]]


def _own_results(subject: Subject, tensors: Sequence[Tensor]) -> list[Any]:
    """What the model itself returns, flat.

    Raises:
        CaptureError: it fails on the example.
    """
    try:
        return flatten(subject.run(tensors))[0]
    except Exception as error:
        raise CaptureError(
            f"{subject.name} itself fails on example_inputs: {short(error)}",
            source=error_line(error),
            hint="give example_inputs that the model accepts in eval mode",
        ) from error


def _sizes(subject: Subject, given: list[Any]) -> Sizes:
    """See whether the leading dimension is a batch, by the model's results for a row alone and for several."""
    other = resized(subject.tensors)
    if other is None:
        return Sizes(subject.tensors, ((subject.tensors, given),))
    grown = batch_of(subject.tensors) == 1
    try:
        results = flatten(subject.run(other))[0]
    except Exception as error:
        reason = f"the model itself fails at batch {batch_of(other)}: {short(error)}"
    else:
        single, several = (given, results) if grown else (results, given)
        reason = row_disagreement(single, several)
        if not reason:
            both = ((subject.tensors, given), (other, results))
            return Sizes(other if grown else subject.tensors, both)
    return Sizes(subject.tensors, ((subject.tensors, given),), reason if grown else "")


def _explain(gm: CapturedModule, given: Sequence[Tensor], wanted: Freedom, batch: str, refused: str) -> None:
    """Note every size that should have been free and is not, and why; warn of a fixed batch.

    Args:
        given: the example's tensors.
        wanted: what the first step asked for.
        batch: why the batch is fixed, where that is known.
        refused: what the export said to the first step, where it was refused.
    """
    notes: list[str] = []
    for i, (spec, dims) in enumerate(zip(codegen_of(gm).binder.tensors, wanted, strict=True)):
        for dim in dims:
            size = spec.sizes[dim]
            if isinstance(size, str):
                continue
            is_batch = dim == 0 and given[i].shape[0] == batch_of(given)
            why = (batch if is_batch else "") or refused or _why_fixed(gm, i, dim, size)
            notes.append(f"{spec.path}: dimension {dim} is fixed at {size}: {why}")
            if is_batch:
                warnings.warn(f"{notes[-1]}; the captured model runs at that size only", FixedSizeWarning, stacklevel=4)
    add_notes(gm, NOTES, notes)


def _why_fixed(gm: fx.GraphModule, tensor: int, dim: int, size: int) -> str:
    if size < 2:
        return "torch.export takes a size below 2 for a constant; give an example with a greater one"
    return f"the model's code makes it a constant{where_fixed(gm, tensor, dim)}"
