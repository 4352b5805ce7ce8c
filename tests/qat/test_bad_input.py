"""Bad input is a clear error, and training goes on as if it had not been."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Recipe
from qfx.api import UntrainedWarning

from .nets import Mlp, ResNet, Tabular, quantizers, settle, train

X = (5, 6)


def tabular(recipe: str = "int8") -> nn.Module:
    x = torch.randn(X)
    return qfx.prepare(settle(Tabular(dropout=0.0), x), x, recipe=recipe, mode="qat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5, 7),), r"argument x should be float32\[any, 6\]; it is float32\[5, 7\]"),
        ((torch.zeros(5, 6, 1),), "argument x should be"),
        ((torch.zeros(5, 6, dtype=torch.float64),), r"it is float64\[5, 6\]"),
        ((torch.zeros(5, 6), torch.zeros(5)), "2 positional arguments are too many"),
        (([torch.zeros(5, 6)],), "argument x should be"),
        ((), "argument 'x' is missing"),
    ],
)
def test_batches_of_another_structure(arguments: tuple[Any, ...], message: str) -> None:
    prepared = tabular()
    train(prepared, list(prepared.parameters()), 1, X)
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(qfx.CaptureError, match=message):
        prepared(*arguments)
    assert all(torch.equal(prepared.state_dict()[k], v) for k, v in before.items())
    train(prepared, list(prepared.parameters()), 1, X)


def test_calibration_items_of_another_structure() -> None:
    prepared = tabular()
    with pytest.raises(qfx.CalibrationError, match="calibration item 1"):
        qfx.calibrate(prepared, [torch.randn(X), torch.randn(5, 6, 2)])
    assert prepared.training
    train(prepared, list(prepared.parameters()), 2, X)
    qfx.convert(prepared.eval(), check=True)


def test_labels_behind_a_batch_are_no_part_of_calibration() -> None:
    prepared = tabular()
    qfx.calibrate(prepared, [(torch.randn(X), torch.zeros(5))])
    assert all(q.ready for q in quantizers(prepared))


def test_convert_twice() -> None:
    prepared = tabular()
    train(prepared, list(prepared.parameters()), 1, X)
    converted = qfx.convert(prepared.eval())
    with pytest.raises(qfx.ConfigError, match="quantized already"):
        qfx.convert(converted)
    x = torch.randn(X)
    assert torch.equal(qfx.convert(prepared)(x), converted(x)), "the prepared model may be converted again"
    train(prepared.train(), list(prepared.parameters()), 1, X)


def test_convert_in_training_mode() -> None:
    prepared = tabular()
    train(prepared, list(prepared.parameters()), 1, X)
    with pytest.raises(qfx.ConfigError, match=r"in training mode[\s\S]*prepared.eval\(\)"):
        qfx.convert(prepared)
    assert prepared.training


def test_convert_without_ranges_names_the_layer() -> None:
    with pytest.raises(qfx.CalibrationError, match=r"no batch has reached this layer.*\[layer x\]"):
        qfx.convert(tabular().eval())


def test_convert_with_a_layer_that_no_batch_reached() -> None:
    """The error names the user's layer."""
    prepared = tabular()
    train(prepared, list(prepared.parameters()), 1, X)
    next(q for q in quantizers(prepared) if q.layer == "last").ready = False
    with pytest.raises(qfx.CalibrationError, match=r"\[layer last\]"):
        qfx.convert(prepared.eval())


def test_convert_of_an_untrained_model_warns() -> None:
    prepared = tabular()
    qfx.calibrate(prepared, [torch.randn(X)])
    with pytest.warns(UntrainedWarning, match="this is post-training quantization"):
        qfx.convert(prepared.eval())
    train(prepared.train(), list(prepared.parameters()), 1, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        qfx.convert(prepared.eval())


def test_convert_of_something_else() -> None:
    with pytest.raises(qfx.ConfigError, match=r"no model that qfx.prepare returned"):
        qfx.convert(Mlp())


@pytest.mark.parametrize("recipe", ["w4a4_lsq", "w8a8_lsq"])
def test_no_step_size_is_learned_of_zeros(recipe: str) -> None:
    prepared = qfx.prepare(Mlp(), torch.randn(X), recipe=recipe, mode="qat")
    with pytest.raises(qfx.CalibrationError, match=r"all values here are zero.*\[layer x\][\s\S]*way out"):
        prepared(torch.zeros(1, 6))
    values = train(prepared, list(prepared.parameters()), 5, X)
    assert all(torch.isfinite(torch.tensor(values)))
    qfx.convert(prepared.eval(), check=True)


def test_zeros_later_on_are_nothing_special() -> None:
    prepared = qfx.prepare(Mlp(), torch.randn(X), recipe="w4a4_lsq", mode="qat")
    train(prepared, list(prepared.parameters()), 1, X)
    prepared(torch.zeros(1, 6)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)


def images(recipe: str = "int8") -> tuple[nn.Module, Tensor]:
    x = torch.randn(4, 3, 6, 6)
    return qfx.prepare(settle(ResNet(), x), x, recipe=recipe, mode="qat"), x


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("fake_quant.")}


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 0, 2, 2] = value
    return x


