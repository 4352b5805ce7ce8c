"""Measurements that need a process of their own: a first call, and memory.

Run as ``python -m qfx.tools.bench_child NAME ARGUMENT ...``; it prints one line of JSON. :func:`fresh` does so.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import qfx
from qfx.attributes import nbytes
from qfx.models import MODELS, MODELS_SMALL
from qfx.tools.bench_calls import call, resized
from qfx.tools.bench_learners import learner


def fresh(name: str, *arguments: str) -> dict[str, float]:
    """Run the measurement ``name`` in a new interpreter.

    Raises:
        RuntimeError: it failed; the text is the last of what it wrote to stderr.
    """
    command = [sys.executable, "-m", "qfx.tools.bench_child", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{name} {' '.join(arguments)}: {last[0]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def first_quantize(model_name: str, batch: str, target: str) -> dict[str, float]:
    """Seconds of the first and the second ``quantize`` of a process, of one model and one calibration batch."""
    model, example = MODELS[model_name]()
    data = [resized(example, int(batch))]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        qfx.quantize(model, example, calibration=data, target=target, verbose=False)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1]}


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(path: str, small: str, what: str, target: str) -> dict[str, float]:
    """Resident bytes around one thing done to the model and example in the file ``path``.

    ``what`` is ``forward``, ``quantize`` or ``inplace``. The model called ``small`` goes through the same first, so
    that libraries, code and thread pools are there already and are not counted. ``before``: without the model;
    ``loaded``: with it; ``peak``: the most while it ran; ``after``: at its end; ``weights``: of the float model.
    """
    act = ACTIONS[what]
    model, example = MODELS_SMALL[small]()
    act(model, example, target)
    del model
    before = settled()
    model, example = torch.load(path, map_location="cpu", weights_only=False)
    weights = nbytes([*model.parameters(), *model.buffers()])
    loaded = settled()
    reset_peak()
    result = act(model, example, target)
    peak = status("VmHWM")
    after = settled()
    del result
    return {"before": before, "loaded": loaded, "peak": peak, "after": after, "weights": weights}


def _quantize(model: torch.nn.Module, example: object, target: str, *, inplace: bool = False) -> object:
    return qfx.quantize(model, example, calibration=[example], target=target, inplace=inplace, verbose=False)


ACTIONS: dict[str, Callable[[torch.nn.Module, object, str], object]] = {
    "forward": lambda model, example, _: call(model, example),
    "quantize": _quantize,
    "inplace": lambda model, example, target: _quantize(model, example, target, inplace=True),
}


def settled() -> int:
    """Resident bytes after what is free went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(field: str) -> int:
    """A field of Linux's /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now (see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def training_memory(name: str, what: str) -> dict[str, float]:
    """Resident bytes of three training steps of the learner ``what``; ``before``: with libraries, without its model."""
    learner(name, what, small=True)()
    before = settled()
    step = learner(name, what)
    loaded = settled()
    reset_peak()
    for _ in range(3):
        step()
    return {"before": before, "loaded": loaded, "peak": status("VmHWM")}


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "first-quantize": first_quantize,
    "memory": memory,
    "training-memory": training_memory,
}


def main() -> None:
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", qfx.QfxWarning)
    name, *arguments = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[name](*arguments)))


if __name__ == "__main__":
    main()
