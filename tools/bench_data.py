"""Real data for the accuracy benchmarks, read from ``--data DIR``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qfx.tools.bench_figures import Skip, need

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


def cifar_images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` CIFAR-10 images of a file of JPEG bytes, normalised float32 ``[N, 3, 32, 32]``, and labels.

    The file is npz: ``jpeg`` holds all bytes, ``offset`` ``[N + 1]`` where each image begins, ``label`` ``[N]``.

    Raises:
        Skip: Pillow, which decodes them, is not installed.
    """
    image = need("PIL.Image")
    with np.load(path) as file:
        jpeg, offset, label = file["jpeg"], file["offset"], file["label"]
    stop = len(label) if count is None else count
    pixels = np.empty((stop, 32, 32, 3), dtype=np.uint8)
    for i in range(stop):
        pixels[i] = image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device="cpu").view(3, 1, 1) for v in (MEAN, STD))
    return ((x - mean) / std).contiguous(), torch.from_numpy(label[:stop].astype(np.int64))


def stories(path: Path, start: int, stop: int) -> Iterator[Tensor]:
    """Stories ``start`` to ``stop`` as int64 ``[1, L]``, from an npz of ``tokens`` and ``offset`` ``[N + 1]``."""
    with np.load(path) as file:
        tokens, offset = file["tokens"].astype(np.int64), file["offset"]
    for i in range(start, stop):
        yield torch.from_numpy(tokens[offset[i] : offset[i + 1]]).unsqueeze(0)
