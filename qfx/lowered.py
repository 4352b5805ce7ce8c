"""What becomes of a CONVERTED graph on a machine: lowered in place, with the graph that it was made of beside it."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from qfx.graph_module import CapturedModule
from qfx.inference import GradientGuard, freeze
from qfx.node_table import crossings
from qfx.pipeline import Hook, Pipeline
from qfx.portable import put_beside, twin_of
from qfx.targets import Leaf


def lower_beside(
    gm: fx.GraphModule,
    passes: Pipeline,
    model: str,
    *,
    foreign: Collection[int] = frozenset(),
    without: str = "",
    hook: Hook | None = None,
) -> None:
    """Run ``passes`` on a CONVERTED graph; it then remembers what it was, is frozen and refuses useless gradients.

    Args:
        passes: those behind CONVERTED; none: the graph stays as it is.
        model: the name of the user's class, for errors.
        foreign: as for :func:`qfx.inference.freeze`.
        without: as for :func:`qfx.portable.twin_of`.
        hook: as for :meth:`qfx.pipeline.Pipeline.run`.
    """
    twin = twin_of(gm, without=without) if passes and isinstance(gm, CapturedModule) else None
    passes.run(gm, hook=hook)
    freeze(nn.ModuleList([gm] if twin is None else [gm, twin]), foreign)  # before the first run packs what it finds
    if twin is not None:
        put_beside(gm, twin)
    if not _weight_only(gm):
        gm.register_forward_pre_hook(GradientGuard(model), with_kwargs=True)


def _weight_only(gm: fx.GraphModule) -> bool:
    """True where no activation becomes an integer: gradients pass."""
    leaves = [m for m in gm.modules() if isinstance(m, Leaf)]
    return all(leaf.weight_only for leaf in leaves) and not crossings(gm)
