"""``roll``: elements that leave at one end come in at the other."""

from __future__ import annotations

import itertools

from torch import fx

from qfx.meta import value
from qfx.targets.native.copies import copy
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS
from qfx.targets.native.views import BATCH


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    dims = value(node).ndim
    turned = [int(d) % dims for d in node.args[2]] if len(node.args) > 2 else []  # type: ignore[arg-type, union-attr]
    if not turned or len({*turned}) < len(turned):
        return "natively, roll names each of its dimensions once"
    return None if value(node).dtype in ELEMENTS else f"native programs have no {value(node).dtype}"


def _emit(emitter: Emitter, node: fx.Node) -> None:
    """Each part, before and behind the cut of every dimension, is copied to its place."""
    view = emitter.view(node.args[0])
    shifts, dims = node.args[1:3]
    assert isinstance(shifts, list | tuple) and isinstance(dims, list | tuple)
    out = emitter.tensor(node, view.element)
    cuts: list[list[tuple[int, int, int, int]]] = []
    for shift, given in zip(shifts, dims, strict=True):
        dim = emitter.axis(node, int(given))
        size = view.sizes[dim]
        if size == BATCH:
            raise NotNative(f"{node} mixes samples")
        behind = int(shift) % max(size, 1)  # so many of the last come first
        parts = [(dim, size - behind, 0, behind), (dim, 0, behind, size - behind)]
        cuts.append([part for part in parts if part[3]])
    for parts_ in itertools.product(*cuts):
        source, target = view, out
        for dim, begin, to, length in parts_:
            source, target = source.narrow(dim, begin, length), target.narrow(dim, to, length)
        copy(emitter.program, source, target, str(node))


ROLL = Operator(_refusal, _emit, by_row=True)
