"""The ResNets for CIFAR images: ResNet-20 and its kin of 6n + 2 layers.

He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2: three stages of n basic blocks, and
shortcuts without parameters ("option A": every second pixel, and zeros for the new channels).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.models.examples import random_images
from qfx.models.seeded import seeded
from qfx.models.settle import settle_batch_norm


class PaddedShortcut(nn.Module):
    """Every second pixel, with as many zero channels before as behind: ``[N, C, H, W]`` to ``[N, 2C, H/2, W/2]``."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.padding = channels_in // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters; a stride of 2 doubles the channels."""

    def __init__(self, channels_in: int, stride: int) -> None:
        super().__init__()
        channels = channels_in * stride
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(channels_in)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return F.relu(x + shortcut)


class CifarResNet(nn.Module):
    """Images, float ``[N, 3, H, W]``, to logits, float ``[N, num_classes]``; H = W, 32 for CIFAR.

    ``blocks`` is n of the depth 6n + 2; ``width``, an even number, the channels of the first of the three stages.
    """

    def __init__(self, blocks: int = 3, *, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(CifarBlock(width, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(CifarBlock(width, 2), *(CifarBlock(2 * width, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(CifarBlock(2 * width, 2), *(CifarBlock(4 * width, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.shape[-1])
        x = self.linear(torch.flatten(x, 1))
        return x


def build_resnet_cifar(
    depth: int = 20, *, width: int = 16, num_classes: int = 10, image_size: int = 32, seed: int = 0
) -> CifarResNet:
    """A CIFAR ResNet of ``depth`` layers with random weights and settled batch-norm statistics, in eval mode.

    Raises ``ValueError`` for a depth that is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"there is no CIFAR ResNet of {depth} layers: the depth is 6n + 2, as in 8, 14, 20")
    model = seeded(lambda: CifarResNet(blocks, width=width, num_classes=num_classes), seed)
    return settle_batch_norm(model, random_images(image_size), seed=seed)


def load_resnet20(path: str | Path) -> CifarResNet:
    """ResNet-20 for CIFAR-10 with the weights of the state dict in the file ``path``, in eval mode."""
    model = seeded(CifarResNet)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
