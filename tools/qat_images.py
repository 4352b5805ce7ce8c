"""CIFAR-10 for training: augmented and normalised a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.tools.bench_data import normalised
from qfx.tools.qat_batches import Batch, Epoch, generator, shuffled

PAD = 4


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
