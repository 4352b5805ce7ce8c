"""What C's allocator does with freed memory: back to the system, as what it keeps counts as ours, or on to the next."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h
_SMALL, _LARGE = 2**18, 2**25  # 32 MiB is where glibc's own adaptation ends
_HUGE = 2**30


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
    with _adjusted(_SMALL):
        yield


@contextmanager
def reused() -> Iterator[None]:
    """Let tensors take the memory of those freed before, whose pages are there already: for a program that soon ends.

    Where tensors come and go by the thousand, a fifth of their time may be the system's, which clears new pages.
    Afterwards all is returned, and thresholds are as :func:`returned_at_once` leaves them.
    """
    with _adjusted(_HUGE, trim_threshold=_HUGE):
        yield
    trim()


@contextmanager
def _adjusted(mmap_threshold: int, *, trim_threshold: int | None = None) -> Iterator[None]:
    adjust = _glibc("mallopt")
    if adjust is None:
        yield
        return
    adjust(_MMAP_THRESHOLD, mmap_threshold)
    if trim_threshold is not None:
        adjust(_TRIM_THRESHOLD, trim_threshold)
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
