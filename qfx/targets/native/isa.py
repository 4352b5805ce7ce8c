"""The dot products of bytes that the headers in ``csrc/native`` have, and which of them this machine runs."""

from __future__ import annotations

from dataclasses import dataclass

from qfx.cpu import cpu_features
from qfx.errors import ConfigError


@dataclass(frozen=True)
class Isa:
    """One ``Dot`` of the headers: a tile is ``rows`` positions by ``channels``, of ``unit`` elements of depth at once.

    ``feature``: what the CPU must have, in Linux's spelling. ``wide``: it multiplies int16, so that transforming a
    kernel (Winograd) costs no precision. ``tiles``: it multiplies whole tiles as well (AMX).
    """

    name: str
    dot: str
    header: str
    feature: str
    rows: int
    channels: int
    unit: int
    wide: bool = False
    tiles: bool = False


ISAS = (
    Isa("amx", "DotAvx512Vnni", "dot_vnni.h", "amx_int8", rows=12, channels=32, unit=4, tiles=True),
    Isa("avx512_vnni", "DotAvx512Vnni", "dot_vnni.h", "avx512_vnni", rows=12, channels=32, unit=4),
    Isa("avx_vnni", "DotAvxVnni", "dot_vnni.h", "avx_vnni", rows=6, channels=16, unit=4),
    Isa("avx2", "DotAvx2", "dot_avx2.h", "avx2", rows=6, channels=16, unit=2, wide=True),
    Isa("portable", "DotPortable", "dot_portable.h", "", rows=4, channels=16, unit=1),
)
"""From the fastest to the slowest."""


def supported() -> tuple[Isa, ...]:
    """Those that this machine can run, the fastest first."""
    return tuple(isa for isa in ISAS if not isa.feature or isa.feature in cpu_features())


def find(name: str | None) -> Isa:
    """The instruction set of that name, the widest here for None.

    Raises:
        ConfigError: there is none, or this CPU has not got it.
    """
    here = supported()
    found = [isa for isa in here if name in (None, isa.name)]
    if not found:
        exists = name in {isa.name for isa in ISAS}
        known = "not on this CPU" if exists else "no instruction set of the native engine"
        raise ConfigError(f"{name!r} is {known}", hint=f"choose one of {', '.join(isa.name for isa in here)}, or None")
    return found[0]
