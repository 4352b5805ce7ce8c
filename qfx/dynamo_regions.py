"""A region of the user's program: first float and observed, then quantized; float for good where that cannot be.

Dynamo compiles a graph; a :class:`Runner` is what it then calls. One compiled graph may serve several modules of the
same code, and one computation may be compiled several times, for other sizes. So a :class:`Region` is a compiled graph
with the weights that it is called with, and :class:`qfx.dynamo_ranges.Ranges` are those of all such regions of one
computation.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx import api
from qfx.calibration import seeing_batches, settle
from qfx.calling import codegen_of
from qfx.dynamo_graph import Received
from qfx.dynamo_names import compiled_model
from qfx.dynamo_outline import Outline
from qfx.dynamo_ranges import IN_VAIN, Ranges, State, state_of
from qfx.dynamo_settings import Settings
from qfx.errors import QfxError, UnsupportedError
from qfx.graph_module import CapturedModule
from qfx.kept_calls import KeptCalls
from qfx.meta import add_notes, info, keep_calls
from qfx.passes.annotate import written_in_place
from qfx.shadow import undisturbed

log = logging.getLogger("qfx.dynamo")

_CAPTURING = threading.RLock()  # torch keeps what it knows of the node that it traces in one place for all threads

Key = tuple[int, ...]
"""The identities of a region's parameters; of its buffers, where it has none."""

Pick = Callable[[Sequence[Any]], tuple[Any, ...]]

References = tuple[weakref.ref[Tensor], ...]


