"""That a region has no program for some sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qfx.targets.native.region import NativeRegion


@dataclass(frozen=True)
class Declined:
    """``reason``: why. ``instead``: what runs then, where it is not the lowered graph. ``parts``: the regions in that,
    where the region was cut at what had no native form."""

    reason: str
    instead: Callable[..., Any] | None = None
    parts: tuple[NativeRegion, ...] = ()
