"""Ranges that outlive a compilation: dynamo compiles anew for other sizes, and calibration goes on where it was."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor, fx

from qfx.attributes import set_module
from qfx.calibration import collecting, observe_weights, seeing_batches
from qfx.dynamo_outline import Outline
from qfx.errors import UnsupportedError
from qfx.fake_quant import FakeQuantize
from qfx.kept_calls import KeptCalls
from qfx.roundings import fake_quants

IN_VAIN = 3
"""How often in a row calibration may be in vain, because weights were changed or exchanged, before it is given up."""

State = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Identities, version counters and addresses of tensors: another value where one was changed or exchanged."""

_VERSION = attrgetter("_version")


def state_of(tensors: tuple[Tensor, ...]) -> State:
    """What tells that tensors were written to or exchanged; writing through ``.data`` of one it does not tell."""
    try:
        versions = tuple(map(_VERSION, tensors))
    except RuntimeError:  # tensors of inference mode have none
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
    return tuple(map(id, tensors)), versions, tuple(map(Tensor.data_ptr, tensors))


@dataclass(eq=False)
class Ranges:
    """What calibration finds for one computation with one set of weights.

    ``modules`` are the FakeQuantize modules that all its graphs share. ``held`` keeps tensors alive whose identities
    are in ``state``, all but parameters. ``generation`` counts how often calibration began anew, ``in_vain`` how often
    in a row without an end. To be changed by who holds ``lock``.
    """

    outline: Outline
    state: State
    held: tuple[Tensor, ...]
    kept: KeptCalls
    lock: threading.RLock = field(default_factory=threading.RLock)
    modules: list[FakeQuantize] | None = None
    seen: int = 0
    samples: int = 0
    done: bool = False
    generation: int = 0
    in_vain: int = 0

    def begin_anew(self, state: State, held: tuple[Tensor, ...]) -> None:
        """Forget what was seen with other weights.

        Raises:
            UnsupportedError: that happens more often than calibration ends.
        """
        self.in_vain = 0 if self.done else self.in_vain + 1
        if self.in_vain > IN_VAIN:
            raise UnsupportedError("its weights change more often than it can be calibrated")
        self.state, self.held, self.kept = state, held, KeptCalls(self.kept.rows)
        self.modules, self.seen, self.samples, self.done = None, 0, 0, False
        self.generation += 1

    def share_with(self, gm: fx.GraphModule) -> bool:
        """Put the modules into a prepared graph (the first one gives its own); False where it rounds elsewhere."""
        own = {module: str(node.target) for node, module in fake_quants(gm)}
        if self.modules is None:
            observe_weights(gm)
            self.modules = list(own)
            return True
        if [(m.layer, m.spec) for m in own] != [(m.layer, m.spec) for m in self.modules]:
            return False
        for path, shared in zip(own.values(), self.modules, strict=True):
            set_module(gm, path, shared)
        return True

    def observe(self, gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        """Run a call through a prepared graph.

        Raises:
            CalibrationError: the call leads to NaN or infinity; the text names the layer.
        """
        self.kept.add("", inputs)
        with collecting(seeing_batches([gm])):
            gm(*inputs)
        self.seen += 1
        self.samples += next((int(t.shape[0]) for t in inputs if t.dim()), 1)

    def finish(self, gm: fx.GraphModule) -> None:
        """Calculate the ranges, which is the end of calibration."""
        for module in seeing_batches([gm]):
            module.calculate()
        self.done = True
