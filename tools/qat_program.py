"""What the worked cases' programs have in common: options, the order of the work, the table, errors in plain words."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qfx.errors import QfxError
from qfx.targets import TARGETS
from qfx.tools.bench_figures import Skip, need
from qfx.tools.qat_case import Case, Tuning, checkpoint_of, float_result, ptq_result, qat_result, value_of
from qfx.tools.qat_checkpoint import Checkpoint, Setting
from qfx.tools.qat_loop import RATES, Plan
from qfx.tools.qat_plot import plot
from qfx.tools.qat_recipes import parse_bits
from qfx.tools.qat_results import METHODS, Result, append
from qfx.tools.qat_table import table

# Options that do not change what a training run computes: a checkpoint may be continued with others.
ELSEWHERE = {"data", "bits", "seeds", "phases", "checkpoint", "save_every", "json", "plot", "reestimate"}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every option with its default."""


def _list(text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.split(","))


def _phase(text: str) -> str:
    names = {name.lower(): name for name in METHODS}
    if text.strip().lower() not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
    return names[text.strip().lower()]


def parser(name: str, description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of all worked cases, with this case's own defaults."""
    made = argparse.ArgumentParser(
        prog=f"python -m qfx.tools.{name}",
        description=description,
        formatter_class=_Help,
    )
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of real data and weights")
    add("--bits", type=parse_bits, metavar="W[/A],...", help="bit widths of weights and activations, such as 8,4/8,2")
    add("--seeds", type=partial(_list, kind=int), default="0", metavar="N,...", help="one QAT run for each")
    add("--phases", type=partial(_list, kind=_phase), default="float,ptq,qat", help="which rows to make")
    add("--epochs", type=int, metavar="N", help="of QAT")
    add("--batch", type=int, metavar="N", help="examples of a training batch")
    add("--lr", type=float, help="learning rate of QAT; None: one that suits the bits")
    add("--rate", choices=tuple(RATES), default="cosine", help="how the learning rate goes on")
    add("--weight-decay", type=float, metavar="X", help="of matrices and filters")
    add("--clip-norm", type=float, default=5.0, metavar="X", help="the greatest norm of a gradient")
    add("--distill", type=float, nargs="?", const=1.0, default=0.0, metavar="SHARE", help="of the float model's logits")
    add("--temperature", type=float, default=1.0, metavar="T", help="of distillation")
    add("--freeze-observers", type=float, metavar="SHARE", help="stop moving ranges behind this share of the steps")
    add("--freeze-batch-norm", type=float, metavar="SHARE", help="stop batch-norm statistics behind this share")
    add("--reestimate", type=int, default=0, metavar="N", help="re-estimate batch norm on N calibration batches")
    add("--checkpoint", type=Path, metavar="DIR", help="save here, and go on from what is here")
    add("--save-every", type=float, default=120.0, metavar="S", help="seconds between saves within an epoch")
    add("--json", type=Path, metavar="FILE", help="append a line for every row of the table")
    add("--plot", type=Path, metavar="FILE", help="draw the curves into this file (needs matplotlib)")
    add("--target", default="auto", choices=("auto", *TARGETS), help="what runs the integers")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="threads of torch")
    made.set_defaults(**defaults)
    return made


def tuning_of(given: argparse.Namespace, lr: float, *, optimizer: str, limit: int | None) -> Tuning:
    """The options of the command line that decide a QAT run; ``limit``: of the training examples, None for all."""
    notes = ("distilled" if given.distill else "", f"{limit} examples" if limit else "")
    return Tuning(
        plan=Plan(given.epochs, RATES[given.rate], given.clip_norm),
        lr=lr,
        weight_decay=given.weight_decay,
        optimizer=optimizer,
        distill=given.distill,
        temperature=given.temperature,
        freeze_observers=given.freeze_observers,
        freeze_batch_norm=given.freeze_batch_norm,
        reestimate=given.reestimate,
        note=", ".join(filter(None, notes)),
    )


def settings_of(given: argparse.Namespace, **more: Setting) -> dict[str, Setting]:
    """What a checkpoint holds a run to: every option that changes what it computes."""
    held = {name: value for name, value in vars(given).items() if name not in ELSEWHERE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in held.items()} | more


def float_checkpoint(given: argparse.Namespace, name: str, options: Sequence[str]) -> Checkpoint | None:
    """The checkpoint of float training, which depends on these options only."""
    settings = {option: getattr(given, option) for option in (*options, "threads")}
    return checkpoint_of(given.checkpoint, f"{name}_float", settings, given.save_every)


def run(case: Case, given: argparse.Namespace, tuning: Callable[[float], Tuning]) -> list[Result]:
    """Do the phases that were asked for; every finished row goes to ``--json`` at once.

    ``tuning`` gives the rest of the numbers to a learning rate.
    """
    results: list[Result] = []

    def keep(result: Result) -> None:
        results.append(result)
        if given.json:
            append(given.json, result)

    reference = value_of(case, case.model)
    if "float" in given.phases:
        keep(float_result(case, reference))
    for bits in given.bits:
        if "PTQ" in given.phases:
            keep(ptq_result(case, bits, reference))
        lr = case.lr(bits) if given.lr is None else given.lr
        for seed in given.seeds if "QAT" in given.phases else ():
            name = f"{case.name}_{bits}_seed{seed}"
            settings = settings_of(given, width=str(bits), seed=seed, lr=lr)
            checkpoint = checkpoint_of(given.checkpoint, name, settings, given.save_every)
            keep(qat_result(case, bits, reference, tuning(lr), seed, checkpoint=checkpoint))
    print(table(results))
    if given.plot:
        plot(results, given.plot)
    return results


def program(
    given: argparse.Namespace, case_of: Callable[[argparse.Namespace], Case], *, optimizer: str, limit: int | None
) -> int:
    """A program's work, and its exit status; what its user can mend is told in words, not as a traceback."""
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(given.threads)
    try:
        if given.plot:
            need("matplotlib")  # before hours of work, not behind them
        run(case_of(given), given, partial(tuning_of, given, optimizer=optimizer, limit=limit))
    except (Skip, QfxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: with --checkpoint, the same command goes on from the last saved point", file=sys.stderr)
        return 130
    return 0
