"""What a saved model costs: bytes of the file, seconds from ``import qfx`` to the first output, and memory."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import qfx
from qfx.attributes import nbytes
from qfx.models import MODELS, build_resnet, random_images
from qfx.tools.bench_figures import Figure, Options, at_most

MIB = 2**20

_FIRST_OUTPUT = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
start, busy = time.perf_counter(), time.process_time()
import qfx
imported = time.perf_counter()
from qfx.attributes import nbytes
from qfx.tools.bench_child import settled, status
started = time.perf_counter()
before, anonymous = settled(), status("RssAnon")
went_on = time.perf_counter()
model = qfx.load(sys.argv[1], target=sys.argv[2])
loaded = time.perf_counter()
with torch.no_grad():
    model(torch.zeros(1, 3, int(sys.argv[4]), int(sys.argv[4])))
done, worked = time.perf_counter(), time.process_time()
skipped = went_on - imported
lines = [line for line in open("/proc/self/maps") if sys.argv[1] in line]
spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
tensors = [*model.parameters(), *model.buffers()]
mapped = [t for t in tensors if any(low <= t.data_ptr() < high for low, high in spans)]
print(json.dumps({
    "import": imported - start, "load": loaded - went_on, "first": done - loaded,
    "all": done - start - skipped, "cpu": worked - busy - skipped,
    "resident": settled() - before, "anonymous": status("RssAnon") - anonymous,
    "mapped": nbytes(mapped), "tensors": nbytes(tensors),
}))
"""
"""A program of its own, so that nothing of qfx is imported before its clock starts. What only measures is left out."""


def artifact(options: Options, *, depth: int = 50, rounds: int = 3, image_size: int = 224) -> Iterator[Figure]:
    """ResNet-50 in int8 and with 4-bit weights, and a transformer with 4 bits in groups: files, and loading the first.

    Weights of 4 bits have float16 scales. Groups of a convolution's input channels run on ``reference`` only, so that
    there is a second file with scales per output channel for convolutions. Seconds are counted from behind ``import
    torch`` to the first output of a new process, on one thread.
    """
    resnet, images = build_resnet(depth), random_images(image_size, batch=2)
    vit, patches = MODELS["vit_s16"]()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        what = "ResNet-50, all weights in 4 bits per group of 64, float16 scales, for reference"
        yield _size(what, resnet, images, _all_grouped(), file, dataclasses.replace(options, target="reference"), 0.15)
        what = "ResNet-50, 4-bit weights per channel, linear per group of 64, float16 scales"
        yield _size(what, resnet, images, _narrow(), file, options, 0.15)
        what = "ViT-S/16, linear weights in 4 bits per group of 64, float16 scales"
        yield _size(what, vit, patches, _grouped(), file, options, None)
        yield _size("ResNet-50, int8", resnet, images, qfx.Recipe.int8(), file, options, 0.26)
        runs = [_first_output(file, options.target, image_size) for _ in range(rounds)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    parts = ", ".join(f"{name} {median[name]:.2f}" for name in ("import", "load", "first"))
    note = f"{parts} s; {median['cpu']:.2f} s of CPU; {rounds} processes"
    yield Figure("ResNet-50, import qfx to first output", median["all"], "s", at_most(2), note)
    yield Figure(
        "ResNet-50, resident after the first output",
        median["resident"] / MIB,
        "MiB",
        note=f"{median['anonymous'] / MIB:.1f} of memory of its own; {median['mapped'] / MIB:.1f} of "
        f"{median['tensors'] / MIB:.1f} MiB of tensors stay mapped",
    )


def _grouped() -> qfx.Recipe:
    return qfx.Recipe.w4a16(64, scale_dtype=torch.float16)


def _all_grouped() -> qfx.Recipe:
    groups = _grouped().default.weight
    assert groups is not None
    inputs = dataclasses.replace(groups, granularity=qfx.PerGroup(64, axis=1))
    return qfx.Recipe("w4a16_g64_convolutions", qfx.QConfig(None, inputs))


def _narrow() -> qfx.Recipe:
    groups = _grouped().default.weight
    assert groups is not None
    channels = dataclasses.replace(groups, granularity=qfx.PerAxis(0))
    return qfx.Recipe.int8().set("*", weight=channels).set(op="linear", weight=groups, activation=None)


def _size(
    what: str,
    model: nn.Module,
    example: object,
    recipe: qfx.Recipe,
    file: Path,
    options: Options,
    bound: float | None,
) -> Figure:
    """Bytes of the file over those of the float state dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        qmodel = qfx.quantize(model, example, recipe=recipe, target=options.target, verbose=False)
    start = time.perf_counter()
    qfx.save(qmodel, file)
    seconds = time.perf_counter() - start
    size, floats = file.stat().st_size, nbytes([*model.parameters(), *model.buffers()])
    bar = at_most(bound) if bound is not None else None
    return Figure(what, size / floats, "x float", bar, f"{size / MIB:.1f} MiB, saved in {seconds:.1f} s")


def _first_output(file: Path, target: str, image_size: int, threads: int = 1) -> Mapping[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", _FIRST_OUTPUT, str(file), target, str(threads), str(image_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
