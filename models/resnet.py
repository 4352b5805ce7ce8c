"""ResNet-18 to ResNet-200 for images, with torchvision's parameter names.

He et al., "Deep Residual Learning for Image Recognition", 2015; the bottleneck has its stride on the 3x3 convolution,
as torchvision has it. ResNet-200 has the block counts of "Identity Mappings in Deep Residual Networks", 2016.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qfx.models.examples import random_images
from qfx.models.seeded import seeded
from qfx.models.settle import settle_batch_norm


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def _conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)


def _projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    """The shortcut's convolution where the shape changes; ``None`` is the identity."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(_conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[N, channels_in, H, W]`` to ``[N, width, H/stride, W/stride]``."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.relu(x + shortcut)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut: ``[N, channels_in, H, W]`` to ``[N, 4 * width, H/stride, W/stride]``."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = width * self.expansion
        self.conv1 = _conv1x1(channels_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, channels_out)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = self.relu(x + shortcut)
        return x


Block = type[BasicBlock] | type[Bottleneck]
Blocks = tuple[int, int, int, int]

# Depth -> the block, and how many of them in each of the four stages.
DEPTHS: dict[int, tuple[Block, Blocks]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


def _stage(block: Block, channels_in: int, width: int, count: int, stride: int) -> nn.Sequential:
    """``count`` blocks, of which the first has the stride and takes ``channels_in`` channels."""
    rest = (block(width * block.expansion, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(channels_in, width, stride), *rest)


class ResNet(nn.Module):
    """Images, float ``[N, 3, H, W]``, to logits, float ``[N, num_classes]``; H and W are at least 32.

    ``width`` is the number of channels of the first stage; each later stage has twice as many at half the resolution.
    """

    def __init__(self, block: Block, blocks: Blocks, *, width: int = 64, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(block, width, width, blocks[0], 1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, blocks[1], 2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, blocks[2], 2)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.fc(torch.flatten(self.avgpool(x), 1))
        return x


def build_resnet(
    depth: int,
    *,
    blocks: Blocks | None = None,
    width: int = 64,
    num_classes: int = 1000,
    image_size: int = 224,
    seed: int = 0,
) -> ResNet:
    """A ResNet of ``depth`` layers with random weights and settled batch-norm statistics, in eval mode.

    ``blocks`` replaces the depth's own number of blocks in each stage, for models that are small and yet have its kind
    of block. ``image_size`` is the side, in pixels, of the images that the statistics are taken from.

    Raises ``ValueError`` for a depth that is not in ``DEPTHS``.
    """
    if depth not in DEPTHS:
        raise ValueError(f"there is no ResNet-{depth} here: depth is one of {', '.join(map(str, DEPTHS))}")
    block, counts = DEPTHS[depth]
    model = seeded(lambda: ResNet(block, blocks or counts, width=width, num_classes=num_classes), seed)
    return settle_batch_norm(model, random_images(image_size), seed=seed)
