"""Let FakeQuantize do the relu or clamp before it, in the same pass over memory.

Before::

    %relu = relu(%bn)
    %relu_fake_quant = TrainedFakeQuantize<...>(%relu)

After::

    %relu = Absorbed<absorbed.relu>(%bn)
    %relu_fake_quant = TrainedFakeQuantize<...>(%relu, clamp_min=0.0)

Training then stores one mask a layer in place of the relu's result and a mask, and reads the activations once.
``settle-training`` undoes it. Declines when somebody else reads the relu, and when a bound is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.attributes import free_path, set_module
from qfx.meta import update
from qfx.operators import argument, name_of
from qfx.roundings import fake_quant_of
from qfx.stage import Stage
from qfx.trained_fake_quant import TrainedFakeQuantize
from qfx.training import ClampMark
from qfx.training_modules import Absorbed

_BOUNDS = {"relu": (0.0, None), "hardtanh": (-1.0, 1.0), "clamp": (None, None)}
"""Operators that clamp, with the bounds that they have where none are given."""


@dataclass(frozen=True)
class AbsorbClamps:
    """Runs over every FakeQuantize whose source is a clamp that it alone reads."""

    name: ClassVar[str] = "absorb-clamps"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.PREPARED, Stage.PREPARED)
    writes: ClassVar[frozenset[str]] = frozenset({"mark"})

    def run(self, gm: fx.GraphModule) -> int:
        count = 0
        for node in list(gm.graph.nodes):
            source = node.args[0] if isinstance(fake_quant_of(gm, node), TrainedFakeQuantize) else None
            if not isinstance(source, fx.Node) or name_of(source) not in _BOUNDS or list(source.users) != [node]:
                continue
            low, high = (argument(source, i + 1, n, _BOUNDS[name_of(source)][i]) for i, n in _NAMES[name_of(source)])
            if any(isinstance(bound, fx.Node) for bound in (low, high)):
                continue
            bounds = {"clamp_min": low, "clamp_max": high}
            node.kwargs = {**node.kwargs, **{name: float(b) for name, b in bounds.items() if b is not None}}
            update(source, mark=ClampMark(name_of(source)))
            path = free_path(gm, f"absorbed.{source.name}")
            set_module(gm, path, Absorbed())
            source.op, source.target = "call_module", path
            count += 1
        return count


_NAMES = {
    "relu": ((0, ""), (1, "")),
    "hardtanh": ((0, "min_val"), (1, "max_val")),
    "clamp": ((0, "min"), (1, "max")),
}
