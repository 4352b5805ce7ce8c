"""Give memory back to the system: what C's allocator keeps after large weights are freed counts as ours."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h
_SMALL, _LARGE = 2**18, 2**25  # 32 MiB is where glibc's own adaptation ends


@functools.cache
def _glibc(name: str) -> Callable[..., int] | None:
    """The function of the C library, or None where it has none."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
    return found


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Let every large tensor go back to the system when it is freed, instead of into the allocator's store.

    Afterwards the threshold is where glibc's adaptation takes it in any process that frees large tensors.
    """
    adjust = _glibc("mallopt")
    if adjust is None:
        yield
        return
    adjust(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        adjust(_MMAP_THRESHOLD, _LARGE)
        adjust(_TRIM_THRESHOLD, 2 * _LARGE)


def trim(*, collect: bool = False) -> None:
    """Return free pages to the system, a matter of milliseconds.

    ``collect`` first runs Python's garbage collector: graphs and exported programs are cycles, and hold tensors until
    they are found.
    """
    if collect:
        gc.collect()
    release = _glibc("malloc_trim")
    if release is not None:
        release(0)
