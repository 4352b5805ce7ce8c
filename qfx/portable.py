"""The CONVERTED graph that a lowered model was made of: the portable form, which is saved, exported and lowered anew.

It lies beside the model, not in it: no child, parameter or entry of the state dict. Integer weights are the lowered
model's own memory. ``load_state_dict`` and ``.to()`` of the lowered model do not reach it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx, nn

from qfx.attributes import drop_unused
from qfx.errors import ConfigError
from qfx.graph_module import CapturedModule
from qfx.meta import keep_calls
from qfx.stage import Stage, stage_of

_KEY = "_qfx_portable"


@dataclass(frozen=True)
class _Beside:
    """Hides a module from its owner, which would take it for a child."""

    gm: CapturedModule


def twin_of(gm: CapturedModule, *, without: str = "") -> CapturedModule:
    """A copy of a CONVERTED graph that shares its tensors; ``without`` names an attribute that it does not get."""
    shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    left_out = gm.__dict__.get(without)
    twin = copy.deepcopy(gm, {**shared, id(left_out): None} if left_out is not None else shared)
    twin.__dict__.pop(without, None)
    keep_calls(twin, ())
    drop_unused(twin)
    return twin


def put_beside(gm: fx.GraphModule, twin: CapturedModule) -> None:
    """Let ``gm``, which is lowered, remember the graph that it was made of."""
    gm.__dict__[_KEY] = _Beside(twin)


def portable(gm: nn.Module) -> CapturedModule:
    """The CONVERTED graph of a quantized model: itself where nothing was lowered, else the one it was made of.

    It belongs to the model: copy it before you change it.

    Raises:
        ConfigError: it is no graph that qfx converted.
    """
    if isinstance(gm, CapturedModule) and stage_of(gm) is Stage.CONVERTED:
        return gm
    beside = gm.__dict__.get(_KEY)
    if not isinstance(beside, _Beside):
        raise ConfigError(
            f"{type(gm).__name__} has no converted graph: " + (
                f"it is {stage_of(gm).name}" if isinstance(gm, CapturedModule) else "qfx did not quantize it as a whole"
            ),
            hint="pass what qfx.quantize or qfx.convert returned",
        )
    return beside.gm
