"""MobileNetV2, with torchvision's parameter names.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qfx.models.examples import random_images
from qfx.models.seeded import seeded
from qfx.models.settle import settle_batch_norm


@dataclass(frozen=True)
class Stage:
    """``count`` blocks of ``channels`` output channels; the first has the ``stride``, all the same ``expansion``."""

    expansion: int
    channels: int
    count: int
    stride: int


# Table 2 of the paper.
STAGES = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


def divisible(channels: float, divisor: int = 8) -> int:
    """``channels`` rounded to a multiple of ``divisor``, at least one of it, and never more than 10 % down."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def _conv_bn_relu6(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1; a shortcut where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(channels_in, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """Images, float ``[N, 3, H, W]``, to logits, float ``[N, num_classes]``.

    ``width_multiplier`` scales the channels of every stage, rounded to multiples of 8.
    """

    def __init__(
        self,
        stages: Sequence[Stage] = STAGES,
        *,
        width_multiplier: float = 1.0,
        num_classes: int = 1000,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels = divisible(32 * width_multiplier)
        features: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, stride=2)]
        for stage in stages:
            channels_out = divisible(stage.channels * width_multiplier)
            for index in range(stage.count):
                stride = 1 if index else stage.stride
                features.append(InvertedResidual(channels, channels_out, stride, stage.expansion))
                channels = channels_out
        last = divisible(1280 * max(1.0, width_multiplier))
        features.append(_conv_bn_relu6(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        x = self.classifier(torch.flatten(x, 1))
        return x


def build_mobilenet_v2(
    *,
    stages: Sequence[Stage] = STAGES,
    width_multiplier: float = 1.0,
    num_classes: int = 1000,
    image_size: int = 224,
    seed: int = 0,
) -> MobileNetV2:
    """MobileNetV2 with random weights and settled batch-norm statistics, in eval mode.

    ``image_size`` is the side, in pixels, of the images that the statistics are taken from.
    """
    model = seeded(lambda: MobileNetV2(stages, width_multiplier=width_multiplier, num_classes=num_classes), seed)
    return settle_batch_norm(model, random_images(image_size), seed=seed)
