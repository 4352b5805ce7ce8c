"""CIFAR-10 for training: decoded once into bytes, augmented and normalised a batch at a time."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.tools.bench_data import MEAN, STD
from qfx.tools.bench_figures import need
from qfx.tools.qat_batches import Batch, Epoch, generator, shuffled

SIZE, PAD = 32, 4


def read_pixels(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of a file of JPEG bytes, uint8 ``[N, 32, 32, 3]``, and their labels, int64 ``[N]``.

    The file is as :func:`qfx.tools.bench_data.cifar_images` reads it. All 50,000 images decode in six seconds, so
    nothing is cached.

    Raises:
        Skip: Pillow, which decodes them, is not installed.
    """
    image = need("PIL.Image")
    with np.load(path) as file:
        jpeg, offset, label = file["jpeg"], file["offset"], file["label"][:count]
    pixels = np.empty((len(label), SIZE, SIZE, 3), dtype=np.uint8)
    for i in range(len(label)):
        pixels[i] = image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB")
    return torch.from_numpy(pixels), torch.from_numpy(label.astype(np.int64))


def normalised(pixels: Tensor) -> Tensor:
    """Bytes ``[N, H, W, 3]`` as float32 ``[N, 3, H, W]`` in channels-last memory, each channel normalised."""
    mean, std = (255 * torch.tensor(v, device="cpu") for v in (MEAN, STD))
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


def augmented(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Every image padded by 4 black pixels, cropped at random to its size again, and mirrored half of the time.

    Bytes ``[N, H, W, 3]`` to the same, by one gather for the whole batch. What ResNets are trained with on CIFAR (He et
    al., 2015, section 4.2).
    """
    count, height, width, _ = pixels.shape
    wide = F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))
    down, right = torch.randint(2 * PAD + 1, (2, count, 1), generator=random, device="cpu")
    mirror = torch.rand(count, 1, generator=random, device="cpu") < 0.5
    rows = down + torch.arange(height, device="cpu")
    columns = right + torch.arange(width, device="cpu")
    columns = torch.where(mirror, columns.flip(1), columns)
    images = torch.arange(count, device="cpu")
    return wide[images[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass(frozen=True)
class ImageBatches:
    """Augmented batches of ``size`` images; what is left over at an epoch's end is dropped."""

    pixels: Tensor
    labels: Tensor
    size: int
    seed: int

    def epoch(self, number: int) -> Epoch:
        order = shuffled(len(self.labels), self.seed, number)

        def make(position: int) -> Batch:
            rows = order[position * self.size : (position + 1) * self.size]
            random = generator(self.seed, number, position)
            return normalised(augmented(self.pixels[rows], random)), self.labels[rows]

        return Epoch(len(order) // self.size, make)
