"""Where the parts of a concatenation are written: into the whole, so that nothing is left to copy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qfx.meta import value
from qfx.operators import argument, name_of
from qfx.targets.native.views import Border, Element, View

if TYPE_CHECKING:
    from qfx.targets.native.emitter import Emitter


def dim_of(node: fx.Node, dims: int) -> int:
    """The dimension along which ``node`` joins tensors of ``dims`` dimensions."""
    dim = argument(node, 1, "dim", 0)
    assert isinstance(dim, int)
    return dim % dims


def is_join_of_channels(node: fx.Node) -> bool:
    """True for a concatenation of images of bytes along their channels."""
    if name_of(node) != "cat" or not isinstance(value(node), torch.Tensor):
        return False
    return value(node).ndim == 4 and not value(node).dtype.is_floating_point and dim_of(node, 4) == 1


def place_in_join(emitter: Emitter, node: fx.Node, element: Element) -> View | None:
    """Where ``node`` writes its image, if all that reads it is a concatenation; else None."""
    if len(node.users) != 1:
        return None
    (join,) = node.users
    if not is_join_of_channels(join):
        return None
    whole = whole_of(emitter, join, element)
    return _part(emitter, join, whole, node)


def whole_of(emitter: Emitter, join: fx.Node, element: Element) -> View:
    """The image that the parts of ``join`` are written into."""
    if join not in emitter.joins:
        emitter.joins[join] = emitter.program.image(element, emitter.size(join), emitter.border(join))
    return emitter.joins[join]


def _part(emitter: Emitter, join: fx.Node, whole: View, node: fx.Node) -> View:
    """The channels of ``node`` within the whole, at its first place there."""
    parts: Any = join.args[0]
    start = sum(emitter.size(n)[1] for n in parts[: parts.index(node)])
    return replace(whole.narrow(1, start, emitter.size(node)[1]), border=Border())
