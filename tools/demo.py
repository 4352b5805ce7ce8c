"""The demo: train a small ResNet on scikit-learn's digits, quantize it, and show what that cost and gained.

Run: ``python -m qfx.tools.demo``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn

import qfx
from qfx import jit
from qfx.attributes import nbytes
from qfx.models.digits import train_digits


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` ``[N, 1, 8, 8]`` whose largest logit is their label, in [0, 1]."""
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).double().mean())


def latencies_ms(models: Sequence[nn.Module], inputs: Tensor, rounds: int = 60) -> list[float]:
    """Median milliseconds of a call of each model on ``inputs``; the models take turns, so that noise hits all."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_ in range(rounds + 5):
            for model, seen in zip(models, times, strict=True):
                start = time.perf_counter()
                model(inputs)
                if round_ >= 5:
                    seen.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(seen) for seen in times]


def size_kib(model: nn.Module) -> float:
    """Kibibytes of all parameters and buffers."""
    return nbytes([*model.parameters(), *model.buffers()]) / 1024


def bits_table(qmodel: nn.Module) -> str:
    """The bits that a search gave each layer, and the scores it went by."""
    found = qfx.report(qmodel).allocation
    assert found is not None
    rows = [
        (layer.path, str(layer.numel), str(choice), found.why(layer, choice))
        for layer, choice in zip(found.sensitivity.layers, found.choices, strict=True)
    ]
    return str(tabulate(rows, ("layer", "weights", "bits", "why"), disable_numparse=True))


def main() -> None:
    print("Training a small ResNet on scikit-learn's digits ...")
    start = time.perf_counter()
    model, (test_images, test_labels), (train_images, _) = train_digits()
    print(f"done in {time.perf_counter() - start:.1f} s\n")
    batches = list(train_images[:256].split(32))
    start = time.perf_counter()
    qmodel = qfx.quantize(model, (train_images[:1],), calibration=batches)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    auto = qfx.quantize(model, (train_images[:1],), calibration=batches, recipe="auto", verbose=False)
    search = time.perf_counter() - start
    print(f"\nWith recipe='auto', {search:.1f} s, each layer's bits come from its sensitivity:\n")
    print(bits_table(auto))
    one, many = test_images[:1], test_images[:64]
    models = {"float": model, "int8": qmodel, "auto": auto}
    if jit.unavailable() is None:
        native = qfx.quantize(model, (train_images[:1],), calibration=batches, target="native", verbose=False)
        models["int8, native"] = native
    rows = [
        ("accuracy on held-out images", *(f"{accuracy(m, test_images, test_labels):.2%}" for m in models.values())),
        ("weights and buffers, KiB", *(f"{size_kib(m):.1f}" for m in models.values())),
        ("latency, batch 1, ms", *(f"{ms:.3f}" for ms in latencies_ms([*models.values()], one))),
        ("latency, batch 64, ms", *(f"{ms:.3f}" for ms in latencies_ms([*models.values()], many))),
    ]
    print(f"\nquantize took {seconds:.1f} s; {len(test_images)} held-out images\n")
    print(tabulate(rows, ("", *models), disable_numparse=True))


if __name__ == "__main__":
    main()
