"""That a region has no program for some sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Declined:
    """``reason``: why. ``instead``: what runs then, where it is not the lowered graph."""

    reason: str
    instead: Callable[..., Any] | None = None
