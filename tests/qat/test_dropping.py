"""Whatever a model drops in training it drops after preparation too, with the same random numbers; in eval nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qfx

from .droppers import DROPPERS, Residual
from .nets import without_rounding


@pytest.mark.parametrize("name", DROPPERS)
def test_is_the_float_model_in_both_modes(name: str) -> None:
    make, shape = DROPPERS[name]
    model, x = make(), torch.randn(shape)
    prepared = without_rounding(qfx.prepare(model, x, mode="qat"))
    for _ in range(2):
        torch.manual_seed(3)
        want, next_number = model.train()(x), torch.rand(1)
        torch.manual_seed(3)
        got = prepared.train()(x)
        assert torch.equal(got, want)
        assert torch.equal(torch.rand(1), next_number), "other random numbers were drawn"
        assert torch.equal(prepared.eval()(x), model.eval()(x))  # with gradients: no fused encoder kernels


@pytest.mark.parametrize("name", ["samples", "by floor", "dropout", "attention", "encoder"])
def test_passes_the_gradients_of_the_float_model(name: str) -> None:
    make, shape = DROPPERS[name]
    model, x = make().train(), torch.randn(shape)
    prepared = without_rounding(qfx.prepare(model, x, mode="qat"))
    for m in (model, prepared):
        torch.manual_seed(3)
        m(x).square().sum().backward()
    own = dict(prepared.named_parameters())
    for parameter, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(own[parameter].grad, p.grad), parameter


@pytest.mark.parametrize("name", ["samples", "dropout", "channels", "shared", "attention", "encoder"])
def test_converts_without_it(name: str) -> None:
    make, shape = DROPPERS[name]
    x = torch.randn(shape)
    prepared = qfx.prepare(make(), x, mode="qat")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    converted = qfx.convert(prepared.eval(), check=True)
    assert torch.equal(converted.train()(x), converted.eval()(x))


def test_dropout_works_for_other_batches() -> None:
    make, _ = DROPPERS["rows"]
    model = make().train()
    prepared = without_rounding(qfx.prepare(model, torch.randn(4, 3, 8, 8), mode="qat"))
    x = torch.randn(9, 3, 8, 8)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    assert torch.equal(prepared(x), want)


@pytest.mark.parametrize("dropper", [nn.FeatureAlphaDropout(0.2), nn.RReLU()], ids=lambda m: type(m).__name__)
def test_names_what_it_cannot_follow(dropper: nn.Module) -> None:
    with pytest.raises(qfx.CaptureError, match=r"draws random numbers in training.*\[layer dropper\]"):
        qfx.prepare(Residual(copy.deepcopy(dropper)), torch.randn(5, 6), mode="qat")
