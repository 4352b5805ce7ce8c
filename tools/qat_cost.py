"""What a model costs to run: bytes, peak memory and latency.

``python -m qfx.tools.qat_cost FILE`` is the process in which :func:`peak_bytes` measures memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qfx.attributes import nbytes
from qfx.tools.bench_calls import call
from qfx.tools.bench_child import reset_peak, settled, status
from qfx.tools.bench_timing import Candidate, take_turns


@dataclass(frozen=True)
class Cost:
    """``bytes`` of parameters and buffers, tied ones once; ``peak_bytes`` as :func:`peak_bytes` gives it."""

    bytes: int
    peak_bytes: int | None
    latency_ms: float
    speedup: float


def cost(model: nn.Module, float_model: nn.Module, inputs: Any) -> Cost:
    """The cost of ``model`` called with ``inputs``, beside the float model in the same minute."""
    candidates = [Candidate(name, partial(call, m, inputs)) for name, m in (("it", model), ("float", float_model))]
    times = take_turns(candidates, rounds=5, seconds=0.1)
    size = nbytes([*model.parameters(), *model.buffers()])
    return Cost(size, peak_bytes(model, inputs), times.ms("it"), times.speedup("it", over="float"))


def peak_bytes(model: nn.Module, inputs: Any) -> int | None:
    """Resident memory, at its peak, that loading the model and one call with ``inputs`` take, in a process of its own.

    None where the system does not tell it: /proc is Linux's.

    Raises:
        RuntimeError: the process failed; the text is the last of what it wrote.
    """
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save((model, inputs, torch.get_num_threads()), file)
        command = [sys.executable, "-m", "qfx.tools.qat_cost", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"measuring memory: {last[0]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(path: str) -> int:
    """Bytes over what is resident without the model, libraries and thread pools being there already."""

    def load() -> tuple[nn.Module, Any]:
        model, inputs, threads = torch.load(path, map_location="cpu", weights_only=False)
        torch.set_num_threads(threads)
        return model, inputs

    call(*load())
    before = settled()
    model, inputs = load()
    settled()
    reset_peak()
    call(model, inputs)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
