"""Switching modes and copying change nothing that is not the mode."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.training_modules import LiveBatchNorm

from . import nets


def hyper_parameters(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        for name in ("p", "eps", "momentum", "keep")
        if hasattr(module, name)
    }


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    x, t = torch.randn(4, 3, 6, 6), torch.randn(3, 5, 16)
    return {"resnet": (nets.settle(nets.ResNet(dropout=0.3), x), x), "encoder": (nets.transformer(), t)}


@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_twenty_switches_and_copies(name: str) -> None:
    model, x = models()[name]
    prepared = qfx.prepare(model, x, mode="qat")
    prepared(x)  # ranges start
    before, state = hyper_parameters(prepared), copy.deepcopy(prepared.state_dict())
    want = prepared.eval()(x)
    chance = random.Random(4)
    current: nn.Module = prepared
    for _ in range(20):
        action = chance.choice(("train", "eval", "copy", "child"))
        if action == "copy":
            current = copy.deepcopy(current)
        elif action == "child":
            chance.choice(list(current.modules())).train(chance.random() < 0.5)
        else:
            current.train(action == "train")
        assert hyper_parameters(current) == before
    assert torch.equal(current.eval()(x), want)
    after = current.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_hyper_parameters_are_the_users() -> None:
    model = nets.Tabular(momentum=0.03, dropout=0.37)
    model.norm.eps = 2e-3
    prepared = qfx.prepare(model, torch.randn(5, 6), mode="qat")
    assert (prepared.norm.eps, prepared.norm.momentum, prepared.drop.p) == (2e-3, 0.03, 0.37)


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq", "w4a16"])
@pytest.mark.parametrize("name", ["resnet", "encoder"])
def test_names_and_flags_of_parameters_are_the_users(name: str, recipe: str) -> None:
    model, x = models()[name]
    next(model.parameters()).requires_grad_(False)
    prepared = qfx.prepare(model, x, recipe=recipe, mode="qat")
    own = {n: p.requires_grad for n, p in prepared.named_parameters() if not n.startswith("fake_quant.")}
    assert own == {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n for n, _ in model.named_buffers()} <= {n for n, _ in prepared.named_buffers()}
    assert model.state_dict().keys() <= prepared.state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_untouched(training: bool) -> None:
    x = torch.randn(4, 3, 6, 6)
    model = nets.settle(nets.ResNet(dropout=0.3), x).train(training)
    model.layer1[0].bn1.eval()
    modes = [m.training for m in model.modules()]
    before, ids = copy.deepcopy(model.state_dict()), [id(t) for t in (*model.parameters(), *model.buffers())]
    generator = torch.get_rng_state()
    prepared = qfx.prepare(model, x, mode="qat")
    assert torch.equal(torch.get_rng_state(), generator)
    nets.train(prepared, list(prepared.parameters()), 2, tuple(x.shape))
    qfx.convert(prepared.eval())
    assert [m.training for m in model.modules()] == modes
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == ids
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_eval_mode_trains_as_a_whole() -> None:
    x = torch.randn(4, 3, 6, 6)
    model = nets.settle(nets.ResNet(dropout=0.3), x).eval()
    prepared = qfx.prepare(model, x, mode="qat")
    assert prepared.training
    assert all(m.training for m in prepared.modules())
    prepared(x)
    assert all(int(m.num_batches_tracked) == 4 for m in prepared.modules() if isinstance(m, LiveBatchNorm))


def test_a_batch_norm_that_the_user_froze_stays_frozen() -> None:
    x = torch.randn(4, 3, 6, 6)
    model = nets.settle(nets.ResNet(), x).train()
    frozen = model.layer1[0].bn1.eval()
    want = frozen.running_mean.clone()
    prepared = qfx.prepare(model, x, mode="qat")
    nets.train(prepared.eval().train(), list(prepared.parameters()), 2, tuple(x.shape))
    held = prepared.get_submodule("layer1.0.bn1")
    assert not held.training
    assert torch.equal(held.running_mean, want)
    assert not torch.equal(held.weight, frozen.weight), "its affine parameters train on"
    assert prepared.get_submodule("layer1.0.bn2").training
    qfx.convert(prepared.eval(), check=True)


def test_frozen_batch_norms_train_as_in_the_float_model() -> None:
    x = torch.randn(4, 3, 6, 6)
    model = nets.settle(nets.ResNet(), x).train()
    model.bn.eval()
    prepared = nets.without_rounding(qfx.prepare(model, x, mode="qat"))
    assert torch.equal(prepared(x), model(x))
    assert all(torch.equal(prepared.state_dict()[k], v) for k, v in model.state_dict().items())


def test_what_the_user_cut_from_the_gradient_stays_cut() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            with torch.no_grad():
                z = self.b(x)
            result: torch.Tensor = self.c(y + z + y.detach())
            return result

    model, x = Cut().train(), torch.randn(5, 6)
    prepared = nets.without_rounding(qfx.prepare(model, x, mode="qat"))
    for m in (model, prepared):
        m(x).square().sum().backward()
    own = dict(prepared.named_parameters())
    assert own["b.weight"].grad is None
    for name, p in model.named_parameters():
        assert p.grad is None or torch.equal(own[name].grad, p.grad)
