"""A worked case: one model with its data, and what is done with it: float, PTQ and QAT at each bit width."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.modes import evaluating
from qfx.tools.qat_batches import Batch, Batches, call
from qfx.tools.qat_checkpoint import Checkpoint, Setting
from qfx.tools.qat_cost import cost
from qfx.tools.qat_loop import Loss, Plain, Plan, Training, parameter_groups, train
from qfx.tools.qat_recipes import OBSERVERS, Bits, observing
from qfx.tools.qat_results import Result


@dataclass(frozen=True)
class Case:
    """One float model and its task.

    ``evaluate`` gives the ``metric`` of a model in eval mode, on ``count`` examples that nothing else has seen;
    ``rising`` says that more is better. ``calibration`` are calls of the model, ``batches(seed)`` the training data.
    ``recipe`` is what QAT trains, ``lr`` the learning rate for it, and ``ptq_recipes`` what PTQ is tried with, by
    name. ``one`` is a call of one example: the example for capture, and what latency and memory are measured with.
    """

    task: str
    name: str
    model: nn.Module
    metric: str
    rising: bool
    count: int
    evaluate: Callable[[nn.Module], float]
    calibration: Sequence[Any]
    batches: Callable[[int], Batches]
    recipe: Callable[[Bits], qfx.Recipe]
    lr: Callable[[Bits], float]
    ptq_recipes: Callable[[Bits], Mapping[str, qfx.Recipe]]
    one: Any
    target: str = "auto"


@dataclass(frozen=True)
class Tuning:
    """The numbers of a training run; shares are of all its steps.

    ``distill`` is the weight of the distillation loss, 1 without the labels' own. Observers and batch-norm statistics
    freeze behind ``freeze_observers`` and ``freeze_batch_norm``; None: never. ``reestimate`` is the number of
    calibration batches from which batch-norm statistics are estimated anew before convert.
    """

    plan: Plan
    lr: float
    weight_decay: float
    optimizer: str = "sgd"
    distill: float = 0.0
    temperature: float = 1.0
    freeze_observers: float | None = None
    freeze_batch_norm: float | None = None
    reestimate: int = 0
    note: str = ""


def logits_of(output: Any) -> Tensor:
    """The logits of a model that returns them, or something with them under ``"logits"``."""
    found = output if isinstance(output, Tensor) else output["logits"]
    assert isinstance(found, Tensor)
    return found


def label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the last axis, where a label is not -100."""
    inputs, labels = batch
    return F.cross_entropy(logits_of(call(model, inputs)).flatten(0, -2), labels.flatten())


def distilled_loss(teacher: nn.Module, share: float, temperature: float) -> Loss:
    """``share`` of the distillation from ``teacher`` and the rest of :func:`label_loss`."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        counted = labels.flatten() != -100
        with torch.no_grad():
            wanted = logits_of(call(teacher, inputs)).flatten(0, -2)[counted]
        logits = logits_of(call(model, inputs)).flatten(0, -2)[counted]
        soft = qfx.distillation_loss(logits, wanted, temperature=temperature)
        return soft if share == 1 else share * soft + (1 - share) * F.cross_entropy(logits, labels.flatten()[counted])

    return loss


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}


def optimizer_of(model: nn.Module, tuning: Tuning) -> torch.optim.Optimizer:
    return OPTIMIZERS[tuning.optimizer](parameter_groups(model, tuning.weight_decay), tuning.lr)


def value_of(case: Case, model: nn.Module) -> float:
    """The metric of a model, which is in eval mode for it."""
    with evaluating(model), torch.no_grad():
        return case.evaluate(model)


def float_result(case: Case, reference: float) -> Result:
    """The float model's own row; ``reference`` is its metric."""
    return _costed(case, _result(case, "float", "", reference, reference), case.model)


def ptq_result(case: Case, bits: Bits, reference: float) -> Result:
    """Quantized after training, by the best recipe of all.

    The best is chosen by the metric itself, to PTQ's advantage: it is what QAT has to beat.
    """
    found: list[tuple[Result, nn.Module]] = []
    for name, recipe in case.ptq_recipes(bits).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qfx.QfxWarning)
            qmodel = qfx.quantize(
                case.model,
                case.one,
                calibration=case.calibration,
                recipe=recipe,
                target=case.target,
                verbose=False,
            )
        found.append((_result(case, "PTQ", str(bits), value_of(case, qmodel), reference, note=name), qmodel))
    return _costed(case, *min(found, key=lambda pair: pair[0].drop))


def qat_result(
    case: Case,
    bits: Bits,
    reference: float,
    tuning: Tuning,
    seed: int,
    *,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Quantized by training from the calibrated ranges.

    Raises:
        TrainingError: the loss was not finite too often; the last saved point can be continued from.
    """
    torch.manual_seed(seed)
    prepared = qfx.prepare(case.model, case.one, recipe=case.recipe(bits), target=case.target, mode="qat")
    qfx.calibrate(prepared, case.calibration)
    batches = case.batches(seed)
    steps = tuning.plan.epochs * len(batches.epoch(0))
    schedule = qfx.Schedule(
        prepared,
        freeze_observers=_step_of(tuning.freeze_observers, steps),
        freeze_batch_norm=_step_of(tuning.freeze_batch_norm, steps),
    )
    training = train(
        Training(prepared, optimizer_of(prepared, tuning), schedule),
        batches,
        distilled_loss(case.model, tuning.distill, tuning.temperature) if tuning.distill else label_loss,
        tuning.plan,
        evaluate=case.evaluate,
        checkpoint=checkpoint,
        what=f"{case.name} {bits} seed {seed}",
    )
    if tuning.reestimate:
        qfx.reestimate_batch_norm(prepared, case.calibration[: tuning.reestimate])
    qmodel = qfx.convert(prepared.eval(), check=True)
    result = _result(
        case,
        "QAT",
        str(bits),
        value_of(case, qmodel),
        reference,
        note=tuning.note,
        seed=seed,
        epochs=tuning.plan.epochs,
        seconds=training.seconds,
        curve=tuple(training.curve),
    )
    return _costed(case, result, qmodel)


def train_float(
    model: nn.Module, batches: Batches, tuning: Tuning, evaluate: Callable[[nn.Module], float], **options: Any
) -> Training:
    """Train a float model in place, with the loop that QAT has; ``options`` as for :func:`qfx.tools.qat_loop.train`."""
    training = Training(model, optimizer_of(model, tuning), Plain())
    return train(training, batches, label_loss, tuning.plan, evaluate=evaluate, **options)


def checkpoint_of(folder: Path | None, name: str, settings: Mapping[str, Setting], every: float) -> Checkpoint | None:
    """The checkpoint file ``name`` in ``folder``; none without a folder."""
    return None if folder is None else Checkpoint(folder / f"{name}.pt", settings, every)


def tried_observers(recipe: qfx.Recipe) -> dict[str, qfx.Recipe]:
    """The recipe with each of the observers that PTQ is tried with, by their name."""
    return {name: observing(recipe, *pair) for name, pair in OBSERVERS.items()}


def _step_of(share: float | None, steps: int) -> int | None:
    return None if share is None else round(share * steps)


def _result(case: Case, method: str, bits: str, value: float, reference: float, **more: Any) -> Result:
    return Result(case.task, case.name, method, bits, case.metric, case.rising, value, reference, case.count, **more)


def _costed(case: Case, result: Result, model: nn.Module) -> Result:
    found = cost(model, case.model, case.one)
    return replace(
        result,
        bytes=found.bytes,
        peak_bytes=found.peak_bytes,
        latency_ms=found.latency_ms,
        speedup=found.speedup,
    )
