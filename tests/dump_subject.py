"""What tests of dumps look at: a model small enough for golden texts, and what it is called with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A convolution that its batch norm is folded into, a LayerNorm that stays float, a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.bn(self.conv(x)).relu().mean((2, 3))))


def small() -> nn.Module:
    return Small().eval()
