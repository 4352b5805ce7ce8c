"""A part of a lowered graph that runs as one native program."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qfx.ops import dequantize, quantize
from qfx.targets.base import Leaf
from qfx.targets.lazy import runs_here
from qfx.targets.native.call import number_of
from qfx.targets.native.choice import Tune
from qfx.targets.native.declined import Declined

if TYPE_CHECKING:
    from qfx.targets.native.compiled import Compiled

_LOG = logging.getLogger(__name__)

MOST_PROGRAMS = 8
"""Sizes (beside the batch) that a region compiles for; it runs all further ones as the lowered graph does."""

_MIXED = Declined("inputs have different numbers of samples")
_MANY = Declined(f"it has {MOST_PROGRAMS} programs, and these sizes are new")

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class NativeRegion(Leaf):
    """Runs ``graph``, a lowered graph of leaves, as one program, compiled when it is first called with new sizes.

    With ``tune``, each layer's kernel is found by measurement, and a region that loses against float runs in float.
    Where a program cannot be, ``graph`` itself runs: on other devices, and under an exporter. Where the generator
    declines some nodes, these run as in ``graph``, and what is around them in regions of their own. :attr:`declined`
    says why.
    """

    def __init__(self, graph: fx.GraphModule, isa: str | None = None, tune: Tune | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.isa, self.tune = isa, tune
        self.kernel = "native"
        rounds = any(node.target in (quantize, dequantize) for node in graph.graph.nodes)
        self.weight_only = not rounds and all(m.weight_only for m in graph.modules() if isinstance(m, Leaf))
        self._outcomes: dict[Key, Compiled | Declined] = {}
        self._passing: set[Declined] = set()  # for inputs that no key stands for
        self._lock = threading.Lock()
        self.number = number_of(self)

    def forward(self, *inputs: Tensor) -> Any:
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            results = torch.ops.qfx.native_call(list(inputs), self.number)
            return tuple(results) if len(results) > 1 else results[0]
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if gradients or not all(runs_here(x) for x in inputs):
            return self.graph(*inputs)
        outcome = self.outcome(*inputs)
        if isinstance(outcome, Declined):
            return (outcome.instead or self.graph)(*inputs)
        outputs = outcome(*(x.contiguous() for x in inputs))
        return outputs if len(outputs) > 1 else outputs[0]

    @property
    def outcomes(self) -> tuple[Compiled | Declined, ...]:
        """What runs for each of the sizes that it was called with so far, in their order."""
        return tuple(self._outcomes.values())

    @property
    def programs(self) -> tuple[Compiled, ...]:
        """Those that were made so far; also of its parts, where it was cut."""
        found: list[Compiled] = []
        for made in self.outcomes:
            found += [p for part in made.parts for p in part.programs] if isinstance(made, Declined) else [made]
        return tuple(found)

    @property
    def declined(self) -> tuple[str, ...]:
        """Why there was no program, for what was called so far; with both times, where float won. Also of its parts."""
        known: list[str] = []
        for made in (*self.outcomes, *self._passing):
            if isinstance(made, Declined):
                known += [made.reason, *(reason for part in made.parts for reason in part.declined)]
        return tuple(known)

    def program(self, *inputs: Tensor) -> Compiled | None:
        """The program for inputs of such sizes, or None where something else runs."""
        outcome = self.outcome(*inputs)
        return None if isinstance(outcome, Declined) else outcome

    def outcome(self, *inputs: Tensor) -> Compiled | Declined:
        """What runs for inputs of such sizes; it is made now if need be."""
        if not _one_batch(inputs):
            return self._pass(_MIXED)
        key = _key(inputs)
        return self._outcomes.get(key) or self._made(key, inputs)

    def _made(self, key: Key, inputs: tuple[Tensor, ...]) -> Compiled | Declined:
        from qfx.targets.native.making import make  # here, since the generator is much code that few models need

        with self._lock:
            if key not in self._outcomes:
                if sum(not isinstance(made, Declined) or bool(made.parts) for made in self.outcomes) >= MOST_PROGRAMS:
                    return self._pass(_MANY)
                self._outcomes[key] = make(self.graph, inputs, self.isa, self.tune)
            return self._outcomes[key]

    def _pass(self, why: Declined) -> Declined:
        if why not in self._passing:
            _LOG.info("a region runs as the lowered graph does: %s", why.reason)
            self._passing.add(why)
        return why

    def _forget(self) -> None:
        self._outcomes, self._passing = {}, set()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_outcomes": {}, "_passing": set(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self.number = number_of(self)


def _key(inputs: tuple[Tensor, ...]) -> Key:
    return tuple((tuple(x.shape[1:]), x.dtype) for x in inputs)


def _one_batch(inputs: tuple[Tensor, ...]) -> bool:
    """True where all inputs have as many samples: a program takes their number from the first."""
    return all(x.ndim > 0 and x.shape[0] == inputs[0].shape[0] for x in inputs)
