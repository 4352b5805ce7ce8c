"""How ranges start and what moves them; which gradient passes; what a schedule switches."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import Estimator, Fixed, Learned, Moving, PerGroup, QConfig, QuantSpec, Recipe, Schedule
from qfx.portable import portable
from qfx.trained_fake_quant import TrainedFakeQuantize

from .nets import Mlp, ResNet, Tabular, quantizers, settle, train

X = (8, 6)
DEFAULT = Recipe.preset("int8").default
MOVING = Moving()


def recipe(ranges: Moving | Learned | Fixed, estimator: Estimator = Estimator.CLIPPED) -> Recipe:
    specs = [s for s in (DEFAULT.activation, DEFAULT.weight) if s is not None]
    return Recipe("test", QConfig(*(replace(s, ranges=ranges, estimator=estimator) for s in specs)))


def mlp(ranges: Moving | Learned | Fixed = MOVING, estimator: Estimator = Estimator.CLIPPED) -> nn.Module:
    torch.manual_seed(1)
    return qfx.prepare(Mlp(), torch.randn(X), recipe=recipe(ranges, estimator), mode="qat")


def only(spec: QuantSpec | None) -> QuantSpec:
    assert spec is not None
    return spec


def at_input(prepared: nn.Module) -> TrainedFakeQuantize:
    return next(q for q in quantizers(prepared) if q.layer == "x")


def scales(prepared: nn.Module) -> list[Tensor]:
    return [q.scale.clone() for q in quantizers(prepared)]


def test_moving_ranges_are_the_average_of_extremes() -> None:
    prepared, batches = mlp(Moving(0.1)), [torch.randn(X) for _ in range(4)]
    low = high = None
    for x in batches:
        prepared(x)
        low = x.min() if low is None else low + 0.1 * (x.min() - low)
        high = x.max() if high is None else high + 0.1 * (x.max() - high)
    assert low is not None and high is not None
    torch.testing.assert_close(at_input(prepared).low, low)
    torch.testing.assert_close(at_input(prepared).high, high)
    torch.testing.assert_close(at_input(prepared).scale, (high - low) / 255)


def test_fixed_ranges_are_those_of_the_first_batch() -> None:
    prepared = mlp(Fixed())
    prepared(torch.randn(X))
    before = scales(prepared)
    train(prepared, list(prepared.parameters()), 3, X)
    assert all(torch.equal(a, b) for a, b in zip(scales(prepared), before, strict=True))
    qfx.convert(prepared.eval(), check=True)


def test_learned_ranges_are_trained_and_start_at_those_of_the_first_batch() -> None:
    prepared = mlp(Learned())
    assert all(float(q.step.abs().sum()) == 0.0 for q in quantizers(prepared))
    prepared(torch.randn(X)).square().mean().backward()
    assert all(torch.equal(q.step.reshape(q.scale.shape), q.scale) for q in quantizers(prepared))
    assert all(q.step.grad is not None and float(q.step.grad.abs().sum()) > 0.0 for q in quantizers(prepared))
    assert all(q.step.ndim == 1 for q in quantizers(prepared)), "FSDP2 refuses parameters without a dimension"
    before = scales(prepared)
    train(prepared, list(prepared.parameters()), 2, X)
    assert not any(torch.equal(a, b) for a, b in zip(scales(prepared), before, strict=True))


@pytest.mark.parametrize("ranges", [Moving(), Learned(), Fixed()], ids=lambda r: type(r).__name__)
def test_calibrated_ranges_are_those_of_post_training_quantization(ranges: Moving | Learned | Fixed) -> None:
    data = [torch.randn(X) for _ in range(4)]
    prepared = mlp(ranges)
    qfx.calibrate(prepared, data)
    torch.manual_seed(1)
    plain = qfx.prepare(Mlp(), torch.randn(X), recipe=recipe(ranges))
    qfx.calibrate(plain, data)
    theirs = dict(plain.named_buffers())
    for name, scale in prepared.named_buffers():
        if name.endswith(".scale"):
            torch.testing.assert_close(scale, theirs[name])
    assert prepared.training
    assert all(q.ready for q in quantizers(prepared))


def test_ranges_stay_in_eval() -> None:
    prepared = mlp()
    prepared(torch.randn(X))
    before = copy.deepcopy(prepared.state_dict())
    prepared.eval()(torch.randn(X) * 9)
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


@pytest.mark.parametrize(("estimator", "inside"), [(Estimator.CLIPPED, 0.0), (Estimator.STRAIGHT_THROUGH, 1.0)])
def test_the_estimator_decides_what_passes_outside_of_the_range(estimator: Estimator, inside: float) -> None:
    prepared = mlp(Fixed(), estimator)
    prepared(torch.rand(X) * 2 - 1)
    x = torch.full((1, 6), 0.5)
    x[0, 0] = 100.0
    x.requires_grad_()
    at_input(prepared)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[inside, 1.0, 1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("net", ["batch norm", "groups"])
@pytest.mark.parametrize("ranges", [Moving(), Learned(), Fixed()], ids=lambda r: type(r).__name__)
def test_float16_scales_of_weights_stay_values_of_float16(
    ranges: Moving | Learned | Fixed, net: str, calibrated: bool
) -> None:
    """In every step, and when a batch norm's factor has gone into them."""
    torch.manual_seed(1)
    weight = replace(only(DEFAULT.weight), ranges=ranges, scale_dtype=torch.float16)
    if net == "groups":
        model, weight = Mlp(), replace(weight, granularity=PerGroup(4))
    else:
        model = settle(Tabular(dropout=0.0), torch.randn(X))
    prepared = qfx.prepare(model, torch.randn(X), recipe=Recipe("half", QConfig(None, weight)), mode="qat")
    if calibrated:
        qfx.calibrate(prepared, [torch.randn(X)])
    of_weights = [q for q in quantizers(prepared) if q.constant]
    assert len(of_weights) == 3
    for _ in range(3):
        before = [q.scale.clone() for q in of_weights]
        train(prepared, list(prepared.parameters()), 1, X, lr=0.05)
        assert all(torch.equal(q.scale.half().float(), q.scale) for q in of_weights)
    if isinstance(ranges, Learned):
        assert not any(torch.equal(q.scale, scale) for q, scale in zip(of_weights, before, strict=True))
        assert not any(torch.equal(q.step.half().float(), q.step) for q in of_weights), "gradients go on below float16"
    converted = qfx.convert(prepared.eval(), check=True)
    kept = {n: t for n, t in portable(converted).named_buffers() if n.endswith("weight_scale")}
    assert len(kept) == 3
    assert all(torch.equal(t.half().float(), t) and t.dtype is torch.float32 for t in kept.values())


