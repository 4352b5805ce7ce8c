"""How far a graph is compiled."""

from __future__ import annotations

from enum import IntEnum

from torch import fx

from qfx.meta import graph_info


class Stage(IntEnum):
    """How far a graph is compiled; what each promises is written, as code, in :mod:`qfx.verify`."""

    CAPTURED = 0
    CANONICAL = 1
    FUSED = 2
    ANNOTATED = 3
    PREPARED = 4
    CALIBRATED = 5
    CONVERTED = 6
    LOWERED = 7


def stage_of(gm: fx.GraphModule) -> Stage:
    """The stage recorded on the graph; CAPTURED where none is."""
    name = graph_info(gm).stage
    return Stage[name] if name else Stage.CAPTURED
