"""What all candidates compute: a reference model at one batch size, and data, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qfx.models import MODELS
from qfx.tools.bench_calls import resized

ROWS = 8
"""The least number of rows in a calibration batch and, over all calls, in the held-out inputs."""

CALIBRATION_SEEDS, HELD_OUT_SEED = (1, 2), 3


@dataclass(frozen=True)
class Subject:
    """Inputs are a tuple or a dict, as the model's example is.

    ``calibration`` and ``held_out`` have ``batch`` rows an item: engines compute one shape. ``folder`` is for files
    that several candidates read.
    """

    model: nn.Module
    example: Any
    calibration: tuple[Any, ...]
    held_out: tuple[Any, ...]
    folder: Path


def subject(name: str, batch: int, folder: Path) -> Subject:
    """The reference model ``name`` of seed 0, and inputs of other seeds.

    Two batches of at least ``ROWS`` rows calibrate; they come in pieces of ``batch`` rows.
    """
    model, example = MODELS[name]()
    rows = -(-ROWS // batch) * batch
    calibration = [piece for seed in CALIBRATION_SEEDS for piece in pieces(resized(example, rows, seed=seed), batch)]
    held_out = pieces(resized(example, rows, seed=HELD_OUT_SEED), batch)
    return Subject(model, example, tuple(calibration), tuple(held_out), folder)


def pieces(inputs: Any, rows: int) -> list[Any]:
    """``inputs`` cut along dimension 0 into pieces of ``rows`` rows."""
    if isinstance(inputs, dict):
        return [dict(zip(inputs, cut, strict=True)) for cut in pieces(tuple(inputs.values()), rows)]
    return list(zip(*(x.split(rows) for x in inputs), strict=True))
