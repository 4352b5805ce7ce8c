"""What this CPU can do: its x86 features, and whether oneDNN multiplies integers without saturating.

Without VNNI or AMX, oneDNN's uint8 x int8 kernels add two products in int16 (``vpmaddubsw``), which saturates; with
them, four products are added in int32, which does not. Source: oneDNN developer guide, "Nuances of int8 computations".
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

VNNI_FEATURES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Features (names of Linux) by which oneDNN adds u8 x s8 products without saturation."""

_AVX512 = frozenset({"avx512_vnni"})
_AMX = frozenset({"avx512_vnni", "amx_int8"})
_NONE: frozenset[str] = frozenset()

# What is left of VNNI_FEATURES under a limit. The instruction sets are only partly ordered: AVX512_CORE_VNNI and
# AVX512_CORE_BF16 do not include AVX2_VNNI, while AVX512_CORE_FP16 and what comes after do.
_ISA_LIMITS = {
    "SSE41": _NONE,
    "AVX": _NONE,
    "AVX2": _NONE,
    "AVX2_VNNI": frozenset({"avx_vnni"}),
    "AVX2_VNNI_2": frozenset({"avx_vnni"}),
    "AVX512_CORE": _NONE,
    "AVX512_CORE_VNNI": _AVX512,
    "AVX512_CORE_BF16": _AVX512,
    "AVX512_CORE_FP16": _AVX512 | {"avx_vnni"},
    "AVX10_1_512": _AVX512 | {"avx_vnni"},
    "AVX512_CORE_AMX": _AMX | {"avx_vnni"},
}


def onednn_isa_limit() -> str:
    """The instruction set to which the environment limits oneDNN, in upper case; empty where it does not."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").strip().upper()


def onednn_has_vnni() -> bool:
    """True if oneDNN's u8 x s8 kernels on this machine do not saturate, under the limit of the environment.

    Where the features are not known (not Linux on x86) this is False, the careful answer. A limit that oneDNN does not
    know is ignored by it, and here.
    """
    return bool(VNNI_FEATURES & cpu_features() & _ISA_LIMITS.get(onednn_isa_limit(), VNNI_FEATURES))


@functools.cache
def cpu_features() -> frozenset[str]:
    """The x86 feature flags in Linux's spelling (``avx2``, ``avx512_vnni``); empty on other machines and systems."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return frozenset()
    return _cpuinfo_words("flags")


@functools.cache
def fingerprint() -> str:
    """A text that differs where code compiled for this very CPU (``-march=native``) might not run on another."""
    features = _cpuinfo_words("flags") or _cpuinfo_words("Features")  # x86, ARM
    return " ".join([platform.system(), platform.machine(), platform.processor(), *sorted(features)])


def _cpuinfo_words(key: str) -> frozenset[str]:
    """The words behind the first ``key :`` of /proc/cpuinfo; empty where there is no such file or line."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, words = line.partition(":")
        if name.strip() == key:
            return frozenset(words.split())
    return frozenset()
