"""Gradient checkpointing repeats forward passes: ranges and statistics take no notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qfx
from qfx.recompute import recomputing

from .nets import ResNet, settle

SHAPE = (4, 3, 6, 6)


def prepared_net(recipe: str = "int8", dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(2)
    model = settle(ResNet(dropout=dropout), torch.randn(SHAPE))
    return qfx.prepare(model, torch.zeros(SHAPE), recipe=recipe, mode="qat")


def steps(model: nn.Module, call: Callable[[Tensor], Tensor], count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and gradients of some steps of training."""
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses, gradients = [], []
    for _ in range(count):
        x = torch.randn(SHAPE).requires_grad_()  # reentrant checkpoints need an input that wants a gradient
        optimizer.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        losses.append(loss.detach())
    return losses, gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_a_step_is_the_same(recipe: str, reentrant: bool) -> None:
    plain, thrifty = prepared_net(recipe), prepared_net(recipe)
    want = steps(plain, plain)
    got = steps(thrifty, lambda x: checkpoint(thrifty, x, use_reentrant=reentrant))
    for a, b in zip((*want[0], *want[1]), (*got[0], *got[1]), strict=True):
        assert torch.equal(a, b)
    state = thrifty.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    assert int(thrifty.bn.num_batches_tracked) == 3 + 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_models_are_segments_of_a_larger_one(reentrant: bool) -> None:
    class Whole(nn.Module):
        def __init__(self, thrifty: bool) -> None:
            super().__init__()
            torch.manual_seed(4)
            body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            self.first = qfx.prepare(body, torch.randn(SHAPE), mode="qat")
            self.second, self.thrifty = prepared_net(), thrifty

        def forward(self, x: Tensor) -> Tensor:
            for part in (self.first, self.second):
                x = checkpoint(part, x, use_reentrant=reentrant) if self.thrifty else part(x)
            return x

    plain, thrifty = Whole(False), Whole(True)
    want, got = (steps(m, m) for m in (plain, thrifty))
    assert all(torch.equal(a, b) for a, b in zip((*want[0], *want[1]), (*got[0], *got[1]), strict=True))
    state = thrifty.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_knows_a_repeated_forward_pass() -> None:
    """Guards the private function of torch that tells it."""
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    look(x).sum().backward()
    assert seen == [False]
    for reentrant in (False, True):
        seen.clear()
        checkpoint(look, x, use_reentrant=reentrant).sum().backward()
        assert seen == [False, True]
    assert not recomputing()
