"""Real data for the accuracy benchmarks, read from ``--data DIR``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qfx.tools.bench_figures import Skip, need

SIZE = 32  # of CIFAR's images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def file_of(data: Path, name: str) -> Path:
    """The file ``name`` below ``data``.

    Raises:
        Skip: it is not there.
    """
    path = data / name
    if not path.exists():
        raise Skip(f"--data has no {name}")
    return path


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


def cifar_images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` CIFAR-10 images of a file of JPEG bytes, normalised float32 ``[N, 3, 32, 32]``, and labels.

    Raises:
        Skip: Pillow, which decodes them, is not installed.
    """
    pixels, labels = read_pixels(path, count)
    return normalised(pixels).contiguous(), labels


def stories(path: Path, start: int, stop: int) -> Iterator[Tensor]:
    """Stories ``start`` to ``stop`` as int64 ``[1, L]``, from an npz of ``tokens`` and ``offset`` ``[N + 1]``."""
    with np.load(path) as file:
        tokens, offset = file["tokens"].astype(np.int64), file["offset"]
    for i in range(start, stop):
        yield torch.from_numpy(tokens[offset[i] : offset[i + 1]]).unsqueeze(0)