def trains_on(model: nn.Module, x: Tensor) -> None:
    values = train(model, list(model.parameters()), 3, tuple(x.shape))
    assert all(torch.isfinite(torch.tensor(values)))
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    qfx.convert(model.eval(), check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_a_first_batch_that_is_not_finite_is_skipped(recipe: str, value: float) -> None:
    prepared, x = images(recipe)
    schedule, weights = qfx.Schedule(prepared), weights_of(prepared)
    with pytest.raises(qfx.TrainingError, match=r"the loss of step 0 is (nan|inf)"):
        schedule.check(prepared(spoiled(x, value)).square().mean())
    assert all(torch.isfinite(t).all() for t in prepared.state_dict().values())
    assert all(torch.equal(p, weights[n]) for n, p in weights_of(prepared).items())
    trains_on(prepared, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_a_later_batch_that_is_not_finite_moves_no_range_of_its_own(recipe: str, value: float) -> None:
    """Rounding makes a zero of NaN, as the integer model does: what is behind it stays finite."""
    prepared, x = images(recipe)
    train(prepared, list(prepared.parameters()), 2, tuple(x.shape))
    prepared.eval()(x)  # the buffer takes over what the optimizer made of a learned scale
    prepared.train()
    data = next(q for q in quantizers(prepared) if q.layer == "x")
    before = copy.deepcopy(data.state_dict())
    prepared(spoiled(x, value))
    assert all(torch.equal(v, before[k]) for k, v in data.state_dict().items())
    trains_on(prepared, x)


def test_the_step_of_a_loss_that_is_not_finite_is_named() -> None:
    prepared, x = images()
    schedule = qfx.Schedule(prepared)
    for _ in range(2):
        train(prepared, list(prepared.parameters()), 1, tuple(x.shape))
        schedule.step()
    weights = weights_of(prepared)
    with pytest.raises(qfx.TrainingError, match="the loss of step 2 is nan"):
        schedule.check(prepared(x).mean() * float("nan"))
    assert all(torch.equal(p, weights[n]) for n, p in weights_of(prepared).items())
    trains_on(prepared, x)


def test_what_a_nan_reaches_keeps_its_statistics() -> None:
    """In the float steps nothing rounds: the NaN reaches every channel, and no range and no statistics move."""
    prepared, x = images()
    train(prepared, list(prepared.parameters()), 2, tuple(x.shape))
    qfx.Schedule(prepared, float_steps=100)
    before = copy.deepcopy(prepared.state_dict())
    assert prepared(spoiled(x, float("nan"))).isnan().any()
    after = prepared.state_dict()
    weights = {f"fake_quant.{n}" for n, q in prepared.fake_quant.named_modules() if getattr(q, "constant", False)}
    moved = [n for n in before if not torch.equal(before[n], after[n]) and n.rpartition(".")[0] not in weights]
    assert all(name.endswith("num_batches_tracked") for name in moved), moved


@pytest.mark.parametrize("mode", ["train", "", None])
def test_modes_there_are_not(mode: Any) -> None:
    with pytest.raises(qfx.ConfigError, match="there is no mode"):
        qfx.prepare(Mlp(), torch.randn(X), mode=mode)


def test_quantize_qat_needs_a_function() -> None:
    with pytest.raises(qfx.ConfigError, match="train is a int"):
        qfx.quantize_qat(Mlp(), torch.randn(X), train=3)  # type: ignore[arg-type]


def test_recipes_are_checked_before_training() -> None:
    with pytest.raises(qfx.ConfigError, match="matches no"):
        qfx.prepare(Mlp(), torch.randn(X), recipe=Recipe.preset("int8").skip("frist"), mode="qat")
