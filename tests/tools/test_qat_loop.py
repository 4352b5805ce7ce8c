"""The training loop of the worked cases on toy models: resuming, bad batches, checkpoints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.tools.qat_batches import Batch, Epoch, call, generator
from qfx.tools.qat_case import Tuning, distilled_loss, label_loss, optimizer_of
from qfx.tools.qat_checkpoint import Checkpoint, write_atomically
from qfx.tools.qat_loop import Plain, Plan, Training, constant, cosine, evaluating, train


class Toy(nn.Module):
    """Everything that a checkpoint has to keep: weights, batch-norm statistics, and dropout's random state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.dropout(F.relu(self.norm(self.first(x))), 0.2, self.training))
        return logits


@dataclass(frozen=True)
class ToyBatches:
    """Batches of noise with a label that can be learned; ``act(epoch, position)`` is called before each."""

    length: int = 5
    act: Callable[[int, int], object] = lambda epoch, position: None
    broken: frozenset[tuple[int, int]] = frozenset()

    def epoch(self, number: int) -> Epoch:
        def make(position: int) -> Batch:
            self.act(number, position)
            x = torch.randn(8, 6, generator=generator(number, position))
            labels = x[:, :3].argmax(1)
            return (x * float("nan") if (number, position) in self.broken else x), labels

        return Epoch(self.length, make)


TUNING = Tuning(Plan(3, cosine), lr=0.05, weight_decay=1e-3)


def toy_training(model: nn.Module | None = None) -> Training:
    torch.manual_seed(3)
    model = model or Toy()
    return Training(model, optimizer_of(model, TUNING), Plain())


def accuracy(model: nn.Module) -> float:
    x = torch.randn(64, 6, generator=generator(9))
    return 100 * float((call(model, x).argmax(1) == x[:, :3].argmax(1)).double().mean())


def run(training: Training, batches: ToyBatches, plan: Plan = TUNING.plan, **options: Any) -> Training:
    return train(training, batches, label_loss, plan, evaluate=accuracy, **options)


def interrupt_at(epoch: int, position: int) -> Callable[[int, int], None]:
    def act(*place: int) -> None:
        if place == (epoch, position):
            raise KeyboardInterrupt

    return act


def assert_same(one: Training, other: Training) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for name in ("step", "skipped", "curve", "schedule"):
        assert a[name] == b[name], name


@pytest.mark.parametrize("place", [(0, 1), (1, 0), (1, 3), (2, 4)], ids=str)
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(place: tuple[int, int], tmp_path: Path) -> None:
    straight = run(toy_training(), ToyBatches())
    checkpoint = Checkpoint(tmp_path / "toy.pt", {"lr": 0.05}, every=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(toy_training(), ToyBatches(act=interrupt_at(*place)), checkpoint=checkpoint)
    torch.rand(7)  # the random state of another process is another one
    resumed = run(toy_training(), ToyBatches(), checkpoint=checkpoint)
    assert_same(straight, resumed)
    assert len(resumed.curve) == 3 and resumed.step == 15


def test_between_saves_the_last_saved_point_counts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def act(*place: int) -> None:
        seen.append((place[0], place[1]))
        interrupt_at(1, 3)(*place)

    checkpoint = Checkpoint(tmp_path / "toy.pt", {}, every=1e6)  # at the ends of epochs only
    with pytest.raises(KeyboardInterrupt):
        run(toy_training(), ToyBatches(act=act), checkpoint=checkpoint)
    seen.clear()
    run(toy_training(), ToyBatches(act=lambda *place: seen.append(place)), checkpoint=checkpoint)
    assert seen[0] == (1, 0)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "toy.pt", {})
    done = run(toy_training(), ToyBatches(), checkpoint=checkpoint)
    again = run(toy_training(), ToyBatches(act=lambda *place: pytest.fail("trained")), checkpoint=checkpoint)
    assert_same(done, again)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.pt"
    run(toy_training(), ToyBatches(), checkpoint=Checkpoint(path, {"lr": 0.05, "seed": 1}))
    with pytest.raises(qfx.ConfigError, match=r"lr 0\.05 where this run has 0\.1") as error:
        run(toy_training(), ToyBatches(), checkpoint=Checkpoint(path, {"lr": 0.1, "seed": 1}))
    assert "seed" not in str(error.value)


