"""The front of the compiler: the user's module → a graph of ATen operators that is called like the module.

``torch.export`` (non-strict) does the tracing. Around it: a stand-in copy in eval mode (:mod:`qfx.shadow`), examples of
batch 1 grown to 2 so that the batch stays free, a ladder from every free size down to none, a graph without guards and
assertions (:mod:`qfx.exported`), call binding (:mod:`qfx.calling`), and a comparison with the model itself.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from traceback import FrameSummary, StackSummary
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qfx.calling import (
    CallBinder,
    CallCodeGen,
    CallForm,
    Parameter,
    TensorSpec,
    bind,
    codegen_of,
    parameters_of,
)
from qfx.carried import carry_over
from qfx.errors import CaptureError, QfxWarning
from qfx.examples import Example, as_example
from qfx.exported import graph_module_of
from qfx.graph_module import CapturedModule
from qfx.growth import batch_of, differences, resized, row_disagreement
from qfx.meta import add_notes, graph_info, update_graph, value
from qfx.origin import error_line, stack_line
from qfx.shadow import shadow_of, undisturbed
from qfx.shapes import Freedom, batch_freedom, explicit, no_freedom, token_freedom
from qfx.structure import Constant, Container, Leaf, Structure, flatten, opaque, paths, rebuild

log = logging.getLogger(__name__)

NOTES = "capture"
"""The topic of capture's notes in :attr:`qfx.meta.GraphInfo.notes`."""


class TrainingModeWarning(QfxWarning):
    """The model is in training mode; it is captured as it behaves in eval mode."""


class FixedSizeWarning(QfxWarning):
    """The captured graph runs only at the example's batch size."""


def capture(model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None) -> fx.GraphModule:
    """The model's graph of ATen operators, in eval mode, called exactly like the model.

    Weights are shared with the model, not copied. Free are dimension 0 of every tensor and all dimensions of integer
    and boolean tensors, as far as the model allows; what had to be fixed, and why, is in
    ``qfx.meta.graph_info(gm).notes`` under ``"capture"``.

    Args:
        model: the float model; it is left bit-identical.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        dynamic_shapes: which sizes are free, in the format of ``torch.export.export``, instead of the above.

    Raises:
        CaptureError: the model, the example or the two together cannot be captured; the text names the user's line.
        ConfigError: ``dynamic_shapes`` names an argument that the model has not.
    """
    model = original(model)
    check_model(model)
    with undisturbed():
        shadow, notes = shadow_of(model)
        subject = Subject.of(model, shadow, as_example(example_inputs))
        gm = capture_subject(subject, subject.ladder(dynamic_shapes), exactly=dynamic_shapes is not None)
    add_notes(gm, NOTES, notes)
    carry_over(shadow, gm)
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


