"""A part of a lowered graph that runs as one native program."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor, fx

from qfx import jit
from qfx.ops import dequantize, quantize
from qfx.targets.base import Leaf
from qfx.targets.lazy import runs_here
from qfx.targets.native.call import number_of
from qfx.targets.native.compiled import Compiled, build
from qfx.targets.native.float_twin import FloatTwin, Times, compare_times
from qfx.targets.native.isa import find
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.tuning import Tune, tune

_LOG = logging.getLogger(__name__)

MOST_PROGRAMS = 8
"""Sizes (beside the batch) that a region compiles for; it runs all further ones as the lowered graph does."""

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class NativeRegion(Leaf):
    """Runs ``graph``, a lowered graph of leaves, as one program, compiled when it is first called with new sizes.

    With ``tune``, each layer's kernel is found by measurement, and a region that loses against float runs in float:
    :attr:`times` tells both times. Where a program cannot be, ``graph`` itself runs: on other devices, under an
    exporter, and with what the generator declines (:attr:`declined` says why, by the sizes).
    """

    def __init__(self, graph: fx.GraphModule, isa: str | None = None, tune: Tune | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.isa, self.tune = isa, tune
        self.kernel = "native"
        rounds = any(node.target in (quantize, dequantize) for node in graph.graph.nodes)
        self.weight_only = not rounds and all(m.weight_only for m in graph.modules() if isinstance(m, Leaf))
        self.declined: dict[Key, str] = {}
        self.times: dict[Key, Times] = {}
        self._programs: dict[Key, Compiled] = {}
        self._floats: dict[Key, FloatTwin] = {}
        self._lock = threading.Lock()
        self.number = number_of(self)

    def forward(self, *inputs: Tensor) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            results = torch.ops.qfx.native_call(list(inputs), self.number)
            return tuple(results) if len(results) > 1 else results[0]
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if gradients or not all(runs_here(x) for x in inputs):
            return self.graph(*inputs)
        program = self.program(*inputs)
        if program is None:
            twin = self._floats.get(_key(inputs))
            return self.graph(*inputs) if twin is None else twin.run(*inputs)
        outputs = program(*(x.contiguous() for x in inputs))
        return outputs if len(outputs) > 1 else outputs[0]

    @property
    def programs(self) -> tuple[Compiled, ...]:
        """Those that were made so far."""
        return tuple(self._programs.values())

    def program(self, *inputs: Tensor) -> Compiled | None:
        """The program for inputs of such sizes, or None where ``graph`` has to run."""
        if not _one_batch(inputs):
            return None
        key = _key(inputs)
        return self._programs.get(key) or self._made(key, inputs)

    def _made(self, key: Key, inputs: tuple[Tensor, ...]) -> Compiled | None:
        with self._lock:
            if key in self._programs or key in self.declined:
                return self._programs.get(key)
            if len(self._programs) >= MOST_PROGRAMS:
                return None
            try:
                made = self._build(key, inputs)
            except NotNative as error:
                self.declined[key] = str(error)
                _LOG.info("a region runs as the lowered graph does: %s", error)
                return None
            if key in self._floats:
                return None
            self._programs[key] = made
            return made

    def _build(self, key: Key, inputs: tuple[Tensor, ...]) -> Compiled:
        """The program, tuned if that is asked for; and the float twin, where that is faster."""
        if (reason := jit.unavailable()) is not None:  # it was made where there was a compiler
            raise NotNative(reason)
        isa = find(self.isa)
        if self.tune is None:
            return build(self.graph, inputs, isa)
        made = build(self.graph, inputs, isa, choices=tune(self.graph, inputs, isa, self.tune))
        twin = FloatTwin(self.graph)
        self.times[key] = times = compare_times(made, twin, inputs)
        if times.float_ < times.native:
            self._floats[key] = twin
            self.declined[key] = f"it runs in float, which is faster: {times}"
        return made

    def _forget(self) -> None:
        self._programs, self._floats, self.declined, self.times = {}, {}, {}, {}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        made_here: dict[str, Any] = {"_programs": {}, "_floats": {}, "declined": {}, "times": {}, "_lock": None}
        return self.__dict__ | made_here

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self.number = number_of(self)


def _key(inputs: tuple[Tensor, ...]) -> Key:
    return tuple((tuple(x.shape[1:]), x.dtype) for x in inputs)


def _one_batch(inputs: tuple[Tensor, ...]) -> bool:
    """True where all inputs have as many samples: a program takes their number from the first."""
    return all(x.ndim > 0 and x.shape[0] == inputs[0].shape[0] for x in inputs)