def test_a_write_that_fails_leaves_the_last_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("whole"))

    def broken(part: Path) -> None:
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_a_batch_with_nan_is_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training = run(toy_training(), ToyBatches(broken=frozenset({(1, 2)})))
    assert training.skipped == [7] and len(training.curve) == 3
    assert "batch 2 of epoch 1 is skipped" in caplog.text and "nan" in caplog.text
    assert all(bool(t.isfinite().all()) for t in training.model.state_dict().values())
    assert accuracy(training.model) > 60


def test_a_skipped_batch_changes_nothing() -> None:
    training = toy_training()
    before = copy.deepcopy(training.model.state_dict())
    run(training, ToyBatches(1, broken=frozenset({(0, 0)})), replace(TUNING.plan, epochs=1))
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert training.schedule.state_dict() == {"steps": 0} and training.curve[0].loss != training.curve[0].loss


def test_gradients_that_are_not_finite_are_skipped_too() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(x).abs().sqrt()  # an infinite slope at 0
            return logits

    model = Overflowing()
    nn.init.zeros_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    training = run(toy_training(model), ToyBatches(1), replace(TUNING.plan, epochs=1))
    assert training.skipped == [0] and not bool(model.linear.weight.any())


def test_too_many_bad_batches_end_the_training() -> None:
    training = toy_training()
    broken = frozenset({(1, position) for position in range(5)})
    with pytest.raises(qfx.TrainingError, match="step 5"):
        run(training, ToyBatches(broken=broken), replace(TUNING.plan, patience=2))
    assert all(bool(t.isfinite().all()) for t in training.model.state_dict().values())


def test_early_stop_goes_back_to_the_best_epoch() -> None:
    values = iter([50.0, 70.0, 60.0, 65.0, 99.0])
    states: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        states.append(copy.deepcopy(model.state_dict()))
        return next(values)

    training = train(toy_training(), ToyBatches(), label_loss, Plan(5, constant, early_stop=2), evaluate=evaluate)
    assert [point.metric for point in training.curve] == [50.0, 70.0, 60.0, 65.0]
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, states[1][name]), name


def test_evaluating_gives_the_mode_back() -> None:
    model = Toy().train()
    with pytest.raises(ValueError), evaluating(model):
        assert not model.training
        raise ValueError
    assert model.training and torch.is_grad_enabled()


def test_cosine_warms_up_and_ends_at_zero() -> None:
    rates = [cosine(step, 100) for step in range(100)]
    assert rates[0] == 0.5 and rates[1] == 1.0 and max(rates) == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 1e-3
    assert constant(3, 5) == 1.0


def test_norms_and_biases_have_no_weight_decay() -> None:
    model = Toy()
    groups = optimizer_of(model, TUNING).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-3, 0.0]
    assert {id(p) for p in groups[0]["params"]} == {id(model.first.weight), id(model.last.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_labels_of_padding_do_not_count() -> None:
    class Fixed(nn.Module):
        def forward(self, logits: Tensor) -> dict[str, Tensor]:
            return {"logits": logits}

    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [2, -100, -100]])
    other = logits.clone()
    other[0, 2], other[1, 1:] = 9.0, -9.0
    teacher = Fixed()
    for loss in (label_loss, distilled_loss(teacher, 0.5, 2.0)):
        assert torch.allclose(loss(Fixed(), (logits, labels)), loss(Fixed(), (other, labels)))
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(label_loss(Fixed(), (logits, labels)), want)
