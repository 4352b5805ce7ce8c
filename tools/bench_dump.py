"""What a dump's page costs: seconds of the whole command, and bytes of the file."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qfx.tools.bench_figures import Figure, Options, at_most

MIB = 2**20


def dump_page(options: Options, *, model: Sequence[str] = ("resnet50",), rounds: int = 3) -> Iterator[Figure]:
    """``qfx-dump resnet50 --format html`` in processes of its own: medians of their wall time, the file's size.

    Import of torch, quantization, measurements and the page are all in it; compiling qfx to bytecode, which installing
    does, is so in the first process only.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        command = [*model, "--format", "html", "--target", options.target, "--output", str(file)]
        seconds = [_run(command) for _ in range(rounds)]
        size = file.stat().st_size
    what = f"qfx-dump {' '.join(model)} --format html"
    yield Figure(what, statistics.median(seconds), "s", at_most(10), f"{rounds} processes")
    yield Figure(f"{what}: the file", size / MIB, "MiB", at_most(3), f"{size:,} bytes")


def _run(arguments: Sequence[str]) -> float:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qfx.tools.dump", *arguments], env=kept | threads, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"qfx-dump failed: {done.stderr.strip()[-2000:]}")
    return seconds
