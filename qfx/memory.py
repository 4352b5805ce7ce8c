"""Give memory back to the system: what C's allocator keeps after large weights are freed counts as ours."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``, or None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


def trim(*, collect: bool = False) -> None:
    """Return free pages to the system, a matter of milliseconds.

    ``collect`` first runs Python's garbage collector: graphs and exported programs are cycles, and hold tensors until
    they are found.
    """
    if collect:
        gc.collect()
    release = _malloc_trim()
    if release is not None:
        release(0)
