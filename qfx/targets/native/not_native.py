"""What the generator raises where it declines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from qfx.errors import UnsupportedError


class NotNative(UnsupportedError):
    """A region that cannot be a program at these shapes.

    ``nodes``: those that it could be one without; empty where the cause is no node.
    """

    nodes: tuple[fx.Node, ...] = ()


@contextmanager
def writing(node: fx.Node) -> Iterator[None]:
    """What is declined meanwhile is declined for ``node``."""
    try:
        yield
    except NotNative as error:
        error.nodes = error.nodes or (node,)
        raise
