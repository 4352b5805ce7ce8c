"""Buffers share memory only where they never hold values at the same time."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.targets.native.isa import find
from qfx.targets.native.memory_plan import ALIGNMENT, aligned, interference, place
from qfx.targets.native.program import Program, Step
from qfx.targets.native.views import Buffer

Lives = dict[Buffer, tuple[int, int]]


@st.composite
def lives(draw: st.DrawFn) -> Lives:
    found: Lives = {}
    for index in range(draw(st.integers(0, 12))):
        start, length = draw(st.integers(0, 10)), draw(st.integers(0, 6))
        buffer = Buffer("arena", index, draw(st.sampled_from(("uint8_t", "float"))), draw(st.integers(1, 500)))
        found[buffer] = (start, start + length)
    return found


def meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


@given(lives())
def test_interference_is_to_live_at_the_same_time(given_lives: Lives) -> None:
    graph = interference(given_lives)
    assert set(graph.nodes) == set(given_lives)
    for a, b in combinations(given_lives, 2):
        assert graph.has_edge(a, b) == meet(given_lives[a], given_lives[b])


@given(lives())
def test_what_lives_at_the_same_time_lies_apart(given_lives: Lives) -> None:
    offsets, size = place(given_lives)
    assert set(offsets) == set(given_lives)
    for buffer, at in offsets.items():
        assert at % ALIGNMENT == 0 and 0 <= at <= size - buffer.bytes
    for a, b in combinations(given_lives, 2):
        if meet(given_lives[a], given_lives[b]):
            assert offsets[a] + a.bytes <= offsets[b] or offsets[b] + b.bytes <= offsets[a]


@given(lives())
def test_size(given_lives: Lives) -> None:
    """Not more than all apart, and not less than what lives at any one time."""
    _, size = place(given_lives)
    assert size <= sum(aligned(b.bytes) for b in given_lives)
    for step in range(20):
        assert size >= sum(aligned(b.bytes) for b, (first, last) in given_lives.items() if first <= step <= last)


@given(lives())
def test_the_same_every_time(given_lives: Lives) -> None:
    assert place(given_lives) == place(dict(given_lives))


def test_a_chain_takes_two_buffers() -> None:
    chain = {Buffer("arena", i, "uint8_t", 64): (i, i + 1) for i in range(10)}
    assert place(chain)[1] == 128


def test_nothing() -> None:
    assert place({}) == ({}, 0)


def test_a_buffer_that_a_later_step_reads_is_kept() -> None:
    """The program's plan, over its own steps."""
    program = Program(find(None), 1)
    a, b, c = (program.buffer("arena", "float", 16) for _ in range(3))
    held = program.buffer("output", "float", 16)
    for reads, writes in (((), (a,)), ((a,), (b,)), ((b,), (c,)), ((a, c), (held,))):
        program.add(Step("", reads, writes, "", ""))
    offsets, size = program.plan()
    assert len(set(offsets)) == 3, "all three hold values in the third step"
    assert size == 3 * 64
    apart, whole = program.apart()
    assert apart == [0, 64, 128] and whole == 192


def test_constants_are_where_they_were_said_to_be() -> None:
    program = Program(find(None), 1)
    tensors = [torch.arange(5, dtype=torch.int32), torch.randn(3, 7), torch.randint(-9, 9, (70,), dtype=torch.int8)]
    places = [int(program.constant(t).split("+ ")[1].rstrip(")")) for t in tensors]
    view = program.constant_view(torch.randn(2, 3).t())
    blob = program.constants()
    for tensor, at in zip(tensors, places, strict=True):
        size = tensor.numel() * tensor.element_size()
        assert at % ALIGNMENT == 0
        assert torch.equal(blob[at : at + size].view(tensor.dtype).view(tensor.shape), tensor)
    assert view.sizes == (3, 2) and view.strides == (2, 1), "constants are stored in the order of their dimensions"
