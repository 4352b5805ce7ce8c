"""Where each buffer lies in the arena: two may share memory unless both hold values at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

    from qfx.targets.native.views import Buffer

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


def interference(lives: Mapping[Buffer, tuple[int, int]]) -> nx.Graph:
    """Buffers, with an edge between two that live at the same time. ``lives``: first and last step of each."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(lives)
    ordered = sorted(lives, key=lambda b: lives[b])
    for i, one in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if lives[other][0] > lives[one][1]:
                break
            graph.add_edge(one, other)
    return graph


def place(lives: Mapping[Buffer, tuple[int, int]]) -> tuple[dict[Buffer, int], int]:
    """Byte offsets of the buffers and the size of the arena, both per sample.

    Greedy by size: the largest first, each at the lowest place where it meets no neighbour of the interference graph
    (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5.2).
    """
    graph = interference(lives)
    offsets: dict[Buffer, int] = {}
    for buffer in sorted(lives, key=lambda b: (-b.bytes, lives[b])):
        taken = sorted((offsets[b], offsets[b] + aligned(b.bytes)) for b in graph.neighbors(buffer) if b in offsets)
        at = 0
        for begin, end in taken:
            if at + aligned(buffer.bytes) <= begin:
                break
            at = max(at, end)
        offsets[buffer] = at
    return offsets, max((at + aligned(b.bytes) for b, at in offsets.items()), default=0)


def aligned(count: int) -> int:
    """``count`` bytes, rounded up."""
    return -(-count // ALIGNMENT) * ALIGNMENT
