"""Let a kernel write its sum over the operand that nobody reads again, and integers be made in the layout that is read.

Before::

    %q = qfx.quantize(%x, ...)
    %conv = StaticLeaf<conv1>(%q)
    %out = StaticLeaf<conv2>(%b, %conv)         # conv + add: copies %conv, then adds to the copy

After::

    %q = qfx.quantize(%x, ..., channels_last=True)
    %conv = StaticLeaf<conv1>(%q)
    %out = StaticLeaf<conv2>(%b, %conv)         # overwrites %conv

Declines to overwrite what is read later, what no kernel made, what a view shares memory with, and one tensor that comes
as both inputs; and to lay out integers that anyone but channels-last kernels reads. ``qfx.verify`` checks the first, so
that a pass that adds a reader later on is found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qfx.meta import value
from qfx.ops import quantize
from qfx.stage import Stage
from qfx.targets import Leaf
from qfx.verify import leaf_of, read_again


@dataclass(frozen=True)
class ReuseMemory:
    """Sets ``overwrites`` on leaves, and ``channels_last`` on quantize operators; without leaves it does nothing."""

    name: ClassVar[str] = "reuse-memory"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CONVERTED, Stage.CONVERTED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        return _overwrite(gm) + _lay_out(gm)


def _overwrite(gm: fx.GraphModule) -> int:
    calls: dict[Leaf, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if (leaf := leaf_of(gm, node)) is not None and len(node.args) > 1:
            calls.setdefault(leaf, []).append(node)
    free = [leaf for leaf, nodes in calls.items() if not any(read_again(gm, node) for node in nodes)]
    for leaf in free:
        leaf.overwrites = True
    return len(free)


def _lay_out(gm: fx.GraphModule) -> int:
    count = 0
    for node in gm.graph.nodes:
        if node.target is not quantize or not isinstance(value(node), torch.Tensor) or value(node).ndim != 4:
            continue
        leaves = [leaf_of(gm, user) for user in node.users]
        if leaves and all(leaf is not None and leaf.channels_last for leaf in leaves):
            node.kwargs = {**node.kwargs, "channels_last": True}
            count += 1
    return count
