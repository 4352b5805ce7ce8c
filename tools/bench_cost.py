"""What ``quantize`` itself costs: seconds and memory."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import qfx
from qfx.models import MODELS, build_resnet, random_images
from qfx.tools.bench_child import ACTIONS, fresh
from qfx.tools.bench_figures import Figure, Options, Skip, at_most

MIB = 2**20


def quantize_time(options: Options, *, rounds: int = 3, image_size: int = 224, batch: int = 8) -> Iterator[Figure]:
    """Seconds of ``quantize`` with one calibration batch: ResNet-18, and ResNet-200 against ResNet-50 in turns.

    The first call in a process loads parts of torch (export, symbolic shapes) and compiles or loads the loops of qfx;
    the second is the work itself. Both must keep the bar.
    """
    runs = [fresh("first-quantize", "resnet18", str(batch), options.target) for _ in range(rounds)]
    first, second = (statistics.median(run[name] for run in runs) for name in ("first", "second"))
    note = f"one batch of {batch}, {rounds} processes"
    yield Figure("ResNet-18, first call of a process", first, "s", at_most(3), note)
    yield Figure("ResNet-18, second call", second, "s", at_most(3), note)
    yield _depths(build_resnet(50), build_resnet(200), options, rounds, image_size, batch)


def _depths(
    shallow: nn.Module, deep: nn.Module, options: Options, rounds: int, image_size: int, batch: int
) -> Figure:
    ratios, times = [], []
    for _ in range(rounds):
        pair = [_seconds(model, options, image_size, batch) for model in (shallow, deep)]
        times.append(pair)
        ratios.append(pair[1] / pair[0])
    note = "medians {:.2f} s and {:.2f} s".format(*(statistics.median(column) for column in zip(*times, strict=True)))
    return Figure("ResNet-200 over ResNet-50", statistics.median(ratios), "x", at_most(5), f"{note}, {rounds} rounds")


def _seconds(model: nn.Module, options: Options, image_size: int, batch: int) -> float:
    data = [random_images(image_size, batch=batch)]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        qfx.quantize(model, data[0][:1], calibration=data, target=options.target, verbose=False)
    return time.perf_counter() - start


def memory(options: Options, *, names: Sequence[str] = ("resnet50", "bert_base"), rounds: int = 3) -> Iterator[Figure]:
    """Resident memory of ``quantize`` in units of the float weights, each measured in a process of its own.

    Medians of ``rounds`` processes: what the allocator keeps of freed memory differs from one to the next.

    The rise is the peak during ``quantize`` over what is resident with the model loaded; one forward pass's own rise,
    measured the same way, is taken off. With ``inplace=True`` it is the peak over what is resident without the model.
    """
    if sys.platform != "linux":
        raise Skip("reads /proc, which Linux has")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.pt"
            torch.save(MODELS[name](), file)
            runs = {
                what: _medians([fresh("memory", str(file), name, what, options.target) for _ in range(rounds)])
                for what in ACTIONS
            }
        yield from _memory_figures(name, runs)


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Resident bytes over what there was before, and the weights' bytes: the median of each."""
    over = [{name: run[name] - run["before"] for name in run} | {"weights": run["weights"]} for run in runs]
    return {name: statistics.median(run[name] for run in over) for name in over[0]}


def _memory_figures(name: str, runs: Mapping[str, Mapping[str, float]]) -> Iterator[Figure]:
    forward, plain, inplace = runs["forward"], runs["quantize"], runs["inplace"]
    weights = plain["weights"]
    passed = forward["peak"] - forward["loaded"]
    rise = plain["peak"] - plain["loaded"]
    both = inplace["peak"]
    yield Figure(
        f"{name}: rise, less one forward pass",
        (rise - passed) / weights,
        "x weights",
        at_most(1.0),
        f"weights {weights / MIB:.1f} MiB, rise {rise / MIB:.1f}, forward pass {passed / MIB:.1f}, "
        f"left at the end {(plain['after'] - plain['loaded']) / MIB:.1f}",
    )
    yield Figure(
        f"{name}: inplace, peak of model and quantize",
        both / weights,
        "x weights",
        at_most(1.4),
        f"peak {both / MIB:.1f} MiB, left at the end {inplace['after'] / MIB:.1f}",
    )
