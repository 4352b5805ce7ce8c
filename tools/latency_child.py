"""One candidate in a process of its own, the child's side of :mod:`qfx.tools.latency_turns`.

``python -m qfx.tools.latency_child MODEL BATCH CANDIDATE THREADS FOLDER`` prepares the candidate, measures its SQNR
against fp32 eager on held-out inputs, and then computes whenever it is told to.

Threads that have nothing to do spin for a while before they sleep, OpenMP's as well as those of ONNX Runtime, and are
back at work the sooner for it. That stays as it is by default, so that every candidate is as fast as it can be. A turn
therefore ends only when the process has gone to sleep, and the next candidate has the cores to itself;
:func:`quiet_environment` sees to it that no thread spins for ever.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

import qfx
from qfx.metrics import sqnr_db
from qfx.structure import flatten
from qfx.tools.bench_calls import call
from qfx.tools.bench_figures import brief
from qfx.tools.bench_timing import burst
from qfx.tools.latency_candidates import CANDIDATES, Ready
from qfx.tools.latency_subject import Subject, subject

Burst = Callable[[float], Sequence[float]]

IDLE_SECONDS, IDLE_SHARE, IDLE_LIMIT = 0.02, 0.1, 5.0
"""A process sleeps where it used less than the share of one core for so many seconds; how long to wait for it."""


def command(model: str, batch: int, candidate: str, threads: int, folder: Path) -> list[str]:
    """The command line of this program."""
    return [sys.executable, "-m", "qfx.tools.latency_child", model, str(batch), candidate, str(threads), str(folder)]


def quiet_environment(threads: int) -> dict[str, str]:
    """This process's environment, for children with so many threads, which sleep soon after they have worked."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return kept | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "20"}


def serve(prepare: Callable[[], tuple[Mapping[str, Any], Burst]]) -> None:
    """Prepare, say so, and answer each line of stdin with the times of one burst, until there are no more lines.

    What libraries print goes to stderr: stdout is for the answers alone.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            facts, work = prepare()
            _sleep()
            _say(answers, {"ready": facts})
            for line in sys.stdin:
                times = work(json.loads(line)["seconds"])
                _sleep()
                _say(answers, {"ms": list(times)})
        except Exception as error:  # whatever a peer's library raises, the parent shows it beside the others' figures
            traceback.print_exc()
            _say(answers, {"failed": brief(error)})


def _say(answers: TextIO, what: Mapping[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _sleep() -> None:
    """Return when no thread of this process computes any more.

    Raises:
        RuntimeError: some still did after ``IDLE_LIMIT`` seconds, which would cost the others' figures.
    """
    end = time.monotonic() + IDLE_LIMIT
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(IDLE_SECONDS)
        if time.process_time() - before < IDLE_SHARE * IDLE_SECONDS:
            return
    raise RuntimeError(f"threads go on computing for more than {IDLE_LIMIT:g} s behind the last call")


def prepared(of: Subject, make: Callable[[Subject], Ready]) -> tuple[Mapping[str, Any], Burst]:
    """What the parent is told of a candidate, and its bursts of calls with the first of the held-out inputs."""
    ready = make(of)
    with torch.inference_mode():
        found = [flatten(ready.run(inputs))[0] for inputs in of.held_out]
        wanted = [flatten(call(of.model, inputs))[0] for inputs in of.held_out]
    facts = {"computes": ready.computes, "note": ready.note, "sqnr_db": lowest_sqnr_db(wanted, found)}

    def work(seconds: float) -> Sequence[float]:
        with torch.inference_mode():
            return burst(partial(ready.run, of.held_out[0]), seconds)

    return facts, work


def lowest_sqnr_db(wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """The lowest SQNR, in dB, of the floating-point outputs, each over all calls: ``[call][output]``, in float32."""
    outputs = [i for i, x in enumerate(wanted[0]) if x.is_floating_point()]
    return min(sqnr_db(*(torch.cat([call_[i].float() for call_ in side]) for side in (wanted, found))) for i in outputs)


def main() -> None:
    model, batch, candidate, threads, folder = sys.argv[1:]
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore", qfx.QfxWarning)
    serve(lambda: prepared(subject(model, int(batch), Path(folder)), CANDIDATES[candidate].make))


if __name__ == "__main__":
    main()
