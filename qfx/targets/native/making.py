"""What a region runs for inputs of some sizes: its program, or what is better or the only way."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor, fx

from qfx import jit
from qfx.targets.native.choice import Tune
from qfx.targets.native.compiled import Compiled, build
from qfx.targets.native.cutting import cut
from qfx.targets.native.declined import Declined
from qfx.targets.native.float_twin import FloatTwin, compare_times
from qfx.targets.native.isa import find
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.tuning import tune

_LOG = logging.getLogger(__name__)


def make(gm: fx.GraphModule, inputs: Sequence[Tensor], isa: str | None, level: Tune | None) -> Compiled | Declined:
    """The program of a region's graph for such inputs, tuned where ``level`` asks for it; or why there is none.

    Where one node is the cause, or some are, what is around them become regions of their own, of the same level.

    Raises:
        NativeError: the compiler failed.
    """
    try:
        return _made(gm, inputs, isa, level)
    except NotNative as error:
        instead = cut(gm, error.nodes, inputs, isa, level) if error.nodes else None
        if instead is None:
            _LOG.info("a region runs as the lowered graph does: %s", error)
            return Declined(str(error))
        parts = tuple(module for module in instead.modules() if isinstance(module, NativeRegion))
        _LOG.info("a region is cut into %d: %s", len(parts), error)
        return Declined(f"{error}; it is cut there", instead, parts)


def _made(gm: fx.GraphModule, inputs: Sequence[Tensor], isa: str | None, level: Tune | None) -> Compiled | Declined:
    if (reason := jit.unavailable()) is not None:  # the region was made where there was a compiler
        raise NotNative(reason)
    here = find(isa)
    if level is None:
        return build(gm, inputs, here)
    if inputs[0].shape[0] == 0:  # no samples take no time, and one program serves all batches
        inputs = [x.new_zeros(1, *x.shape[1:]) for x in inputs]
    made = build(gm, inputs, here, choices=tune(gm, inputs, here, level))
    twin = FloatTwin(gm)
    times = compare_times(made, twin, inputs)
    if times.native <= times.float_:
        return made
    return Declined(f"it runs in float, which is faster: {times}", twin)
