"""The most that this CPU's kernels can reach, measured: what a layer's speed is compared with."""

from __future__ import annotations

import time
from typing import Any

from qfx.targets.native.isa import Isa
from qfx.targets.native.library import load

_UNIT = """\
#include <omp.h>

#include "../parallel.h"
#include "{header}"
#include "peak.h"

QFX_API int64_t qfx_peak_products() {{ return qfx::kPeakProducts<qfx::{dot}>; }}

QFX_API void qfx_peak(int64_t calls, int threads) {{
#pragma omp parallel num_threads(threads)
  qfx::peak<qfx::{dot}>(calls);
}}
"""


def measured_peak(isa: Isa, threads: int, *, seconds: float = 0.002, rounds: int = 100) -> float:
    """Multiply-accumulates per second of all ``threads``: the best of ``rounds`` of about ``seconds`` each.

    Raises:
        NativeError: there is no compiler, or it failed.
    """
    library = load(_UNIT.format(header=isa.header, dot=isa.dot))
    products: int = library.qfx_peak_products() * threads
    calls = 64
    while (took := _time(library, calls, threads)) < seconds / 4:
        calls *= 2
    calls = max(1, round(calls * seconds / took))
    return max(products * calls / _time(library, calls, threads) for _ in range(rounds))


def _time(library: Any, calls: int, threads: int) -> float:
    start = time.perf_counter()
    library.qfx_peak(calls, threads)
    return time.perf_counter() - start
