"""Quantization-aware training of a ResNet on CIFAR-10: ``python -m qfx.tools.qat_cifar --data DIR``.

Makes one table of the float model, PTQ and QAT at each bit width. One process can do it all, or several can do a bit
width and a seed each (``--phases qat --bits 4 --seeds 1 --json FILE``), with ``python -m qfx.tools.qat_table FILE`` for
the table. With ``--checkpoint DIR`` a run that was interrupted goes on bit for bit from its last saved point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qfx.models import CifarResNet
from qfx.models.resnet import DEPTHS, ResNet
from qfx.tools.bench_data import file_of, normalised, read_pixels
from qfx.tools.qat_case import Case, Tuning, train_float, tried_observers
from qfx.tools.qat_images import ImageBatches
from qfx.tools.qat_loop import Plan, cosine
from qfx.tools.qat_program import float_checkpoint, parser, program
from qfx.tools.qat_recipes import static_recipe

ROWS = 250  # images of a batch that is only evaluated
# Learning rates by bits of the weights: what two epochs on half of the images liked best.
RATES = {8: 0.002, 4: 0.01, 3: 0.02, 2: 0.04}


def resnet18() -> ResNet:
    """ResNet-18 with the stem for 32x32 images: a 3x3 convolution without stride, and no pooling."""
    block, blocks = DEPTHS[18]
    model = ResNet(block, blocks, num_classes=10)
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.MaxPool2d(1)
    return model


# Each untrained, and the file of its weights in the data folder; without one it is trained first.
MODELS: Mapping[str, tuple[Callable[[], nn.Module], str | None]] = {
    "resnet20": (CifarResNet, "resnet20_cifar10_jpeg.pt"),
    "resnet18": (resnet18, None),
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser("qat_cifar", __doc__, bits="8,4,3,2", epochs=10, batch=128, distill=1.0, weight_decay=1e-4)
    add = made.add_argument
    add("--model", choices=tuple(MODELS), default="resnet20", help="what to train")
    add("--weights", type=Path, metavar="FILE", help="state dict; of resnet20 DIR has one")
    add("--train-images", type=int, metavar="N", help="train on the first N only")
    add("--test-images", type=int, metavar="N", help="test on the first N only")
    add("--calibration-images", type=int, default=512, metavar="N", help="how many training images set the ranges")
    add("--float-epochs", type=int, default=30, metavar="N", help="of a model that has no weights yet")
    add("--float-lr", type=float, default=0.1, help="learning rate of the same")
    return made.parse_args(argv)


def case_of(given: argparse.Namespace) -> Case:
    """The model, trained, with its data.

    Raises:
        Skip: a file is missing, or Pillow, which decodes the images.
    """
    build, file = MODELS[given.model]
    weights = given.weights or (file and file_of(given.data, file))
    pixels, labels = read_pixels(file_of(given.data, "cifar10_jpeg_train.npz"), given.train_images)
    test = read_pixels(file_of(given.data, "cifar10_jpeg_test.npz"), given.test_images)
    evaluate = partial(top1, pixels=test[0], labels=test[1])
    torch.manual_seed(0)
    model = build()
    if weights:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    else:
        plan = Plan(given.float_epochs, cosine, given.clip_norm)
        train_float(
            model,
            ImageBatches(pixels, labels, given.batch, 0),
            Tuning(plan, given.float_lr, 5e-4),
            evaluate,
            checkpoint=float_checkpoint(
                given, given.model, ("float_epochs", "float_lr", "batch", "clip_norm", "train_images")
            ),
            what=f"{given.model} float",
        )
    model.eval()
    return Case(
        task="CIFAR-10",
        name=given.model,
        model=model,
        metric="top-1, %",
        rising=True,
        count=len(test[1]),
        evaluate=evaluate,
        calibration=[normalised(part) for part in pixels[: given.calibration_images].split(64)],
        batches=partial(ImageBatches, pixels, labels, given.batch),
        recipe=static_recipe,
        lr=lambda bits: RATES.get(bits.weight, 0.005),
        ptq_recipes=lambda bits: tried_observers(static_recipe(bits)),
        one=normalised(test[0][:1]),
        target=given.target,
    )


def top1(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Per cent of images, bytes ``[N, 32, 32, 3]``, whose greatest logit is their label's."""
    right = [
        (model(normalised(part)).argmax(1) == wanted).sum()
        for part, wanted in zip(pixels.split(ROWS), labels.split(ROWS), strict=True)
    ]
    return 100 * int(torch.stack(right).sum()) / len(labels)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    return program(given, case_of, optimizer="sgd", limit=given.train_images)


if __name__ == "__main__":
    sys.exit(main())