class Store:
    """What one backend knows: its settings, the ranges by weights, and what dynamo calls."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        self.ranges: dict[Key, list[Ranges]] = {}
        self.weights: dict[Key, References] = {}
        self.runners: list[weakref.ref[Runner]] = []
        self.told: set[str] = set()

    def ranges_of(
        self, key: Key, weights: Sequence[Tensor], outline: Outline, state: State, held: tuple[Tensor, ...]
    ) -> Ranges:
        """Those of an earlier compilation of the same computation; else new ones.

        A recipe that searches widths measures on calls that its graph was given: each graph has ranges of its own.
        """
        rows = self.settings.kept_rows
        with self.lock:
            if key not in self.ranges:
                self.weights[key] = _references(weights, self, key)
            known = self.ranges.setdefault(key, [])
            found = None if rows else next((r for r in known if outline.continues(r.outline)), None)
            if found is None:
                found = Ranges(outline, state, held, KeptCalls(rows))
                known.append(found)
            return found

    def forget(self, key: Key) -> None:
        """Let go of ranges: their weights are dead, and others may come to have these identities."""
        self.ranges.pop(key, None)
        self.weights.pop(key, None)

    def reset(self) -> None:
        """Let go of all ranges."""
        self.ranges.clear()
        self.weights.clear()

    def new_runner(self, received: Received, example_inputs: Sequence[Any]) -> Runner:
        """What dynamo shall call; it may let go of it at any time."""
        runner = Runner(received, self, [example_inputs[c.position] for c in received.constants])
        self.runners.append(weakref.ref(runner, self.runners.remove))
        return runner

    def parts(self) -> list[Runner | Region]:
        """The regions in the order of compilation; a runner that has none stands for itself."""
        runners = [runner for reference in self.runners if (runner := reference()) is not None]
        found: list[Runner | Region] = []
        for runner in runners:
            found += list(runner.regions.values()) or [runner]
        return found

    def tell(self, where: str, reason: str, level: int = logging.WARNING) -> None:
        """Log why a region stays float, the first time at ``level``."""
        text = f"the region at {where} stays float: {reason}"
        log.log(logging.DEBUG if text in self.told else level, text)
        self.told.add(text)


class _NothingError(UnsupportedError):
    """There is nothing to quantize, which is no loss."""


class Region:
    """One compiled graph with one set of weights; it is forgotten when one of ``weights`` dies."""

    def __init__(self, received: Received, others: Pick, store: Store, ranges: Ranges) -> None:
        self.received, self.others, self.store, self.ranges = received, others, store, ranges
        self.lock = threading.RLock()
        self.inputs = _pick([given.position for given in received.inputs])
        self.generation = ranges.generation
        self.prepared: CapturedModule | None = None
        self.quantized: nn.Module | None = None
        self.reason = ""
        self.weights: References = ()

    def __call__(self, tensors: tuple[Tensor, ...], state: State, args: tuple[Any, ...]) -> Any:
        """Args: the weights, their state, and all arguments of the graph, weights among them."""
        quantized = self._ready(state)
        if quantized is None and not self.reason:
            quantized = self._brought_on(tensors, state, args)
        if quantized is None:
            return self.received.gm(*args)
        try:
            return quantized(*self.inputs(args))
        except Exception as error:
            results = self.received.gm(*args)  # which fails likewise where it is the user's error
            self._stay_float(error)
            return results

    def _ready(self, state: State) -> nn.Module | None:
        """The quantized graph, where it was made of these weights."""
        current = self.generation == self.ranges.generation and state == self.ranges.state
        return self.quantized if current else None

    def _brought_on(self, tensors: tuple[Tensor, ...], state: State, args: tuple[Any, ...]) -> nn.Module | None:
        """Prepare, observe or convert by this call; returns what it shall be run by, or None for float."""
        try:
            with self.lock, self.ranges.lock, undisturbed():
                return self._step(tensors, state, self.inputs(args))
        except Exception as error:  # whatever it is, it is no error of the user's program
            self._stay_float(error)
            return None

    def _step(self, tensors: tuple[Tensor, ...], state: State, given: tuple[Tensor, ...]) -> nn.Module | None:
        if state != self.ranges.state:
            log.info("the region at %s has other weights: it is calibrated anew", self.received.where)
            self.ranges.begin_anew(state, self.others(tensors))
        if self.generation != self.ranges.generation:
            self.prepared = self.quantized = None
            self.generation = self.ranges.generation
        if self.quantized is not None:  # another thread was faster
            return self.quantized
        inputs = tuple(t.clone() if t.is_inference() else t for t in given)
        if self.prepared is None:
            self.prepared = self._prepare(tensors, inputs)
        observed = False
        if not self.ranges.done:
            observes = any(m.observer is not None for m in seeing_batches([self.prepared]))
            steps = self.store.settings.calibration_steps if observes else 0
            if observed := self.ranges.seen < steps:
                self.ranges.observe(self.prepared, inputs)
            if self.ranges.seen < steps:
                return None
            self.ranges.finish(self.prepared)
        self.quantized = self._converted(self.prepared)
        self.prepared = None
        return None if observed else self.quantized

    def _prepare(self, tensors: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> CapturedModule:
        """The graph with the observers of ``ranges``.

        Raises:
            QfxError: it cannot be captured, or shall not be quantized.
        """
        received, settings = self.received, self.store.settings
        if any(torch.is_autocast_enabled(kind) for kind in {t.device.type for t in (*tensors, *inputs)}):
            raise UnsupportedError("it runs under torch.autocast, which chooses dtypes of its own")
        with _CAPTURING:
            made = api.prepare(
                received.module(tensors, compiled_model()),
                tuple(t.clone() for t in inputs),  # the user may write to the tensors themselves
                recipe=settings.recipe,
                target=settings.target,
                pipeline=settings.pipeline(),
                dynamic_shapes=received.dynamic_shapes(),
            )
        assert isinstance(made, CapturedModule)  # parts of a region are no modules that could be captured alone
        _check(made, received)
        if not self.ranges.share_with(made):
            log.debug("the region at %s rounds elsewhere than at its first sizes", received.where)
            self.ranges = Ranges(received.outline, self.ranges.state, self.ranges.held, KeptCalls(settings.kept_rows))
            self.generation = self.ranges.generation
            self.ranges.share_with(made)
        return made

    def _converted(self, prepared: CapturedModule) -> nn.Module:
        settle(prepared)
        keep_calls(prepared, tuple(self.ranges.kept.calls.get("", ())))
        if self.ranges.seen:
            note = f"ranges come from {self.ranges.seen} calls with {self.ranges.samples} samples in all"
            add_notes(prepared, "calibration", [note])
        made = api.convert(prepared)
        log.info("the region at %s is quantized", self.received.where)
        return made

    def _stay_float(self, error: Exception) -> None:
        what = error.what if isinstance(error, QfxError) else f"{type(error).__name__}: {error}"
        self.reason = what + (f" [layer {error.where}]" if isinstance(error, QfxError) and error.where else "")
        self.prepared = self.quantized = None
        level = logging.INFO if isinstance(error, _NothingError) else logging.WARNING
        self.store.tell(self.received.where, self.reason, level)
        log.debug("the reason in full", exc_info=error)


def _check(gm: fx.GraphModule, received: Received) -> None:
    """Refuse a graph without integers, one that writes to what it is given, and one that fixes a size that varies."""
    if not any(info(n).quantized for n in gm.graph.nodes):
        raise _NothingError("nothing in it is quantized")
    if outside := [n for n in written_in_place(gm) if n.op in ("placeholder", "get_attr")]:
        raise UnsupportedError(f"it writes to {outside[0].target}")
    for spec, given in zip(codegen_of(gm).binder.tensors, received.inputs, strict=True):
        if fixed := [d for d in sorted(given.free) if isinstance(spec.sizes[d], int)]:
            raise UnsupportedError(f"dimension {fixed[0]} of {spec.path} varies, but its code makes it a constant")


# --- what dynamo calls ------------------------------------------------------------------------------------------------


class Runner:
    """What dynamo calls in place of a graph: finds the region of the weights that it is called with.

    Parameters tell regions apart, where there are any; what else belongs to modules may be exchanged in a region.
    ``weights`` refers to those that it was compiled with.
    """

    def __init__(self, received: Received, store: Store, weights: Sequence[Tensor]) -> None:
        self.received, self.store = received, store
        self.weights = tuple(weakref.ref(t) for t in weights)
        self.reason = received.float_
        self.regions: dict[Key, Region] = {}
        self.lost = 0
        constants = received.constants
        key = [i for i, c in enumerate(constants) if c.is_parameter] or list(range(len(constants)))
        self._constants = _pick([c.position for c in constants])
        self._key = _pick(key)
        self._others = _pick([i for i in range(len(constants)) if i not in set(key)])
        if self.reason:
            store.tell(received.where, self.reason)

    def __call__(self, *args: Any) -> Any:
        if self.reason:
            return self.received.gm(*args)
        tensors = self._constants(args)
        state = state_of(tensors)
        key = self._key(state[0])
        region = self.regions.get(key) or self._new_region(key, tensors, state)
        return region(tensors, state, args)

    def _new_region(self, key: Key, tensors: tuple[Tensor, ...], state: State) -> Region:
        weights = self._key(tensors)
        ranges = self.store.ranges_of(key, weights, self.received.outline, state, self._others(tensors))
        region = self.regions.setdefault(key, Region(self.received, self._others, self.store, ranges))
        region.weights = _references(weights, self, key)
        return region

    def forget(self, key: Key) -> None:
        """Let go of a region, whose weights are dead. Where that goes on, every call comes with others."""
        region = self.regions.pop(key, None)
        if region is None or region.reason:
            return
        self.lost = 0 if region.quantized is not None else self.lost + 1
        if self.lost > IN_VAIN:
            self.reason = "it is called with other weights again and again"
            self.store.tell(self.received.where, self.reason)


def _references(weights: Sequence[Tensor], keeper: Store | Runner, key: Key) -> References:
    """References to weights that let ``keeper`` forget ``key`` when one of them dies."""
    kept_by = weakref.ref(keeper)

    def died(_: weakref.ref[Tensor]) -> None:
        if (alive := kept_by()) is not None:
            alive.forget(key)

    return tuple(weakref.ref(t, died) for t in weights)


def _pick(positions: Sequence[int]) -> Pick:
    """Those of a sequence at the positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: tuple(items[i] for i in positions)