def test_scales_of_a_float32_checkpoint_are_rounded_when_training_ends() -> None:
    prepared = lsq()
    prepared(torch.randn(X))
    weight = replace(only(Recipe.lsq(4, 4).default.weight), scale_dtype=torch.float16)
    layer = next(q for q in quantizers(prepared) if q.constant and q.spec.bits == 4)
    layer.spec, layer.observing = weight, False
    assert not torch.equal(layer.scale.half().float(), layer.scale)
    settled = layer.settled().scale
    assert torch.equal(settled.half().float(), settled)


# --- the schedule -----------------------------------------------------------------------------------------------------


def lsq() -> nn.Module:
    torch.manual_seed(1)
    model = settle(Tabular(dropout=0.0), torch.randn(X))
    return qfx.prepare(model, torch.randn(X), recipe=Recipe.lsq(4, 4), mode="qat")


def test_float_steps_round_nothing_and_observe() -> None:
    prepared, x = lsq(), torch.randn(X)
    schedule = Schedule(prepared, float_steps=1)
    torch.manual_seed(1)
    model = settle(Tabular(dropout=0.0), torch.randn(X)).train()
    assert torch.equal(prepared(x), model(x))
    assert all(q.ready for q in quantizers(prepared))
    schedule.step()
    assert not torch.equal(prepared(x), model(x))


def test_frozen_ranges_stay_whatever_the_optimizer_does() -> None:
    """Momentum goes on moving a parameter that gets no gradient."""
    prepared = lsq()
    schedule = Schedule(prepared, freeze_observers=2)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, momentum=0.9)
    kept: list[Tensor] = []
    for step in range(5):
        optimizer.zero_grad(set_to_none=False)
        prepared(torch.randn(X)).square().mean().backward()
        optimizer.step()
        schedule.step()
        if step == 2:
            kept = scales(prepared)
    assert all(torch.equal(a, b) for a, b in zip(scales(prepared), kept, strict=True))
    qfx.convert(prepared.eval(), check=True)


def test_moving_ranges_freeze_too() -> None:
    prepared = mlp()
    prepared(torch.randn(X))
    Schedule(prepared, freeze_observers=0)
    before = scales(prepared)
    train(prepared, list(prepared.parameters()), 2, X)
    assert all(torch.equal(a, b) for a, b in zip(scales(prepared), before, strict=True))


def test_batch_norms_freeze_at_their_step() -> None:
    prepared = lsq()
    schedule = Schedule(prepared, freeze_batch_norm=1)
    prepared(torch.randn(X))
    schedule.step()
    before = prepared.norm.running_mean.clone()
    train(prepared, list(prepared.parameters()), 2, X)
    assert torch.equal(prepared.norm.running_mean, before)
    qfx.convert(prepared.eval(), check=True)


