"""Processes that take turns: each candidate has one of its own, they live side by side, and one computes at a time.

This is the parent's side. What one library does to the threads, allocators or settings of its process cannot disturb
another candidate. All are prepared first, one after the other, and then each round gives every one a burst of calls, so
that a busy machine slows all of them alike.

A child reads lines of JSON from stdin and answers on stdout, as :mod:`qfx.tools.latency_child` does. When it is ready
it says ``{"ready": FACTS}``; to ``{"seconds": S}`` it says ``{"ms": [...]}``, the times of a burst; and at any time it
may say ``{"failed": WHY}`` and end. Between its turns it waits for a line, which costs nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from qfx.tools.bench_timing import rotated

PATIENCE = 1800.0
"""Seconds that a child may take to prepare itself, or for one turn."""


@dataclass(frozen=True)
class Outcome:
    """What a child said of itself, and the milliseconds of each call of each round; or why there are none."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[tuple[float, ...], ...] = ()
    failed: str = ""


class ChildError(Exception):
    """A child cannot go on; the text says why, in its own words where it had any."""


def processes_in_turns(
    commands: Mapping[str, Sequence[str]],
    *,
    rounds: int,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Outcome]:
    """Run ``commands``, name by name, and let them compute in turns: ``rounds`` bursts of ``seconds`` each.

    Every round begins with another one. Whoever fails leaves, whatever round it is, and the others go on. ``say`` is
    told what comes next. ``environment``: None for this process's own.
    """
    failed: dict[str, str] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    times: dict[str, list[tuple[float, ...]]] = {}
    with ExitStack() as stack:
        children: dict[str, _Child] = {}
        for name, command in commands.items():
            say(f"preparing {name}")
            child = stack.enter_context(_Child(command, os.environ if environment is None else environment, patience))
            try:
                facts[name] = child.answer("ready")
            except ChildError as error:
                failed[name] = str(error)
                child.end()
            else:
                children[name], times[name] = child, []
        for round_ in range(rounds):
            say(f"round {round_ + 1} of {rounds}")
            for name in rotated(list(children), round_):
                try:
                    times[name].append(tuple(children[name].ask({"seconds": seconds}, "ms")))
                except ChildError as error:
                    failed[name] = str(error)
                    children.pop(name).end()
    return {
        name: Outcome(failed=failed[name]) if name in failed else Outcome(facts[name], tuple(times[name]))
        for name in commands
    }


class _Child:
    """One process. What it writes to stderr goes to a file, of which the last line is read where it dies."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float) -> None:
        self._patience = patience
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (as long as the process)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, bufsize=1, env=environment
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, question: Any, key: str) -> Any:
        """Send ``question``, and wait for the answer.

        Raises:
            ChildError: as for :meth:`answer`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
        except BrokenPipeError as error:
            raise ChildError(self._last_words()) from error
        return self.answer(key)

    def answer(self, key: str) -> Any:
        """What the next line has under ``key``.

        Raises:
            ChildError: it failed, ended, said nothing in time, or said something else.
        """
        assert self._process.stdout is not None
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._patience, expire)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set():
            raise ChildError(f"no answer within {self._patience:g} s")
        if not line:
            raise ChildError(self._last_words())
        try:
            said = json.loads(line)
        except ValueError as error:
            raise ChildError(f"not an answer: {line.strip()[:200]}") from error
        if "failed" in said:
            raise ChildError(said["failed"])
        return said[key]

    def _last_words(self) -> str:
        """How the process ended, and the last line of its stderr."""
        status = self._process.wait()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return ": ".join([how, *lines[-1:]])

    def end(self) -> None:
        """End the process by force: it holds nothing that anyone needs."""
        self._process.kill()
        with suppress(BrokenPipeError), self._process:  # what stands in its input is for nobody any more
            pass
        self._log.close()
