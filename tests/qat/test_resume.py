"""Training that is saved and taken up in a new process goes on bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import resume

STEPS = 5


def in_a_new_process(*arguments: object) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, resume.__file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(str(arguments[-1]), weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def resumed_is_straight(folder: Path, recipe: str, optimizer: str, steps: int, *, processes: bool) -> None:
    straight = resume.run(recipe, optimizer, 0, 2 * steps, None)
    first, second = folder / "first.pt", folder / "second.pt"
    torch.save(resume.run(recipe, optimizer, 0, steps, None), first)
    if processes:
        resumed = in_a_new_process(recipe, optimizer, steps, 2 * steps, first, second)
    else:
        resumed = resume.run(recipe, optimizer, steps, 2 * steps, torch.load(first, weights_only=True))
    assert torch.equal(resumed.pop("losses"), straight.pop("losses")[steps:])
    for part, value in straight.items():
        assert same(resumed[part], value), part


@pytest.mark.parametrize(("recipe", "optimizer"), [("learned", "adam"), ("moving", "sgd")])
def test_goes_on_in_a_new_process(tmp_path: Path, recipe: str, optimizer: str) -> None:
    resumed_is_straight(tmp_path, recipe, optimizer, STEPS, processes=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("recipe", ["moving", "learned", "fixed"])
def test_goes_on_in_a_fresh_model(tmp_path: Path, recipe: str, optimizer: str) -> None:
    resumed_is_straight(tmp_path, recipe, optimizer, STEPS, processes=False)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("recipe", ["moving", "learned", "fixed"])
def test_fifty_steps_and_fifty_more(tmp_path: Path, recipe: str, optimizer: str) -> None:
    resumed_is_straight(tmp_path, recipe, optimizer, 50, processes=True)


def test_every_entry_of_the_state_is_a_tensor() -> None:
    """So that formats of plain tensors can hold it; none shares memory with another but what is tied."""
    state = resume.run("learned", "sgd", 0, 1, None)["model"]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert len({value.data_ptr() for value in state.values()}) == len(state)


@pytest.mark.parametrize("moment", [0, 1, 4, 7, 9])
def test_the_state_of_any_moment_loads(moment: int) -> None:
    """Before ranges start, in the float steps, between bits, and when all is frozen."""
    state = resume.run("learned", "sgd", 0, moment, None)
    again = resume.run("learned", "sgd", moment, moment, state)
    assert same(again["model"], state["model"])
