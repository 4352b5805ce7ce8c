"""What quantization costs in accuracy: output SQNR, CIFAR-10 top-1 and a language model's perplexity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.metrics import sqnr_db
from qfx.models import build_resnet, load_resnet20, load_stories260k, random_images
from qfx.tools.bench_data import cifar_images, file_of, stories
from qfx.tools.bench_figures import Bar, Figure, Options, Skip, at_least, at_most, need
from qfx.tools.bench_fx_mode import engine, quantize_fx

FX_ENGINES = ("onednn", "x86")


def _outputs(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in batches])


def _quantized(
    model: nn.Module, example: Tensor, batches: Sequence[Tensor], options: Options, recipe: str | qfx.Recipe = "int8"
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return qfx.quantize(
            model, example, calibration=batches, recipe=recipe, target=options.target, verbose=False
        )


def sqnr(
    options: Options, *, model: nn.Module | None = None, image_size: int = 224, batches: int = 8, batch_size: int = 8
) -> Iterator[Figure]:
    """Output SQNR of ResNet-18 on held-out batches, against FX mode calibrated on the same batches.

    Random weights with settled batch-norm statistics, and standard normal images: calibration and held-out batches are
    drawn from one distribution with different seeds.
    """
    model = model or build_resnet(18)
    data = [random_images(image_size, batch=batch_size, seed=1 + i) for i in range(batches)]
    held_out = [random_images(image_size, batch=batch_size, seed=1001 + i) for i in range(4)]
    want = _outputs(model, held_out)
    mine = sqnr_db(want, _outputs(_quantized(model, data[0][:1], data, options), held_out))
    yield Figure("ResNet-18 W8A8", mine, "dB", note=f"{batches} batches of {batch_size}, {len(want)} held-out images")
    for name in FX_ENGINES:
        what = f"above FX mode {name}"
        try:
            peer = quantize_fx(model, data, name)
            with engine(name):
                theirs = sqnr_db(want, _outputs(peer, held_out))
        except Skip as reason:
            yield Figure.skip(what, str(reason))
            continue
        bar = at_least(-0.2) if name == "onednn" else None
        yield Figure(what, mine - theirs, "dB", bar, f"FX mode {theirs:.2f} dB")


def cifar10(options: Options, *, test_images: int | None = None) -> Iterator[Figure]:
    """Top-1 drop of ResNet-20 on the 10,000 JPEG test images; 512 training images calibrate, in 8 batches of 64."""
    data = options.data_dir()
    need("PIL.Image")
    model = load_resnet20(file_of(data, "resnet20_cifar10_jpeg.pt"))
    batches = cifar_images(file_of(data, "cifar10_jpeg_train.npz"), 512)[0].split(64)
    images, labels = cifar_images(file_of(data, "cifar10_jpeg_test.npz"), test_images)

    def top1(quantized: nn.Module) -> float:
        right = _outputs(quantized, images.split(250)).argmax(1) == labels
        return 100 * float(right.double().mean())

    full = top1(model)
    yield Figure("ResNet-20 float top-1", full, "%", note=f"{len(labels)} test images")
    mine = top1(_quantized(model, images[:1], batches, options))
    yield Figure("top-1 drop", full - mine, "points", at_most(0.1), f"int8 {mine:.2f} %")
    for name in FX_ENGINES:
        try:
            peer = quantize_fx(model, batches, name)
            with engine(name):
                theirs = top1(peer)
        except Skip as reason:
            yield Figure.skip(f"top-1 drop of FX mode {name}", str(reason))
            continue
        yield Figure(f"top-1 drop of FX mode {name}", full - theirs, "points", note=f"int8 {theirs:.2f} %")


RECIPES: tuple[tuple[str, qfx.Recipe, Bar | None], ...] = (
    ("int8_dynamic", qfx.Recipe.int8_dynamic(), at_most(3.56)),
    ("w8a16", qfx.Recipe.w8a16(), at_most(3.56)),
    ("w4a16, groups of 32", qfx.Recipe.w4a16(32), None),
)


def perplexity(options: Options, *, count: int = 300) -> Iterator[Figure]:
    """Perplexity of stories260K on the first ``count`` stories, each on its own, over all tokens but the first."""
    folder = file_of(options.data_dir(), "stories260K")
    model = load_stories260k(folder)
    texts = list(stories(file_of(folder, "tinystories_tokens.npz"), 0, count))
    tokens = sum(text.shape[1] - 1 for text in texts)
    yield Figure("float", _perplexity(model, texts), note=f"{count} stories, {tokens} tokens")
    # What calibrates is behind what is measured.
    data = list(stories(file_of(folder, "tinystories_tokens.npz"), 1000, 1032))
    for name, recipe, bar in RECIPES:
        yield Figure(name, _perplexity(_quantized(model, data[0], data, options, recipe), texts), bar=bar)


def _perplexity(model: nn.Module, texts: Sequence[Tensor]) -> float:
    loss, tokens = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            logits = model(text[:, :-1])
            loss += float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum"))
            tokens += text.shape[1] - 1
    return math.exp(loss / tokens)
