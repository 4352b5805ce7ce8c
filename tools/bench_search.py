"""What bit-width search costs and what it finds: scans, allocations, accuracy, and a peer beside it."""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import api, meta, score_cache
from qfx.allocation import Option, solve
from qfx.measure import Measurement, measure_sensitivity
from qfx.models import BERT_SMALL, Bert, build_resnet, load_resnet20, random_images
from qfx.samples import samples_of
from qfx.sensitivity_table import Sensitivity
from qfx.targets import choose
from qfx.tools.bench_data import cifar_images, file_of
from qfx.tools.bench_figures import Figure, Options, Skip, at_least, at_most, need
from qfx.widths import at_width

WIDTHS = (2, 3, 4, 6, 8)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _calibrated(model: nn.Module, batches: Sequence[Any], options: Options, rows: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        first = batches[0]
        example = {k: v[:1] for k, v in first.items()} if isinstance(first, dict) else first[:1]
        prepared = qfx.prepare(model, example, target=options.target)
        api.keep_rows(prepared, rows)
        return qfx.calibrate(prepared, batches)


def _scored(prepared: Any, options: Options, wanted: Measurement) -> Sensitivity:
    samples = samples_of(prepared, meta.kept_calls(prepared), rows=wanted.rows, split=wanted.splits)
    target = choose(options.target)
    return measure_sensitivity(prepared, samples, wanted, recipe=qfx.Recipe.int8(), target=target, model="")


def scan_time(options: Options, *, rows: int = 32, image_size: int = 224) -> Iterator[Figure]:
    """Time of full scans of ResNet-50, 54 layers at 4 widths, against that many forward passes."""
    model = build_resnet(50)
    images = random_images(image_size, batch=rows)
    prepared = _calibrated(model, list(images.split(8)), options, rows)

    def step() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    with scores_apart():
        with torch.inference_mode():
            forward = statistics.median(_timed(lambda: model(images)) for _ in range(3))
        both = statistics.median(_timed(step) for _ in range(3))
        widths: dict[str, Any] = {"weight_bits": (2, 3, 4, 6), "activation_bits": (), "rows": rows, "check": 0}
        fisher = _timed(lambda: _scored(prepared, options, Measurement(score="fisher", **widths)))
        found: list[Sensitivity] = []
        exact = _timed(lambda: found.append(_scored(prepared, options, Measurement(score="sqnr", **widths))))
    trials = len(found[0].scores)
    note = f"{exact:.1f} s; a forward pass of {rows} images takes {forward:.2f} s"
    yield Figure(f"sqnr scan against {trials} forward passes", exact / (trials * forward), "x", at_most(0.6), note)
    note = f"{fisher:.1f} s; a pass of {rows} images takes {both:.2f} s"
    yield Figure("fisher, in forward-backward passes", fisher / both, "", at_most(10), note)


def rank_agreement(options: Options, *, rows: int = 64) -> Iterator[Figure]:
    """Rank correlation of the cheap score with the exact one: all layers, weights and activations, at all widths."""
    torch.manual_seed(0)
    bert = Bert(BERT_SMALL).eval()
    ids = {"input_ids": torch.randint(1, BERT_SMALL.vocab_size, (rows, 32))}
    cases: list[tuple[str, nn.Module, list[Any]]] = [("BERT-small, random weights", bert, [ids])]
    try:
        data = options.data_dir()
        images = cifar_images(file_of(data, "cifar10_jpeg_train.npz"), 512)[0]
        cases.insert(0, ("ResNet-20", load_resnet20(file_of(data, "resnet20_cifar10_jpeg.pt")), [*images.split(64)]))
    except Skip as reason:
        yield Figure.skip("ResNet-20", str(reason))
    for name, model, batches in cases:
        prepared = _calibrated(model, batches, options, rows)
        with scores_apart():
            scores = [
                _scored(prepared, options, Measurement((2, 3, 4, 6, 8), (2, 4, 6, 8), score, rows=rows, check=0))
                for score in ("fisher", "kl")
            ]
        times = " against ".join(f"{found.seconds:.1f} s" for found in scores)
        note = f"{len(scores[0].scores)} trials, {rows} rows; {times}"
        yield Figure(f"{name}: fisher with kl", scores[0].correlation(scores[1]), "", at_least(0.8), note)


def allocation_time(options: Options, *, layers: int = 200) -> Iterator[Figure]:
    """Time of the integer programme with two budgets: 200 layers of 5 choices."""
    draw = random.Random(0)
    groups = []
    for _ in range(layers):
        weights, macs = draw.randint(10_000, 2_000_000), draw.randint(1_000_000, 500_000_000)
        loss = 10 ** draw.uniform(-4, 0)
        costs = [{"weight_bits": float(weights * b), "bit_operations": float(macs * b * 8)} for b in WIDTHS]
        groups.append([Option(loss * 4.0**-b, c) for b, c in zip(WIDTHS, costs, strict=True)])
    totals = {name: sum(g[-1].costs[name] for g in groups) for name in ("weight_bits", "bit_operations")}
    budgets = {"weight_bits": 0.5 * totals["weight_bits"], "bit_operations": 0.6 * totals["bit_operations"]}
    seconds = statistics.median(_timed(lambda: solve(groups, budgets)) for _ in range(3))
    yield Figure(f"allocation, {layers} layers of {len(WIDTHS)} choices, 2 budgets", seconds, "s", at_most(1.0))


def searched(options: Options, *, test_images: int | None = None, rows: int = 256) -> Iterator[Figure]:
    """Top-1 of ResNet-20 with the bits that a search found, beside uniform bits, PTQ, and a peer's search."""
    data = options.data_dir()
    need("PIL.Image")
    model = load_resnet20(file_of(data, "resnet20_cifar10_jpeg.pt"))
    batches = list(cifar_images(file_of(data, "cifar10_jpeg_train.npz"), 512)[0].split(64))
    images, labels = cifar_images(file_of(data, "cifar10_jpeg_test.npz"), test_images)

    def top1(quantized: nn.Module) -> float:
        with torch.inference_mode():
            right = torch.cat([quantized(part).argmax(1) for part in images.split(250)]) == labels
        return 100 * float(right.double().mean())

    def made(recipe: Any) -> tuple[float, float]:
        with _quiet(), scores_apart():
            start = time.perf_counter()
            quantized = qfx.quantize(
                model, images[:1], calibration=batches, recipe=recipe, target=options.target, verbose=False
            )
            return top1(quantized), time.perf_counter() - start

    full = top1(model)
    yield Figure("ResNet-20 float top-1", full, "%", note=f"{len(labels)} test images")
    layers = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    size = sum(w.numel() for w in layers) * 6 // 8 + 4 * sum(len(w) for w in layers)  # scales are float32
    uniform, _ = made(_uniform(4))
    yield Figure("uniform W4A8, top-1", uniform, "%", note="ranges from the extremes, as in auto")
    auto, seconds = made(qfx.AutoRecipe(average_weight_bits=4.0, rows=rows))
    note = f"{auto:.2f} %, {seconds:.1f} s in all; or within 0.3 of float: {full - auto:.2f}"
    yield Figure("auto at 4.0 bits above uniform W4A8", auto - uniform, "points", at_least(1.0), note)
    six, _ = made(qfx.AutoRecipe(weight_bytes=size, rows=rows))
    yield Figure("auto at 6 bits' bytes, drop", full - six, "points", at_most(0.3), f"{size} bytes, with scales")
    yield from _beside_peer(model, batches, top1, rows)


def _uniform(bits: int) -> qfx.Recipe:
    base = qfx.Recipe.int8()
    assert base.default.weight is not None
    return replace(base, default=replace(base.default, weight=at_width(base.default.weight, bits)))


def _beside_peer(
    model: nn.Module, batches: Sequence[Tensor], top1: Callable[[nn.Module], float], rows: int
) -> Iterator[Figure]:
    """ModelOpt's search over the same widths, data and bits; each from the float model to the quantized one."""
    try:
        mtq = need("modelopt.torch.quantization")
    except Skip as reason:
        yield Figure.skip("beside ModelOpt", str(reason))
        return
    def config(bits: int) -> dict[str, Any]:
        weight = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}}
        data = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}}
        return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, weight, data], "algorithm": "max"}

    # Its loss needs labels, ours none: it gets those that the float model gives.
    wanted = [(batch, model(batch).argmax(1).detach()) for batch in batches]
    start = time.perf_counter()
    theirs, _ = mtq.auto_quantize(
        copy.deepcopy(model),
        constraints={"effective_bits": 4.0},
        quantization_formats=[config(bits) for bits in WIDTHS],
        data_loader=wanted,
        forward_step=lambda m, batch: m(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=max(1, rows // len(batches[0])),
    )
    peer_seconds = time.perf_counter() - start
    peer = top1(theirs.eval())
    with _quiet(), scores_apart():
        start = time.perf_counter()
        mine = qfx.quantize(
            model, batches[0][:1], calibration=batches, recipe=qfx.AutoRecipe(average_weight_bits=4.0, rows=rows),
            verbose=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
    note = f"{seconds:.1f} s against {peer_seconds:.1f} s"
    yield Figure("time of search and quantization against ModelOpt's", seconds / peer_seconds, "x", at_most(1.0), note)
    better = top1(mine) - peer
    yield Figure("top-1 above ModelOpt's, 4.0 bits", better, "points", at_least(0.0), f"ModelOpt {peer:.2f} %")


@contextmanager
def scores_apart() -> Iterator[None]:
    """A cache of scores of its own: none of an earlier run is found in it."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(score_cache, "cache_dir", lambda: Path(folder)):
        score_cache.forget()
        yield
        score_cache.forget()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        yield

