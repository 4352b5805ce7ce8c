"""Where a model cannot become one graph: the largest of its children that can, inside a copy of the user's module.

The model is run on the example, and every call of every child is recorded with its inputs. Then children are tried, the
largest first; one that cannot be exported gives way to its own children. What remains stays the user's Python code.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from qfx.attempt import Sizes, UncapturableError, attempt
from qfx.calling import codegen_of
from qfx.calls import Call, Usage, record, usage
from qfx.capture import NOTES, capture, original, warn_of_training
from qfx.carried import carry_over
from qfx.errors import CaptureError
from qfx.examples import Example, as_example
from qfx.graph_module import CapturedModule
from qfx.growth import differences
from qfx.meta import add_notes
from qfx.shadow import shadow_of, train_flags, trainable_copy, undisturbed
from qfx.structure import flatten
from qfx.subject import Subject

log = logging.getLogger(__name__)

TRIES = 25


@dataclass(frozen=True)
class Regions:
    """A copy of the user's module, in eval mode, with graphs in the place of some of its children.

    Where the whole model is one graph, that is ``model``, and its path is ``""``. Else ``stopped_by`` says what kept it
    from becoming one, with the user's source line, and ``skipped`` why a child stays Python code, by path.
    """

    model: nn.Module
    graphs: Mapping[str, fx.GraphModule]
    stopped_by: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


def capture_regions(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_shapes: Any = None,
    training: bool = False,
    tries: int = TRIES,
) -> Regions:
    """Capture the whole of ``model`` or, where that cannot be done, the largest of its children that can be captured.

    Args:
        model: the float model; it is left bit-identical.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        dynamic_shapes: as for :func:`qfx.capture.capture`; children are as free as the model's own runs show.
        training: as for :func:`qfx.capture.capture`; the Python code around graphs gets parameters of its own, too.
        tries: how many children are exported at most.

    Raises:
        CaptureError: nothing can be captured; it tells the source line that stopped the whole.
        ConfigError: ``dynamic_shapes`` names an argument that the model has not.
    """
    try:
        whole = capture(model, example_inputs, dynamic_shapes=dynamic_shapes, training=training)
    except UncapturableError as error:
        whole_model = trainable_copy(original(model)) if training else original(model)
        return _parts(whole_model, as_example(example_inputs), error, tries, training)
    return Regions(whole, {"": whole})


def _parts(model: nn.Module, example: Example, stop: UncapturableError, tries: int, training: bool) -> Regions:
    with undisturbed():
        scratch, notes = shadow_of(model)
        flags = train_flags(model, scratch) if training else None
        subject = Subject.of(model, scratch, example, flags=flags)
        search = _Search(subject, record(subject), tries)
        search.run()
    if not search.graphs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(search.skipped.items())[:3])
        raise CaptureError(
            f"nothing of {type(model).__name__} can be captured: {stop.what}" + (f" ({reasons})" if reasons else ""),
            source=stop.source,
            hint=stop.hint,
        ) from stop
    result = model.eval() if training else shadow_of(model)[0]
    graphs = {path: search.graphs[path] for path, _ in model.named_modules() if path in search.graphs}
    for path, graph in graphs.items():
        replace(result, result.get_submodule(path), graph)
        add_notes(graph, NOTES, notes)
    if not training:
        warn_of_training(model)
    return Regions(result, graphs, f"{stop.source}: {stop.what}".removeprefix(": "), search.skipped)


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``root`` holds ``old``."""
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


class _Search:
    """Tries children by the size of their weights, the largest first; one that is refused gives way to its own.

    Graphs are tried out in the scratch copy that ``whole`` runs on.
    """

    def __init__(self, whole: Subject, calls: Mapping[str, list[Call]], tries: int) -> None:
        self.whole, self.calls, self.tries = whole, calls, tries
        self.expected = flatten(whole.run(whole.tensors))[0]
        self.graphs: dict[str, CapturedModule] = {}
        self.skipped: dict[str, str] = {}
        self.refused: set[type[nn.Module]] = set()
        self.heap: list[tuple[int, str]] = []

    def run(self) -> None:
        self._descend("")
        while self.heap:
            _, path = heapq.heappop(self.heap)
            try:
                reason = self._capture(path)
            except CaptureError as error:
                reason = f"{error.source}: {error.what}".removeprefix(": ")
            if reason and path in self.calls:  # a ModuleList is never called, and is no loss
                log.debug("%s stays Python code: %s", path, reason)
                self.skipped[path] = reason
            if reason:
                self._descend(path)

    def _descend(self, path: str) -> None:
        for name, child in self.whole.model.get_submodule(path).named_children():
            if weight := _weight(child):
                heapq.heappush(self.heap, (-weight, f"{path}.{name}" if path else name))

    def _capture(self, path: str) -> str:
        """Put a graph in the place of the child at ``path``; returns the reason where it must not stay there."""
        child, shadow = self.whole.model.get_submodule(path), self.whole.shadow.get_submodule(path)
        if type(child) in self.refused:
            return f"another {type(child).__name__} was refused"
        used = usage(self.calls.get(path, ()), child, shadow, path, self.whole.flags)
        if isinstance(used, str):
            return used
        if self.tries == 0:
            return "the limit of exports is reached"
        self.tries -= 1
        try:
            graph = _graph(used)
        except UncapturableError:
            if not type(child).__module__.startswith("torch."):
                self.refused.add(type(child))
            raise
        carry_over(shadow, graph)
        self._try_out(shadow, graph)
        self.graphs[path] = graph
        return ""

    def _try_out(self, shadow: nn.Module, graph: CapturedModule) -> None:
        """Run the whole with the graph in its place, called and not looked into.

        Raises:
            CaptureError: it does not work so.
        """
        sealed = _Sealed(graph)
        replace(self.whole.shadow, shadow, sealed)
        try:
            text = differences(self.expected, flatten(self.whole.run(self.whole.tensors))[0])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        if text:
            replace(self.whole.shadow, sealed, shadow)
            raise CaptureError(f"the code around it does not work with a graph in its place: {text}")


class _Sealed(nn.Module):
    """A graph of which only its call and its plain attributes are seen, for integer layers have no float weights."""

    def __init__(self, graph: CapturedModule) -> None:
        super().__init__()
        self.graph = (graph,)  # in a tuple, so that it is no child
        self.plain = {k: v for k, v in vars(graph).items() if not k.startswith("_")}
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        plain = self.__dict__.get("plain", {})
        return plain[name] if name in plain else super().__getattr__(name)


def _weight(module: nn.Module) -> int:
    """How many weights a graph of ``module`` could hold as integers: those of matrices that are no look-up tables."""
    return sum(
        p.numel()
        for m in module.modules()
        if not isinstance(m, (nn.Embedding, nn.EmbeddingBag))
        for p in m.parameters(recurse=False)
        if p.dim() > 1
    )


def _graph(used: Usage) -> CapturedModule:
    """Export the traced call with free what varies, and compare with the child itself on the calls of every run.

    Raises:
        CaptureError: see :func:`qfx.attempt.attempt`; or a size that varies cannot be free.
    """
    compared = tuple((s.tensors, flatten(s.run(s.tensors))[0]) for s in used.of_runs)
    graph = attempt(used.traced, used.freedom, Sizes(used.traced.tensors, compared))
    for spec, dims in zip(codegen_of(graph).binder.tensors, used.freedom, strict=True):
        if fixed := [d for d in dims if not isinstance(spec.sizes[d], str)]:
            raise UncapturableError(f"dimension {fixed[0]} of {spec.path} varies, but its code makes it a constant")
    return graph
