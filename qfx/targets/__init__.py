"""The machines that qfx lowers for, by name."""

from __future__ import annotations

from typing import TypeVar

from qfx.errors import ConfigError
from qfx.registry import Registry, instance_of
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
from qfx.targets.native import Native
from qfx.targets.reference import Reference
from qfx.targets.x86 import X86

TARGETS: dict[str, Target] = {X86.name: X86(), Reference.name: Reference(), Native.name: Native()}
"""Those of qfx itself, in order of preference: ``target="auto"`` takes the first that this machine can run.

``native`` has to be asked for: its programs are compiled, which takes seconds."""


def _made(plugin: object) -> Target:
    made = instance_of(plugin)
    if not isinstance(made, Target):
        raise ConfigError(f"target is a {type(made).__name__}", hint="give a target or the name of one")
    return made


TARGETS_BY_NAME: Registry[Target] = Registry("target", "qfx.targets", _made, reserved=("auto",))
TARGETS_BY_NAME.add_own(TARGETS.values())

T = TypeVar("T", bound=Target | type[Target])


def register_target(target: T) -> T:
    """Let ``target``, a target or a class of one, be asked for by its own name; returns it.

    ``"auto"`` goes on to choose among qfx's own only: what ``quantize`` does does not depend on what is installed.

    Raises:
        ConfigError: it is no target, or its name is taken.
    """
    TARGETS_BY_NAME.register(target)
    return target


def choose(target: str | Target, device: str = "cpu") -> Target:
    """The target of that name, the first that can run here for ``"auto"``, or the target itself.

    ``device`` is the type of device that the model is on: ``x86`` computes on the CPU only.

    Raises:
        ConfigError: there is no such target, or this machine cannot run it.
    """
    if not isinstance(target, str):
        return _made(target)
    if target == "auto":
        return next(t for t in TARGETS.values() if t.unavailable(device) is None)
    found = TARGETS_BY_NAME.find(target)
    if (reason := found.unavailable(device)) is not None:
        raise ConfigError(f"target {target!r} cannot run here: {reason}", hint="use target='reference' or 'auto'")
    return found


__all__ = [
    "REQUANTIZE",
    "TARGETS",
    "TARGETS_BY_NAME",
    "AnchorRegion",
    "DynamicQParams",
    "Leaf",
    "LookupRegion",
    "Native",
    "PointRegion",
    "QParams",
    "Slot",
    "Step",
    "Target",
    "choose",
    "register_target",
    "requantization",
]
