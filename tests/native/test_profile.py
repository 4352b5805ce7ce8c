"""The times of a program's steps: as many as there are steps, of a run like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfx import jit
from qfx.targets.native.compiled import Compiled

from .nets import native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


@pytest.fixture(scope="module")
def program() -> Compiled:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3), nn.LayerNorm(3))
    (program,) = region_of(native(layers, torch.randn(4, 5, 6))).programs
    return program


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 6)


def test_one_positive_number_for_each_step(program: Compiled, x: Tensor) -> None:
    assert len(program.steps) >= 4
    for _ in range(3):
        times = program.profile(x)
        assert len(times) == len(program.steps)
        assert all(type(time) is int and 0 < time < 60e9 for time in times)


def test_no_samples_take_no_time(program: Compiled) -> None:
    assert program.profile(torch.empty(0, 5, 6)) == (0,) * len(program.steps)


def test_it_changes_no_result(program: Compiled, x: Tensor) -> None:
    (want,), given = program(x), x.clone()
    program.profile(x)
    assert torch.equal(x, given)
    (got,) = program(x)
    assert torch.equal(got, want)
    program.profile(torch.randn(3, 5, 6))  # other values in the same memory
    assert torch.equal(want, program(x)[0]) and torch.equal(got, want)


def test_it_runs_in_the_memory_of_other_runs(program: Compiled, x: Tensor) -> None:
    """The pool keeps what fits the last call and never grows."""
    program(x)
    ((samples, _, arena, scratch),) = program._memory
    assert samples == 3
    for _ in range(5):
        program.profile(x)
        program(x)
        ((_, _, *again),) = program._memory
        assert [memory.data_ptr() for memory in again] == [arena.data_ptr(), scratch.data_ptr()]
    for batch in (1, 7, 0, 3):
        program.profile(torch.randn(batch, 5, 6))
        assert [kept[0] for kept in program._memory] == [batch]
