"""A program that trains a prepared model for some steps, from a checkpoint or the start, and saves all there is.

``python resume.py RECIPE OPTIMIZER FIRST LAST FROM TO``: from step FIRST to LAST; FROM is a checkpoint or ``-``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qfx

RECIPES = {
    "moving": qfx.Recipe.preset("int8"),
    "learned": qfx.Recipe.w4a4_lsq(),
    "fixed": qfx.Recipe(
        "fixed",
        qfx.QConfig(
            *(
                replace(spec, ranges=qfx.Fixed())
                for spec in (qfx.Recipe.preset("int8").default.activation, qfx.Recipe.preset("int8").default.weight)
                if spec is not None
            )
        ),
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.002),
}


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )


def run(recipe: str, optimizer_name: str, first: int, last: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Train from step ``first`` to ``last``; the state then, and the losses."""
    prepared = qfx.prepare(net(), torch.zeros(4, 3, 6, 6), recipe=RECIPES[recipe], mode="qat")
    optimizer = OPTIMIZERS[optimizer_name](prepared.parameters())
    bits = {0: 8, 3: 6, 6: 4} if recipe == "learned" else None
    schedule = qfx.Schedule(prepared, float_steps=2, bits=bits, freeze_observers=8, freeze_batch_norm=7)
    torch.manual_seed(11)
    if before is not None:
        prepared.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        schedule.load_state_dict(before["schedule"])
        torch.set_rng_state(before["random"])
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, labels = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), labels)
        schedule.check(loss)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {
        "model": prepared.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


if __name__ == "__main__":
    recipe, optimizer_name, first, last, source, target = sys.argv[1:]
    before = None if source == "-" else torch.load(source, weights_only=True)
    torch.save(run(recipe, optimizer_name, int(first), int(last), before), Path(target))
