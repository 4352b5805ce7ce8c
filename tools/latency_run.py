"""One run: choose the candidates, give each a process, let them take turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from qfx.tools.latency_candidates import CANDIDATES, EAGER, PEERS, QFX, qfx_on
from qfx.tools.latency_child import command, quiet_environment
from qfx.tools.latency_result import Result, result
from qfx.tools.latency_turns import Outcome, processes_in_turns


def chosen(targets: Sequence[str], against: Sequence[str] = PEERS) -> list[str]:
    """The names of the candidates: qfx on each of ``targets``, float eager, and the peers of the groups ``against``."""
    groups = (EAGER, *against)
    return [*map(qfx_on, targets), *(name for name, of in CANDIDATES.items() if of.group in groups)]


def measured(
    model: str,
    batch: int,
    names: Sequence[str],
    *,
    threads: int,
    rounds: int = 9,
    seconds: float = 0.25,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Latency and SQNR of the candidates ``names`` on a model of ``qfx.models.MODELS`` at one batch size.

    Each of ``rounds`` rounds gives every one a burst of calls of ``seconds`` seconds, with ``threads`` threads. A
    candidate that cannot run, or fails, is among the result's reasons.
    """
    lacks = {name: reason for name in names if (reason := CANDIDATES[name].lacks())}
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: command(model, batch, name, threads, Path(folder)) for name in names if name not in lacks
        }
        ran = processes_in_turns(
            commands, rounds=rounds, seconds=seconds, environment=quiet_environment(threads), say=say
        )
    outcomes = {name: Outcome(failed=lacks[name]) if name in lacks else ran[name] for name in names}
    return result(model, batch, [name for name in names if CANDIDATES[name].group == QFX], outcomes)