@dataclass(frozen=True)
class Subject:
    """What is captured: the user's model, its stand-in, and one call of it."""

    model: nn.Module
    shadow: nn.Module
    parameters: tuple[Parameter, ...]
    form: CallForm
    structure: Container
    tensors: tuple[Tensor, ...]
    path: str = ""

    @classmethod
    def of(cls, model: nn.Module, shadow: nn.Module, example: Example, path: str = "") -> Subject:
        """Bind the example to the model's signature; ``path`` is where a child stands in the user's whole model.

        Raises:
            CaptureError: wrong arity, or a tensor without values.
        """
        parameters = parameters_of(model)
        bound = bind(type(model).__name__, parameters, example.args, example.kwargs)
        leaves, structure = flatten(bound)
        assert isinstance(structure, Container)
        for at, part in arguments(structure):
            if isinstance(part, Leaf) and (not isinstance(leaves[part.index], Tensor) or _is_empty(leaves[part.index])):
                raise CaptureError(f"example input {at} has no values", hint="give an ordinary tensor")
        for name, child in zip(structure.keys, structure.children, strict=True):
            if found := opaque(child, str(name)):
                _refuse_default(parameters, *found)
        if not leaves:
            raise CaptureError("example_inputs holds no tensor", hint="give at least one tensor")
        form = CallForm.of(example.args, example.kwargs)
        return cls(model, shadow, parameters, form, structure, _distinct(leaves), path)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def ladder(self, dynamic_shapes: Any = None) -> tuple[Freedom, ...]:
        """Which sizes to leave free, from the most to the least; only what the user asked for, where something is."""
        if dynamic_shapes is not None:
            return (explicit(self.parameters, self.structure, dynamic_shapes, self.tensors),)
        steps = (token_freedom(self.tensors), batch_freedom(self.tensors), no_freedom(self.tensors))
        return tuple(step for i, step in enumerate(steps) if step not in steps[:i])

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call the stand-in; it gets copies of the tensors, for it may write to them."""
        args, kwargs = self.form.call(self.parameters, rebuild(self.structure, [t.clone() for t in tensors]))
        state = torch.get_rng_state()
        try:
            return self.shadow(*args, **kwargs)
        finally:
            torch.set_rng_state(state)


def arguments(structure: Container) -> list[tuple[str, Leaf | Constant]]:
    """The leaves and constants of bound parameters with the path that the user knows: ``x``, ``batch['image']``."""
    return [
        found
        for name, child in zip(structure.keys, structure.children, strict=True)
        for found in paths(child, str(name))
    ]


def _refuse_default(parameters: Sequence[Parameter], at: str, value: Any) -> None:
    """An object as argument is refused, unless it is merely the parameter's default."""
    if not any(p.name == at and p.has_default and p.default is value for p in parameters):
        raise CaptureError(
            f"argument {at} is a {type(value).__name__}, which a graph cannot take",
            hint="give tensors, numbers, strings, None, or containers and dataclasses of them",
        )


def _distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of tensors that come twice, which ``torch.export`` would take for one, and of those of inference mode."""
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return tuple(t if first[id(t)] == i and not t.is_inference() else t.clone() for i, t in enumerate(tensors))


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


class _Flat(nn.Module):
    """The stand-in behind a signature of flat tensors; ``keep`` is told the structure of what it returns."""

    def __init__(self, subject: Subject, keep: Callable[[Structure], None]) -> None:
        super().__init__()
        self.model = subject.shadow
        self.subject = subject
        self.keep = keep
        self.training = False

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        subject = self.subject
        args, kwargs = subject.form.call(subject.parameters, rebuild(subject.structure, leaves))
        flat, structure = flatten(self.model(*args, **kwargs))
        if found := opaque(structure, "its result"):
            raise CaptureError(f"{found[0]} is a {type(found[1]).__name__}, which a graph cannot return")
        self.keep(structure)
        return tuple(flat)


class UncapturableError(CaptureError):
    """The model cannot become one graph; parts of it may (:func:`qfx.regions.capture_regions`)."""


class DataDependentError(UncapturableError):
    """Python code of the model decides by the values of tensors; no choice of free sizes helps."""


@dataclass(frozen=True)
class Sizes:
    """The example at the size to trace at, and both sizes with the model's own results to compare with.

    ``fixed`` says why the batch must stay as given; ``""`` where it may be free.
    """

    traced: tuple[Tensor, ...]
    compared: tuple[tuple[tuple[Tensor, ...], list[Any]], ...]
    fixed: str = ""


class FixedBatchError(UncapturableError):
    """The model's own code makes the batch size a constant."""


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
            f"{subject.name} itself fails on example_inputs: {_short(error)}",
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
        reason = f"the model itself fails at batch {batch_of(other)}: {_short(error)}"
    else:
        single, several = (given, results) if grown else (results, given)
        reason = row_disagreement(single, several)
        if not reason:
            both = ((subject.tensors, given), (other, results))
            return Sizes(other if grown else subject.tensors, both)
    return Sizes(subject.tensors, ((subject.tensors, given),), reason if grown else "")


