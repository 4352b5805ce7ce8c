"""Exported models in ONNX Runtime and OpenVINO against ``reference``: the same answers, and outputs that agree.

The control is the graph that was exported, run by torch: it rounds in float where ``reference`` rounds exact sums, as
engines do. A model that amplifies single steps of rounding, as deep ones with random weights do, falls apart there too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qfx
from qfx.metrics import sqnr_db
from qfx.models import MODELS, load_resnet20, train_digits
from qfx.portable import portable
from qfx.structure import flatten
from qfx.tools.bench_calls import call, resized, tensors
from qfx.tools.bench_data import cifar_images, file_of
from qfx.tools.bench_figures import Figure, Options, Skip, at_least, brief, need
from qfx.tools.engines import DEFAULT, OPENVINO_EXACT, ORT_EXACT, OnnxRuntime, OpenVino

AGREEMENT, SQNR = at_least(100), at_least(35)
RANDOM = ("resnet18", "mobilenet_v2", "bert_small", "vit_s16")
BATCH = 25

Engine = Callable[[Path, Mapping[str, str]], Callable[[Sequence[Tensor]], list[Tensor]]]

RUNS: tuple[tuple[str, str, Engine, Mapping[str, str], str, bool], ...] = (
    ("int8", "onnxruntime", OnnxRuntime, ORT_EXACT, "no saturation", True),
    ("int8", "openvino", OpenVino, OPENVINO_EXACT, "no integer kernels", True),
    ("openvino", "onnxruntime", OnnxRuntime, DEFAULT, "default", True),
    ("openvino", "openvino", OpenVino, DEFAULT, "default", True),
    ("int8", "onnxruntime", OnnxRuntime, DEFAULT, "default: may saturate without VNNI", False),
    ("int8", "openvino", OpenVino, DEFAULT, "default: may saturate without VNNI", False),
)
"""Recipe, consumer, engine, its settings, what they mean, and whether the bars hold for it on every CPU."""


@dataclass(frozen=True)
class Case:
    """A float model, what it is calibrated with, and what it is asked."""

    name: str
    model: nn.Module
    calibration: Sequence[Any]
    batches: Sequence[Any]


def exported(
    options: Options, *, images: int = 500, random_inputs: int = 500, models: Sequence[str] = RANDOM
) -> Iterator[Figure]:
    """Top-1 agreement and SQNR with ``reference`` of trained models on real images and of others on random inputs."""
    for module in ("onnxscript", "onnxruntime", "openvino"):
        need(module)
    yield from _figures(_digits(images))
    try:
        cifar = _cifar(options, images)
    except Skip as reason:
        yield Figure.skip("ResNet-20", str(reason))
    else:
        yield from _figures(cifar)
    for name in models:
        yield from _figures(_random(name, random_inputs))


def _digits(images: int) -> Case:
    model, (test, _), (train, _) = train_digits()
    return Case("digits ResNet", model, train.split(64), torch.cat([test, train])[:images].split(BATCH))


def _cifar(options: Options, images: int) -> Case:
    data = options.data_dir()
    model = load_resnet20(file_of(data, "resnet20_cifar10_jpeg.pt"))
    train = cifar_images(file_of(data, "cifar10_jpeg_train.npz"), 512)[0]
    test = cifar_images(file_of(data, "cifar10_jpeg_test.npz"), images)[0]
    return Case("ResNet-20", model, train.split(64), test.split(BATCH))


def _random(name: str, inputs: int) -> Case:
    model, example = MODELS[name]()
    sizes = [min(BATCH, inputs - start) for start in range(0, inputs, BATCH)]
    return Case(
        f"{name}, random weights",
        model,
        [resized(example, 8, seed=100)],
        [resized(example, size, seed=i + 1) for i, size in enumerate(sizes)],
    )


def _figures(case: Case) -> Iterator[Figure]:
    made: dict[str, tuple[nn.Module, list[list[Tensor]]]] = {}
    inputs = [tensors(batch) for batch in case.batches]
    with tempfile.TemporaryDirectory() as folder:
        for recipe, consumer, engine, settings, meaning, bars in RUNS:
            what = f"{case.name}, {recipe}, {engine.name} ({meaning})"  # type: ignore[attr-defined]
            try:
                if recipe not in made:
                    made[recipe] = _quantized(case, recipe)
                    yield from _control(case, recipe, *made[recipe])
                model, wanted = made[recipe]
                path = Path(folder) / f"{recipe}_{consumer}.onnx"
                if not path.exists():
                    qfx.export_onnx(model, path, consumer=consumer)
                run = engine(path, settings)
                found = [run(batch) for batch in inputs]
            except Exception as error:  # an engine that fails is a figure, and the others still count
                yield Figure.fail(what, brief(error), AGREEMENT)
                continue
            yield from _compared(what, wanted, found, bars)


def _control(case: Case, recipe: str, model: nn.Module, wanted: Sequence[Sequence[Tensor]]) -> Iterator[Figure]:
    found = [flatten(call(portable(model), batch))[0] for batch in case.batches]
    yield from _compared(f"{case.name}, {recipe}, torch (control)", wanted, found, False)


def _quantized(case: Case, recipe: str) -> tuple[nn.Module, list[list[Tensor]]]:
    first = case.batches[0]
    example = {k: v[:1] for k, v in first.items()} if isinstance(first, dict) else tuple(x[:1] for x in tensors(first))
    model = qfx.quantize(
        case.model, example, calibration=case.calibration, recipe=recipe, target="reference", verbose=False
    )
    return model, [flatten(call(model, batch))[0] for batch in case.batches]


def _compared(
    what: str, wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], bars: bool
) -> Iterator[Figure]:
    want, got = (torch.cat([batch[0] for batch in side]) for side in (wanted, found))
    same = 100 * float((want.argmax(-1) == got.argmax(-1)).double().mean())
    lowest = min(
        sqnr_db(torch.cat([b[i] for b in wanted]), torch.cat([b[i] for b in found])) for i in range(len(wanted[0]))
    )
    yield Figure(f"{what}: top-1 agreement", same, "%", AGREEMENT if bars else None, f"{len(want)} inputs")
    yield Figure(f"{what}: SQNR", lowest, "dB", SQNR if bars else None)