def test_bits_go_down_to_those_of_the_recipe() -> None:
    prepared = qfx.prepare(Mlp(), torch.randn(X), recipe=Recipe.lsq(4, 3), mode="qat")
    final = [q.spec.bits for q in quantizers(prepared)]
    assert set(final) == {3, 4, 8}
    schedule = Schedule(prepared, bits={0: 8, 2: (6, 5), 4: (4, 3)})
    seen = []
    for _ in range(5):
        train(prepared, list(prepared.parameters()), 1, X, lr=0.01)
        seen.append([q.spec.bits for q in quantizers(prepared)])
        schedule.step()
    wanted = [8, 8, (6, 5), (6, 5), (4, 3)]
    for bits, pair in zip(seen, wanted, strict=True):
        weight, activation = (pair, pair) if isinstance(pair, int) else pair
        pairs = zip(quantizers(prepared), final, strict=True)
        assert bits == [max(end, weight if q.constant else activation) for q, end in pairs]
    assert seen[-1] == final
    qfx.convert(prepared.eval(), check=True)


def test_a_schedule_goes_on_where_it_was_saved() -> None:
    first = lsq()
    schedule = Schedule(first, bits={0: 8, 2: 4}, freeze_batch_norm=2)
    for _ in range(3):
        train(first, list(first.parameters()), 1, X)
        schedule.step()
    second = lsq()
    again = Schedule(second, bits={0: 8, 2: 4}, freeze_batch_norm=2)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert again.steps == 3
    assert [q.spec for q in quantizers(second)] == [q.spec for q in quantizers(first)]
    x = torch.randn(X)
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_observers": 5, "bits": {0: 8, 6: 4}}, "bits change at step 6, after ranges are frozen at step 5"),
        ({"bits": {0: 8, 5: 2}}, "the recipe leaves no weights with fewer than 4"),
        ({"bits": {0: 9}}, "bits range from 2 to 8, got 9"),
        ({"bits": {-1: 8}}, "a step of bits is a number of steps"),
        ({"float_steps": 1.5}, "float_steps is a number of steps"),
        ({"freeze_batch_norm": -2}, "freeze_batch_norm is a number of steps"),
    ],
)
def test_schedules_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    prepared = lsq()
    with pytest.raises(qfx.ConfigError, match=message):
        Schedule(prepared, **arguments)  # type: ignore[arg-type]
    train(prepared, list(prepared.parameters()), 1, X)


def test_a_schedule_of_nothing() -> None:
    with pytest.raises(qfx.ConfigError, match="holds nothing to schedule"):
        Schedule(Mlp())


def test_bits_after_the_freeze() -> None:
    prepared = lsq()
    prepared(torch.randn(X))
    Schedule(prepared, freeze_observers=0)
    with pytest.raises(qfx.ConfigError, match="after the ranges were frozen"):
        next(q for q in quantizers(prepared) if q.constant).set_bits(3)


# --- helpers of training ----------------------------------------------------------------------------------------------


def test_quantize_qat_is_prepare_train_convert() -> None:
    model = settle(ResNet(), torch.randn(4, 3, 6, 6))
    x = torch.randn(4, 3, 6, 6)
    seen: list[bool] = []

    def fit(prepared: nn.Module) -> None:
        seen.append(prepared.training)
        train(prepared, list(prepared.parameters()), 3, (4, 3, 6, 6))

    torch.manual_seed(0)
    one = qfx.quantize_qat(model, x, train=fit, calibration=[x], verbose=False)
    torch.manual_seed(0)
    prepared = qfx.calibrate(qfx.prepare(model, x, mode="qat"), [x])
    fit(prepared)
    assert torch.equal(one(x), qfx.convert(prepared.eval())(x))
    assert seen == [True, True]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_of_softened_classes(temperature: float) -> None:
    student, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    p = F.softmax(teacher / temperature, -1)
    q = F.softmax(student / temperature, -1)
    want = (p * (p / q).log()).sum(-1).mean() * temperature**2
    got = qfx.distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(got, want)
    got.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(qfx.distillation_loss(student, student)) == pytest.approx(0.0, abs=1e-6)


def test_distillation_of_logits_that_do_not_fit() -> None:
    with pytest.raises(qfx.ConfigError, match="shape"):
        qfx.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(qfx.ConfigError, match="positive"):
        qfx.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)


def test_clipped_weights_are_those_outside_of_the_range() -> None:
    prepared = mlp(Fixed())
    assert qfx.clipped_weights(prepared) == {}
    prepared(torch.randn(X))
    with torch.no_grad():
        prepared.first.weight[:, 0] *= 100.0
        prepared.first.weight[:, 1:].clamp_(-1e-6, 1e-6)
    shares = qfx.clipped_weights(prepared)
    assert shares.keys() == {"first", "second", "last"}
    assert shares["first"] == pytest.approx(1 / 6)
