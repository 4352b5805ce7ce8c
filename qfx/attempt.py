"""One export: a call of the model at chosen free sizes → a graph that is compared with the model itself."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from traceback import FrameSummary, StackSummary
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram

from qfx.calling import CallBinder, CallCodeGen, TensorSpec
from qfx.errors import CaptureError
from qfx.eval_form import to_eval_form
from qfx.exported import graph_module_of
from qfx.graph_module import CapturedModule
from qfx.growth import batch_of, differences
from qfx.meta import update_graph, value
from qfx.origin import error_line, stack_line
from qfx.shadow import switched
from qfx.shapes import Freedom
from qfx.structure import Leaf, Structure, flatten, opaque, rebuild
from qfx.subject import Subject, arguments

log = logging.getLogger(__name__)


class UncapturableError(CaptureError):
    """The model cannot become one graph; parts of it may (:func:`qfx.regions.capture_regions`)."""


class DataDependentError(UncapturableError):
    """Python code of the model decides by the values of tensors; no choice of free sizes helps."""


class FixedBatchError(UncapturableError):
    """The model's own code makes the batch size a constant."""


@dataclass(frozen=True)
class Sizes:
    """The example at the size to trace at, and both sizes with the model's own results to compare with.

    ``fixed`` says why the batch must stay as given; ``""`` where it may be free.
    """

    traced: tuple[Tensor, ...]
    compared: tuple[tuple[tuple[Tensor, ...], list[Any]], ...]
    fixed: str = ""


def attempt(subject: Subject, freedom: Freedom, sizes: Sizes) -> CapturedModule:
    """Export with these sizes free, rebuild, and compare with the model itself.

    Raises:
        CaptureError: the export is refused, or what came of it is not what the model does.
    """
    results: list[Structure] = []
    with _training(subject.flags) if subject.flags else nullcontext():
        program = _export(_Flat(subject, results.append), sizes.traced, freedom, subject.name)
    names = [at for at, part in arguments(subject.structure) if isinstance(part, Leaf)]
    gm = graph_module_of(
        program, subject.model, "model", [_identifier(n) for n in names], subject.path, training=subject.training
    )
    if subject.training:
        to_eval_form(gm, subject.model)
    specs = _tensor_specs(gm, names)
    fixed = [i for i, dims in enumerate(freedom) if 0 in dims and isinstance(specs[i].sizes[0], int)]
    grown = [i for i in fixed if subject.tensors[i].shape[0] != sizes.traced[i].shape[0]]
    if grown:
        raise FixedBatchError(f"the model's code makes the batch size a constant{where_fixed(gm, grown[0], 0)}")
    binder = CallBinder(
        subject.name, subject.parameters, subject.structure, specs, _limits(program), subject.path, _examples(gm)
    )
    gm.graph.set_codegen(CallCodeGen(binder, results[-1]))
    gm.recompile()
    update_graph(gm, stage="CAPTURED")
    for tensors, want in sizes.compared[:1] if fixed else sizes.compared:
        _compare(gm, subject, tensors, want)
    return gm


@contextmanager
def _training(flags: Mapping[nn.Module, bool]) -> Iterator[None]:
    """In the modes of ``flags``, and with gradients, so that the trace shows where the model stops them."""
    with switched(flags), torch.enable_grad():
        yield


def _export(flat: nn.Module, tensors: tuple[Tensor, ...], freedom: Freedom, name: str) -> ExportedProgram:
    try:
        with _quiet():
            return torch.export.export(flat, tensors, dynamic_shapes={"leaves": tuple(freedom)}, strict=False)
    except Exception as error:
        kind = DataDependentError if _is_data_dependent(error) else UncapturableError
        raise kind(
            f"{name} cannot be exported: {short(error)}",
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


def _is_data_dependent(error: BaseException | None) -> bool:
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # here, since it brings all of sympy

    kinds = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or error.__context__
    return False


def short(error: BaseException) -> str:
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


def _examples(gm: fx.GraphModule) -> dict[str, int]:
    """The size of each symbol in the example."""
    sizes = [size for n in gm.graph.nodes if n.op == "placeholder" for size in value(n).shape]
    free = [size for size in sizes if isinstance(_size(size), str)]
    return {str(size.node.expr): int(size.node.hint) for size in free}


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
        text = short(error)
    if text:
        raise UncapturableError(
            f"the graph of {subject.name} is not what the model does at batch {batch_of(tensors)}: {text}",
            hint="give an example with the sizes, and the branches of Python code, that you need",
        )


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def where_fixed(gm: fx.GraphModule, tensor: int, dim: int) -> str:
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
