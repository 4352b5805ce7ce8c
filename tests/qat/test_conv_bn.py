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


CASES = [(name, "lsq") for name in PAIRS if name not in ("alone", "no statistics")]
CASES += [(name, r) for name in ("conv2d", "transposed grouped", "linear") for r in RECIPES if r != "lsq"]


@pytest.mark.parametrize(("name", "recipe"), CASES)
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


@pytest.mark.parametrize("recipe", ["per channel", "per tensor", "learned per channel", "learned per tensor"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_sign_of_gamma(name: str, recipe: str) -> None:
    model, x = conv_bn(WEIGHTS[name])
    prepared = qfx.prepare(model, x, recipe=RECIPES[recipe], mode="qat")
    prepared(x)  # ranges start; nothing is trained, so that zeros stay
    model.train()(x)
    got, want = prepared.eval()(x), model.eval()(x)
    assert torch.isfinite(got).all()
    assert float((got - want).detach().norm()) <= 0.02 * float(want.norm())
    qfx.convert(prepared, check=True)
    result = prepared.train()(x)
    (result * torch.arange(result.numel()).reshape(result.shape).cos()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)
    if "channel" in recipe or "zero" in name:
        assert bool((prepared.norm.weight.grad != 0).all()), "a weight of zero can be trained away from zero"


def formula(model: nn.Module, x: Tensor, prepared: nn.Module) -> Tensor:
    """One step of the method by torch's own operators, with the scales of ``prepared``."""
    data, weight = quantizers(prepared)
    factor = (model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)).detach().view(-1, 1, 1, 1)
    x = torch.fake_quantize_per_tensor_affine(x, data.scale, data.zero_point, 0, 255)
    if weight.scale.ndim:  # where a channel has a scale of its own, the size of its factor is part of that
        factor = factor.sign()
        rounded = torch.fake_quantize_per_channel_affine(
            model.layer.weight * factor, weight.scale, weight.zero_point, 0, -128, 127
        )
    else:
        rounded = torch.fake_quantize_per_tensor_affine(
            model.layer.weight * factor, weight.scale, weight.zero_point, -128, 127
        )
    y = nn.functional.conv2d(x, rounded / factor)
    result: Tensor = model.norm(y)
    return result


@pytest.mark.parametrize("recipe", ["per channel", "per tensor"])
def test_outputs_and_gradients_are_those_of_the_formula(recipe: str) -> None:
    model, x = conv_bn(WEIGHTS["negative"])
    prepared = qfx.prepare(model, x, recipe=RECIPES[recipe], mode="qat")
    result = prepared(x)
    want = formula(model.train(), x, prepared)
    torch.testing.assert_close(result, want)
    for r in (result, want):
        (r * torch.arange(r.numel()).reshape(r.shape).cos()).sum().backward()
    own = dict(prepared.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(own[name].grad, p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_keep_their_integers_when_the_batch_norm_is_folded(bits: int) -> None:
    """The extremes of a channel lie halfway between two integers right after its range was taken."""
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = conv_bn()
        prepared = qfx.prepare(model, x, recipe=with_weight(PerAxis(0), bits), mode="qat")
        prepared(x)
        converted = qfx.convert(prepared.eval(), check=True)
        torch.testing.assert_close(converted(x), prepared(x).detach(), rtol=1e-4, atol=1e-4)


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
