"""How a layer is computed, where there is a choice: its kernel, and the sizes of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Tune = Literal["fast", "full"]

SCALES: dict[Tune, tuple[float, ...]] = {"fast": (0.5, 1.0, 2.0), "full": (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)}
"""Sizes of blocks that are tried, to what a kernel takes by itself."""


@dataclass(frozen=True)
class Choice:
    """None leaves a value to the kernel.

    ``kernel``: a name of :data:`qfx.targets.native.layers.KERNELS`. ``scale``: of its blocks of output positions, to
    what it takes by itself. ``parts``: into how many parts the channels are split between threads.
    """

    kernel: str | None = None
    scale: float | None = None
    parts: int | None = None

    def plain(self) -> dict[str, Any]:
        """The values that are given, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, plain: Any) -> Choice:
        """What :meth:`plain` gave; leaves all open where it is anything else, since a kernel believes its sizes."""
        if not isinstance(plain, dict) or not plain.keys() <= _FITS.keys():
            return cls()
        return cls(**plain) if all(_FITS[name](value) for name, value in plain.items()) else cls()


_FITS: dict[str, Callable[[Any], bool]] = {
    "kernel": lambda value: isinstance(value, str),
    "scale": lambda value: isinstance(value, float) and value in SCALES["full"],
    "parts": lambda value: type(value) is int and value >= 1,
}
"""Which values are ever tried. The name of a kernel is looked at where it is used: not every layer has every kernel."""


@dataclass(frozen=True)
class Vary:
    """Layers, by the names of their nodes, that a program shall compute in all ways, one behind the other.

    ``scales``: as :attr:`Choice.scale`. ``parts``: try both, one and one for each thread.
    """

    layers: frozenset[str]
    scales: tuple[float, ...]
    parts: bool
