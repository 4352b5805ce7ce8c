"""``python -m qfx.tools.bench_latency MODEL BATCH``: latency, SQNR and ratio to the best peer, all from one run.

Every candidate has a process of its own; they are prepared one after the other and then take turns in rounds, so that
at any moment one computes. All have the same number of threads, calibration data and held-out inputs. The exit status
is 1 where a bar is missed or qfx fails; a peer that fails is a line with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from qfx.models import MODELS
from qfx.targets import TARGETS
from qfx.tools.bench_figures import Figure, table
from qfx.tools.env import installed_version, machine
from qfx.tools.latency_bars import judged
from qfx.tools.latency_candidates import CANDIDATES, PEERS, QFX
from qfx.tools.latency_result import Result
from qfx.tools.latency_run import chosen, measured
from qfx.tools.latency_table import plain, text
from qfx.tools.roofline import of_reference_model

PACKAGES = ("torchao", "onnxruntime", "openvino", "nncf")


def names(value: str, known: Sequence[str]) -> list[str]:
    """The parts of a list with commas, each once and in order.

    Raises:
        argparse.ArgumentTypeError: one is not in ``known``.
    """
    parts = list(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [part for part in parts if part not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return parts


def positive(value: str) -> int:
    """A number of things, of which there is at least one."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number above 0")
    return int(value)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m qfx.tools.bench_latency", description="Compare the latency of qfx and its peers on one model."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", choices=tuple(MODELS), help="of " + ", ".join(MODELS))
    add("batch", metavar="BATCH", type=positive, help="rows of each call")
    fast = [name for name in TARGETS if name != "reference"]
    shown = ",".join(fast)
    targets = partial(names, known=tuple(TARGETS))
    add("--against", type=partial(names, known=PEERS), default=PEERS, metavar="PEER,...", help="default: all")
    add("--targets", type=targets, default=fast, metavar="TARGET,...", help=f"of qfx; default: {shown}")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="of each, default: %(default)s")
    add("--rounds", type=positive, default=9, metavar="R", help="turns of each, default: %(default)s")
    add("--roofline", action="store_true", help="show each step of native: time, TOPS, share of the measured int8 peak")
    add("--json", type=Path, metavar="FILE", help="write everything to this file too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, measure: Callable[..., Result] = measured) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    versions = ", ".join(f"{name} {installed_version(name)}" for name in PACKAGES)
    facts = [*machine(), ("peers", versions), ("model", f"{given.model}, batch {given.batch}, {given.rounds} rounds")]
    print(tabulate(facts, tablefmt="plain", disable_numparse=True), end="\n\n", flush=True)
    found = measure(
        given.model,
        given.batch,
        chosen(given.targets, given.against),
        threads=given.threads,
        rounds=given.rounds,
        say=lambda what: print(f"  {what}", file=sys.stderr, flush=True),
    )
    bars = list(judged(found))
    print(text(found))
    if bars:
        print(f"\n{table(bars)}")
    if given.roofline:
        print(f"\n{of_reference_model(given.model, given.batch)}", end="")
    if given.json:
        written = {"machine": dict(facts), **plain(found), "bars": [_plain(bar) for bar in bars]}
        given.json.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    broken = [name for name in found.reasons if CANDIDATES[name].group == QFX and not CANDIDATES[name].lacks()]
    return 1 if broken or not all(bar.good for bar in bars) else 0


def _plain(bar: Figure) -> dict[str, object]:
    return dataclasses.asdict(bar) | {"verdict": bar.verdict}


if __name__ == "__main__":
    sys.exit(main())
