"""Convolution and batch norm train with one convolution, on the weight that is converted in the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qfx
from qfx import Learned, PerAxis, PerGroup, PerTensor, QConfig, Recipe
from qfx.observers import Mse

from .nets import Stack, quantizers, settle, train
from .test_batch_norm import PAIRS

INT8 = Recipe.preset("int8").default


def with_weight(granularity: object, bits: int = 8, learned: bool = False) -> Recipe:
    assert INT8.weight is not None
    weight = replace(INT8.weight, granularity=granularity, element=qfx.IntType(bits, True))
    if learned:
        weight = replace(weight, ranges=Learned(), observer=Mse)
    return Recipe("test", QConfig(INT8.activation, weight))


RECIPES = {
    "per channel": Recipe.preset("int8"),
    "per tensor": with_weight(PerTensor()),
    "4 bits": with_weight(PerAxis(0), 4),
    "learned per channel": with_weight(PerAxis(0), learned=True),
    "learned per tensor": with_weight(PerTensor(), learned=True),
    "lsq": Recipe.w4a4_lsq(),
}


def conv_bn(weight: Tensor | None = None) -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 4, 7, 7)
    model = settle(Stack(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), x)
    if weight is not None:
        with torch.no_grad():
            model.norm.weight.copy_(weight)
    return model, x


class Count(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_one_convolution_a_step() -> None:
    model, x = conv_bn()
    prepared = qfx.prepare(model, x, mode="qat")
    prepared(x)
    with Count() as count:
        prepared(x)
    assert sum("convolution" in name for name in count.names) == 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("alone", "no statistics")])
def test_agrees_with_what_it_is_converted_to(name: str, recipe: str) -> None:
    layer, norm, shape = PAIRS[name]
    x = torch.randn(shape)
    prepared = qfx.prepare(settle(Stack(layer(), norm()), x), x, recipe=RECIPES[recipe], mode="qat")
    train(prepared, list(prepared.parameters()), 3, shape, lr=0.01)
    converted = qfx.convert(prepared.eval(), check=True)
    y, z = prepared(x), converted(x)
    assert float((y - z).detach().abs().max()) <= 0.02 * float(y.detach().abs().max())


WEIGHTS = {
    "zero": torch.zeros(6),
    "some zero": torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, -1.0]),
    "negative": torch.tensor([-1.0, -0.5, 1.0, 0.3, -2.0, 1.0]),
    "tiny": torch.tensor([1e-8, -1e-8, 1e-20, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_sign_of_gamma(name: str, recipe: str) -> None:
    model, x = conv_bn(WEIGHTS[name])
    prepared = qfx.prepare(model, x, recipe=RECIPES[recipe], mode="qat")
    prepared(x)  # ranges start; nothing is trained, so that zeros stay
    got, want = prepared.eval()(x), model(x)
    bits = min(q.spec.bits for q in quantizers(prepared))
    assert torch.isfinite(got).all()
    assert float((got - want).detach().abs().max()) <= 4.0 * 2.0**-bits * float(want.abs().max()) + 1e-6
    qfx.convert(prepared, check=True)
    prepared.train()(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)
    assert bool(prepared.norm.weight.grad.abs().min() > 0), "a weight of zero can be trained away from zero"


def test_gradients_are_those_of_the_float_model_where_rounding_is_fine() -> None:
    """8 bits: relative to the float model's within a few steps of 1/127."""
    model, x = conv_bn(WEIGHTS["negative"])
    prepared = qfx.prepare(model, x, mode="qat")
    for m in (model, prepared):
        result = m.train()(x)
        (result * torch.arange(result.numel()).reshape(result.shape).cos()).sum().backward()
    own = dict(prepared.named_parameters())
    for name, p in model.named_parameters():
        off = float((own[name].grad - p.grad).norm() / p.grad.norm())
        assert off < 0.03, (name, off)


def test_a_moving_variance_leaves_the_integers_of_a_learned_weight_alone() -> None:
    """Scales per channel: the batch norm's factor is a part of the scale that is found when training ends."""
    model, x = conv_bn()
    prepared = qfx.prepare(model, x, recipe=RECIPES["learned per channel"], mode="qat")
    prepared(x)
    weight = next(q for q in quantizers(prepared) if q.constant)
    before = weight.scale.clone()
    prepared(x * 50)
    assert torch.equal(weight.scale, before)
    qfx.convert(prepared.eval(), check=True)


def test_per_group_weights_behind_a_batch_norm() -> None:
    x = torch.randn(5, 70)
    model = settle(Stack(nn.Linear(70, 8), nn.BatchNorm1d(8)), x)
    for learned in (False, True):
        recipe = Recipe("groups", QConfig(None, with_weight(PerGroup(32), 4, learned).default.weight))
        prepared = qfx.prepare(model, x, recipe=recipe, mode="qat")
        assert [tuple(q.scale.shape) for q in quantizers(prepared)] == [(8, 3)]
        train(prepared, list(prepared.parameters()), 3, (5, 70), lr=0.01)
        qfx.convert(prepared.eval(), check=True)
