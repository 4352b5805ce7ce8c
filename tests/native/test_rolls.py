"""Rolled elements, as shifted windows have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qfx import jit

from .nets import Net, assert_agrees, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def test_rolls_of_floats_and_of_integers() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda s, x: (
            s.b(torch.roll(s.a(x), (-2, 3), (1, 2)).relu()),
            torch.roll(x, 1, -1),
            torch.roll(s.a(x).transpose(1, 3), (7, -9, 0), (1, 3, 2)),
        ),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
    )
    made = native(net, torch.randn(4, 5, 4, 6))
    assert_agrees(made, torch.randn(2, 5, 4, 6))
    steps = [step.kernel for program in region_of(made).programs for step in program.steps]
    assert "copy" in steps and len(region_of(made).programs) == 1


def test_samples_are_not_rolled_natively() -> None:
    torch.manual_seed(0)
    net = Net(lambda s, x: s.a(torch.roll(s.b(x), 1, 0)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    made = native(net, x := torch.randn(4, 5, 6))
    (reason,) = region_of(made).declined
    assert "mixes samples" in reason
    torch.testing.assert_close(made(x), net(x), atol=0.05, rtol=0.05)


def test_rolls_without_dimensions_or_with_one_twice_stay_outside() -> None:
    torch.manual_seed(0)
    net = Net(lambda s, x: torch.roll(torch.roll(s.a(x), 1), (1, 2), (1, 1)), a=nn.Linear(6, 6))
    made = native(net, x := torch.randn(4, 5, 6))
    assert sum("roll" in n.name for n in made.graph.nodes) == 2
    torch.testing.assert_close(made(x), net(x), atol=0.05, rtol=0.05)
