"""What the allocator does with freed memory, seen by the pages that the system has to give."""

from __future__ import annotations

import multiprocessing

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


def _reused() -> tuple[int, int, int]:
    new_pages()
    usual = new_pages()
    with memory.reused():
        new_pages()
        reused = new_pages()
    return usual, reused, new_pages()


@glibc
def test_reused_memory_needs_no_new_pages() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # here the heap is as other tests have left it
        usual, reused, afterwards = fresh.apply(_reused)
    assert reused < usual / 10
    assert afterwards > usual / 2


@glibc
def test_memory_is_returned_at_once() -> None:
    with memory.returned_at_once():
        new_pages()
        assert new_pages() > LARGE * 4 / 2**21 - 1  # pages of 2 MiB at most


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda name: None)
    with memory.reused(), memory.returned_at_once():
        memory.trim()
