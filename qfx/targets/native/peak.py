"""The most that this CPU's kernels can reach, measured: what a layer's speed is compared with."""

from __future__ import annotations

import ctypes
from typing import Any

from qfx.targets.native.isa import Isa
from qfx.targets.native.library import load

_UNIT = """\
#include <omp.h>

#include "../parallel.h"
#include "{header}"
#include "peak.h"

QFX_API int64_t qfx_peak_products() {{ return qfx::kPeakProducts<qfx::{dot}>; }}

// Seconds from when all threads are there until the last has made its calls.
QFX_API double qfx_peak(int64_t calls, int threads) {{
  double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
  {{
#pragma omp barrier
#pragma omp master
    start = omp_get_wtime();
    qfx::peak<qfx::{dot}>(calls);
#pragma omp barrier
#pragma omp master
    end = omp_get_wtime();
  }}
  return end - start;
}}
"""


def measured_peak(isa: Isa, threads: int, *, seconds: float = 0.002, rounds: int = 100) -> float:
    """Multiply-accumulates per second of all ``threads``: the best of ``rounds`` of about ``seconds`` each.

    Raises:
        NativeError: there is no compiler, or it failed.
    """
    library = load(_UNIT.format(header=isa.header, dot=isa.dot))
    library.qfx_peak.restype = ctypes.c_double
    products: int = library.qfx_peak_products() * threads
    calls = 64
    while (took := _least(library, calls, threads, 3)) < seconds / 4:
        calls *= 2
    calls = max(1, round(calls * seconds / took))
    return products * calls / _least(library, calls, threads, rounds)


def _least(library: Any, calls: int, threads: int, rounds: int) -> float:
    """Seconds. Several rounds, since a thread that the system wakes or moves makes all wait."""
    least: float = min(library.qfx_peak(calls, threads) for _ in range(rounds))
    return least
