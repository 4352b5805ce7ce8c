"""What the allocator does with freed memory, seen by the pages that the system has to give."""

from __future__ import annotations

import pytest
import torch

from qfx import memory

resource = pytest.importorskip("resource")
LARGE = 2**24
"""Elements, 64 MiB: more than glibc keeps by itself."""

glibc = pytest.mark.skipif(memory._glibc("mallopt") is None, reason="no mallopt here")


def new_pages() -> int:
    """How many pages the system gives while a large tensor is made, filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(LARGE)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def test_reused_memory_is_kept_and_then_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what glibc is told: whether pages are new depends on the heap that other tests have left."""
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(memory, "_glibc", lambda name: lambda *args: told.append((name, *args)) or 0)
    with memory.reused():
        within = list(told)
    mmap, trim = memory._MMAP_THRESHOLD, memory._TRIM_THRESHOLD
    assert within == [("mallopt", mmap, memory._HUGE), ("mallopt", trim, memory._HUGE)]
    assert told[2:] == [("mallopt", mmap, memory._LARGE), ("mallopt", trim, 2 * memory._LARGE), ("malloc_trim", 0)]


@glibc
def test_memory_is_returned_at_once() -> None:
    with memory.returned_at_once():
        new_pages()
        assert new_pages() > LARGE * 4 / 2**21 - 1  # pages of 2 MiB at most


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    with memory.reused(), memory.returned_at_once():
        memory.trim()
