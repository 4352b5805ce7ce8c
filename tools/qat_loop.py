"""The training loop of the worked cases: resumable bit for bit, and not thrown by a loss that is not finite."""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qfx.errors import TrainingError
from qfx.modes import evaluating
from qfx.tools.qat_batches import Batch, Batches
from qfx.tools.qat_checkpoint import Checkpoint

log = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Batch], Tensor]
Rate = Callable[[int, int], float]


class Schedule(Protocol):
    """What the loop needs of :class:`qfx.Schedule`."""

    def check(self, loss: Tensor) -> None: ...
    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Plain:
    """The schedule of float training: it only counts, and refuses a loss that is not finite."""

    steps: int = 0

    def check(self, loss: Tensor) -> None:
        if not bool(loss.detach().isfinite()):
            raise TrainingError(f"the loss is {loss.item()} at step {self.steps}", hint="lower the learning rate")

    def step(self) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@dataclass(frozen=True)
class Point:
    """One point of a curve: after ``step`` steps, with the mean training loss of the epoch behind it."""

    step: int
    loss: float
    metric: float


@dataclass
class Training:
    """All that training changes; :meth:`state_dict` is what a checkpoint keeps of it.

    ``step`` counts batches, skipped ones too; ``total`` is the sum of the losses of the epoch under way and ``counted``
    how many there were; ``seconds`` is the time of all steps, over all the processes that made them. ``best`` is the
    model's state behind the best epoch, where the plan asks for it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    total: float = 0.0
    counted: int = 0
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "total": self.total,
            "counted": self.counted,
            "seconds": self.seconds,
            "skipped": list(self.skipped),
            "curve": [asdict(point) for point in self.curve],
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.total, self.counted = state["step"], state["total"], state["counted"]
        self.seconds = state["seconds"]
        self.skipped = list(state["skipped"])
        self.curve = [Point(**point) for point in state["curve"]]
        self.best = state["best"]

    def epochs_since_best(self) -> int:
        """How many epochs ago the greatest metric was; the earliest counts."""
        values = [point.metric for point in self.curve]
        return len(values) - 1 - values.index(max(values)) if values else 0


@dataclass(frozen=True)
class Plan:
    """How long and how: ``rate(step, steps)`` is the factor on every group's own learning rate.

    Gradients are clipped to a norm of ``clip_norm``. More than ``patience`` batches skipped in a row end the training.
    ``early_stop``: so many epochs without a better metric end it too, and the weights of the best epoch are what is
    left. For a metric on held-out training data only; None, the default: all epochs, and the last one's weights.
    """

    epochs: int
    rate: Rate
    clip_norm: float = 5.0
    patience: int = 5
    early_stop: int | None = None


def constant(step: int, steps: int) -> float:
    return 1.0


def cosine(step: int, steps: int, warm_up: float = 0.02) -> float:
    """Up from 0 over the first ``warm_up`` of all steps, then down to 0 along a half cosine."""
    first = max(1, round(warm_up * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


RATES: dict[str, Rate] = {"constant": constant, "cosine": cosine}


def train(
    training: Training,
    batches: Batches,
    loss: Loss,
    plan: Plan,
    *,
    evaluate: Callable[[nn.Module], float],
    checkpoint: Checkpoint | None = None,
    what: str = "training",
) -> Training:
    """Train for ``plan.epochs`` epochs in all, from the checkpoint's last point where there is one.

    ``evaluate`` is called with the model in eval mode behind every epoch and gives the curve. A batch with a loss or
    gradients that are not finite is skipped: it changes neither weights nor buffers, and its number is logged.

    Raises:
        TrainingError: too many batches in a row had to be skipped; ``training`` is as it was before them.
        ConfigError: the checkpoint is of a run with other settings.
    """
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        training.load_state_dict(state)
    length = len(batches.epoch(0))
    steps = plan.epochs * length
    often = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs fewer lines
    with tqdm(total=steps, initial=min(training.step, steps), desc=what, unit="batch", mininterval=often) as bar:
        while training.step < steps and not _stopped(training, plan):
            _epoch(training, batches, loss, plan, length, checkpoint, bar)
            mean = training.total / training.counted if training.counted else math.nan
            with evaluating(training.model), torch.no_grad():
                value = evaluate(training.model)
            training.curve.append(Point(training.step, mean, value))
            training.total, training.counted = 0.0, 0
            if plan.early_stop is not None and not training.epochs_since_best():
                training.best = copy.deepcopy(training.model.state_dict())
            bar.set_postfix(loss=f"{mean:.3f}", metric=f"{value:.2f}")
            if checkpoint is not None:
                checkpoint.save(training.state_dict())
    if training.best is not None:
        training.model.load_state_dict(training.best)
    training.model.eval()
    return training


def _stopped(training: Training, plan: Plan) -> bool:
    return plan.early_stop is not None and training.epochs_since_best() >= plan.early_stop


def _epoch(
    training: Training,
    batches: Batches,
    loss: Loss,
    plan: Plan,
    length: int,
    checkpoint: Checkpoint | None,
    bar: Any,
) -> None:
    """The rest of the epoch that ``training.step`` is in. Its end is not saved: the evaluation belongs to it."""
    number, start = divmod(training.step, length)
    epoch = batches.epoch(number)
    training.model.train()
    in_a_row, last = 0, time.perf_counter()
    for position in range(start, length):
        for group in training.optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * plan.rate(training.step, plan.epochs * length)
        try:
            _step(training, epoch[position], loss, plan.clip_norm)
            in_a_row = 0
        except TrainingError as error:
            log.warning("batch %d of epoch %d is skipped: %s", position, number, error)
            training.skipped.append(training.step)
            in_a_row += 1
            if in_a_row > plan.patience:
                raise
        training.step += 1
        training.seconds, last = training.seconds + time.perf_counter() - last, time.perf_counter()
        bar.update()
        if checkpoint is not None and position + 1 < length and checkpoint.due():
            checkpoint.save(training.state_dict())


def _step(training: Training, batch: Batch, loss: Loss, clip_norm: float) -> None:
    """One step of the optimizer.

    Raises:
        TrainingError: the loss or a gradient is not finite; nothing has changed but the random state.
    """
    # A forward pass moves batch-norm statistics and observed ranges before its loss is known.
    before = {name: buffer.clone() for name, buffer in training.model.named_buffers()}
    training.optimizer.zero_grad()
    value = loss(training.model, batch)
    try:
        training.schedule.check(value)
        value.backward()
        norm = nn.utils.clip_grad_norm_(training.model.parameters(), clip_norm)
        if not bool(norm.isfinite()):
            raise TrainingError(f"the gradients are not finite at step {training.step}", hint="lower the learning rate")
    except TrainingError:
        training.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in training.model.named_buffers():
                buffer.copy_(before[name])
        raise
    training.optimizer.step()
    training.schedule.step()
    training.total += value.item()
    training.counted += 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters only; biases, norms and learned step sizes, of one axis, have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
