"""Batch-norm statistics measured anew on a trained model, before it is converted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qfx.errors import ConfigError
from qfx.examples import Example, calibration_call
from qfx.modes import evaluating
from qfx.shadow import undisturbed
from qfx.training_modules import LiveBatchNorm


def reestimate(prepared: nn.Module, data: Iterable[Any], example: Example) -> int:
    """Give every batch norm that the user had not frozen the plain average of its statistics over ``data``.

    The model computes as in eval mode otherwise, with rounding: no dropout, and no range moves. Returns the batches.

    Raises:
        ConfigError: there are no data.
    """
    live = [m for m in prepared.modules() if isinstance(m, LiveBatchNorm) and not m.frozen_by_user]
    momenta = [m.momentum for m in live]
    batches = 0
    try:
        with undisturbed(), evaluating(prepared):
            for number, item in enumerate(data):
                call = calibration_call(item, example, number)
                if not batches:
                    for norm in live:
                        norm.momentum, norm.training = None, True
                        norm.reset_running_stats()
                prepared(*call.args, **call.kwargs)
                batches += 1
    finally:
        for norm, momentum in zip(live, momenta, strict=True):
            norm.momentum = momentum
    if not batches:
        raise ConfigError("no data to estimate batch-norm statistics from", hint="pass an iterable of training inputs")
    return batches
