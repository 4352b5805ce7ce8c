"""What every child of a module is called with, seen by running the module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.hooks import RemovableHandle

from qfx.errors import CaptureError
from qfx.examples import Example
from qfx.growth import batch_of, resized
from qfx.shapes import Freedom
from qfx.structure import flatten
from qfx.subject import Subject


@dataclass(frozen=True)
class Call:
    """One call of a child. ``run`` numbers the run of the whole model, ``mutates`` says that the child wrote to it."""

    run: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mutates: bool = False


def record(subject: Subject) -> dict[str, list[Call]]:
    """The calls of every child of ``subject.shadow``, by path, in several runs.

    The first run is of the example as given. Others are of another batch size, of fewer tokens, and with masks changed,
    for some models pass ``None`` on where a mask hides nothing. One that the model fails on is left out.

    Raises:
        CaptureError: the model fails on the example itself.
    """
    calls: defaultdict[str, list[Call]] = defaultdict(list)
    for number, tensors in enumerate(_variants(subject)):
        found: defaultdict[str, list[Call]] = defaultdict(list)
        handles = [h for path, m in subject.shadow.named_modules() if path for h in _listen(path, m, number, found)]
        try:
            subject.run(tensors)
        except Exception as error:
            if number == 0:
                raise CaptureError(f"{subject.name} itself fails on example_inputs: {error}") from error
            continue
        finally:
            for handle in handles:
                handle.remove()
        for path, more in found.items():
            calls[path] += more
    return dict(calls)


def _variants(subject: Subject) -> list[Sequence[Tensor]]:
    given = subject.tensors
    other = resized(given) or given
    larger = max(given, other, key=batch_of)
    wanted = (given, other, [_shortened(t) for t in larger], [_masked(t) for t in larger])
    return [tensors for i, tensors in enumerate(wanted) if i == 0 or not _same(tensors, wanted[:i])]


def _same(tensors: Sequence[Tensor], others: Sequence[Sequence[Tensor]]) -> bool:
    return any(all(a is b for a, b in zip(tensors, other, strict=True)) for other in others)


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _shortened(tensor: Tensor) -> Tensor:
    """An integer or boolean tensor with one entry less in every dimension behind the batch that may be a length."""
    if _is_discrete(tensor):
        for dim in range(1, tensor.dim()):
            if tensor.shape[dim] > 2:
                tensor = tensor.narrow(dim, 0, tensor.shape[dim] - 1)
    return tensor


def _masked(tensor: Tensor) -> Tensor:
    """What may be a mask: with its last entry hidden where nothing is hidden, else with nothing hidden."""
    if (
        not _is_discrete(tensor)
        or tensor.dim() < 2
        or not tensor.numel()
        or not bool(((tensor == 0) | (tensor == 1)).all())
    ):
        return tensor
    changed = torch.ones_like(tensor)
    if bool(tensor.all()):
        changed.view(-1)[-1] = 0
    return changed


def _listen(path: str, module: nn.Module, run: int, found: dict[str, list[Call]]) -> tuple[RemovableHandle, ...]:
    entered: list[tuple[Call, list[int]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(run, tuple(args), dict(kwargs))
        entered.append((call, _versions(call)))

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, versions = entered.pop()
        found[path].append(Call(run, call.args, call.kwargs, versions != _versions(call)))

    return (
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after, with_kwargs=True),
    )


def _versions(call: Call) -> list[int]:
    """How often each tensor of the call was written to."""
    tensors, _ = flatten((call.args, dict(call.kwargs)))
    return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]


@dataclass(frozen=True)
class Usage:
    """How a child is used, over all its calls: the one to trace, one of every run, and which sizes vary."""

    traced: Subject
    of_runs: tuple[Subject, ...]
    freedom: Freedom


def usage(
    calls: Sequence[Call],
    child: nn.Module,
    shadow: nn.Module,
    path: str,
    flags: Mapping[nn.Module, bool] | None = None,
) -> Usage | str:
    """What one graph for all ``calls`` of ``child`` must be, or the reason why there is none.

    Raises:
        CaptureError: an argument is none that a graph can take.
    """
    if not calls:
        return "the example does not reach it"
    if any(call.mutates for call in calls):
        return "it writes to its inputs"
    subjects = [Subject.of(child, shadow, Example(call.args, call.kwargs), path, flags) for call in calls]
    if any(s.structure != subjects[0].structure for s in subjects):
        return "it is called with different structures or constants"
    if any(_kinds(s) != _kinds(subjects[0]) for s in subjects):
        return "it is called with different dtypes or ranks"
    shapes = [[tuple(t.shape) for t in s.tensors] for s in subjects]
    freedom = tuple(
        {d: Dim.AUTO for d in range(len(first)) if len({shape[i][d] for shape in shapes}) > 1}
        for i, first in enumerate(shapes[0])
    )
    traced = max(range(len(calls)), key=lambda k: (_smallest_free(shapes[k], freedom), -k))
    of_runs = {call.run: subject for call, subject in reversed(list(zip(calls, subjects, strict=True)))}
    return Usage(subjects[traced], tuple(of_runs[run] for run in sorted(of_runs)), freedom)


def _kinds(subject: Subject) -> list[tuple[torch.dtype, int]]:
    return [(t.dtype, t.dim()) for t in subject.tensors]


def _smallest_free(shapes: Sequence[tuple[int, ...]], freedom: Freedom) -> int:
    """``torch.export`` fixes sizes of 0 and 1: the call to trace is one whose varying sizes are all greater."""
    return min((shape[d] for shape, dims in zip(shapes, freedom, strict=True) for d in dims), default=0)
