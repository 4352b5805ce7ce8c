"""The machines that qfx lowers for, by name."""

from __future__ import annotations

import difflib

from qfx.errors import ConfigError
from qfx.targets.base import (
    REQUANTIZE,
    AnchorRegion,
    DynamicQParams,
    Leaf,
    LookupRegion,
    PointRegion,
    QParams,
    Slot,
    Step,
    Target,
    requantization,
)
from qfx.targets.reference import Reference
from qfx.targets.x86 import X86

TARGETS: dict[str, Target] = {X86.name: X86(), Reference.name: Reference()}
"""In order of preference: ``target="auto"`` takes the first that this machine can run."""


def choose(target: str | Target, device: str = "cpu") -> Target:
    """The target of that name, the first that can run here for ``"auto"``, or the target itself.

    ``device`` is the type of device that the model is on: ``x86`` computes on the CPU only.

    Raises:
        ConfigError: there is no such target, or this machine cannot run it.
    """
    if not isinstance(target, str):
        if isinstance(target, Target):
            return target
        raise ConfigError(f"target is a {type(target).__name__}", hint="give a target or one of " + ", ".join(TARGETS))
    if target == "auto":
        return next(t for t in TARGETS.values() if t.unavailable(device) is None)
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, n=1)
        raise ConfigError(
            f"there is no target {target!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint="choose auto, " + ", ".join(TARGETS),
        )
    if (reason := TARGETS[target].unavailable(device)) is not None:
        raise ConfigError(f"target {target!r} cannot run here: {reason}", hint="use target='reference' or 'auto'")
    return TARGETS[target]


__all__ = [
    "REQUANTIZE",
    "TARGETS",
    "AnchorRegion",
    "DynamicQParams",
    "Leaf",
    "LookupRegion",
    "PointRegion",
    "QParams",
    "Slot",
    "Step",
    "Target",
    "choose",
    "requantization",
]
