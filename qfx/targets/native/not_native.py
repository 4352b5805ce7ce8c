"""What the generator raises where it declines."""

from __future__ import annotations

from qfx.errors import UnsupportedError


class NotNative(UnsupportedError):
    """A region that cannot be a program at these shapes; it runs as the lowered graph does."""