def attempt(subject: Subject, freedom: Freedom, sizes: Sizes) -> CapturedModule:
    """Export with these sizes free, rebuild, and compare with the model itself.

    Raises:
        CaptureError: the export is refused, or what came of it is not what the model does.
    """
    results: list[Structure] = []
    program = _export(_Flat(subject, results.append), sizes.traced, freedom, subject.name)
    names = [at for at, part in arguments(subject.structure) if isinstance(part, Leaf)]
    gm = graph_module_of(program, subject.model, "model", [_identifier(n) for n in names], subject.path)
    specs = _tensor_specs(gm, names)
    fixed = [i for i, dims in enumerate(freedom) if 0 in dims and isinstance(specs[i].sizes[0], int)]
    grown = [i for i in fixed if subject.tensors[i].shape[0] != sizes.traced[i].shape[0]]
    if grown:
        raise FixedBatchError(f"the model's code makes the batch size a constant{_where_fixed(gm, grown[0], 0)}")
    binder = CallBinder(subject.name, subject.parameters, subject.structure, specs, _limits(program), subject.path)
    gm.graph.set_codegen(CallCodeGen(binder, results[-1]))
    gm.recompile()
    update_graph(gm, stage="CAPTURED")
    for tensors, want in sizes.compared[:1] if fixed else sizes.compared:
        _compare(gm, subject, tensors, want)
    return gm


def _export(flat: nn.Module, tensors: tuple[Tensor, ...], freedom: Freedom, name: str) -> ExportedProgram:
    try:
        with _quiet():
            return torch.export.export(flat, tensors, dynamic_shapes={"leaves": tuple(freedom)}, strict=False)
    except Exception as error:
        kind = DataDependentError if _is_data_dependent(error) else UncapturableError
        raise kind(
            f"{name} cannot be exported: {_short(error)}",
            source=error_line(error),
            hint="make this line independent of the values of tensors, or quantize the modules around it one by one",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch prints the graph that it could not finish and logs advice; an error of ours says it instead.

    It also warns of tensors that the model keeps as attributes, as every ``nn.LSTM`` does: a graph keeps none.
    """
    printed = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export._trace")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if printed.getvalue():
            log.debug("printed during export:\n%s", printed.getvalue())


_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


def _is_data_dependent(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _DATA_DEPENDENT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(error: BaseException) -> str:
    """The error's class and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _identifier(path: str) -> str:
    """``batch['image']`` → ``batch_image``."""
    return re.sub(r"\W+", "_", path).strip("_")


def _tensor_specs(gm: fx.GraphModule, names: Sequence[str]) -> tuple[TensorSpec, ...]:
    values = [value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    return tuple(
        TensorSpec(name, val.dtype, tuple(_size(s) for s in val.shape)) for name, val in zip(names, values, strict=True)
    )


def _size(size: int | torch.SymInt) -> int | str:
    """A number where the trace fixed it (a symbol that turned out to be one, too), else the symbol's name."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else str(size.node.expr)


def _limits(program: ExportedProgram) -> dict[str, int]:
    """The greatest size of each symbol that has one."""
    uppers = {str(symbol): bounds.upper for symbol, bounds in program.range_constraints.items()}
    return {name: int(upper) for name, upper in uppers.items() if upper.is_Integer}


def _compare(gm: CapturedModule, subject: Subject, tensors: Sequence[Tensor], want: list[Any]) -> None:
    if any(_is_random(n) for n in gm.graph.nodes):
        return
    args, kwargs = subject.form.call(subject.parameters, rebuild(subject.structure, [t.clone() for t in tensors]))
    try:
        text = differences(want, flatten(gm(*args, **kwargs))[0])
    except Exception as error:
        text = _short(error)
    if text:
        raise UncapturableError(
            f"the graph of {subject.name} is not what the model does at batch {batch_of(tensors)}: {text}",
            hint="give an example with the sizes, and the branches of Python code, that you need",
        )


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


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
    return f"the model's code makes it a constant{_where_fixed(gm, tensor, dim)}"


def _where_fixed(gm: fx.GraphModule, tensor: int, dim: int) -> str:
    """`` at file:line`` of the user's code that made a size a constant, where torch's guards tell it."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    val = value(placeholders[tensor])
    size, shape_env = val.shape[dim], val.fake_mode.shape_env
    if isinstance(size, int) or shape_env is None:
        return ""
    symbol = size.node._expr
    for guard in shape_env.guards:
        frame = guard.sloc.framework_loc
        if symbol in guard.expr.free_symbols and isinstance(frame, FrameSummary):
            line = stack_line(StackSummary.from_list([frame]))
            return f" at {line}" if line else ""
    return ""
