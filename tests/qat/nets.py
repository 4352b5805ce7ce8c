"""Small models that between them hold everything that training mode switches, with an example for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.trained_fake_quant import TrainedFakeQuantize


class Block(nn.Module):
    """Two convolutions with batch norms and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A residual network of two blocks: ``[N, 3, H, W]`` to ``[N, 4]``."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(self.drop(x.mean((2, 3))))
        return logits


class Mlp(nn.Module):
    """Without batch norms or dropout: rows do not see each other. ``[N, 6]`` to ``[N, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.relu(self.second(F.relu(self.first(x)))))
        return logits


class Tabular(nn.Module):
    """Linear layers with batch norm and dropout: ``[N, 6]`` to ``[N, 3]``."""

    def __init__(self, momentum: float | None = 0.1, dropout: float = 0.2) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=momentum)
        self.second, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.drop(F.relu(self.second(F.relu(self.norm(self.first(x)))))))
        return logits


class Tied(nn.Module):
    """A language model whose output layer is its embedding: tokens ``[N, L]`` to ``[N, L, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.output = nn.Linear(8, 16, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(F.gelu(self.middle(self.embedding(tokens))))
        return logits


class Stack(nn.Module):
    """One layer with its batch norm, and nothing else."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.layer(x))
        return result


def settle(model: nn.Module, *inputs: Tensor, batches: int = 3) -> nn.Module:
    """Give batch norms statistics and affine parameters that are not the initial ones; in eval mode."""
    with torch.no_grad():
        model.train()
        for _ in range(batches):
            model(*(x + 0.3 * torch.randn_like(x) if x.is_floating_point() else x for x in inputs))
        for name, p in model.named_parameters():
            if "bn" in name or "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)


def quantizers(model: nn.Module) -> list[TrainedFakeQuantize]:
    return [m for m in model.modules() if isinstance(m, TrainedFakeQuantize)]


def without_rounding(model: nn.Module) -> nn.Module:
    """Fake quantization lets everything through, and no range starts."""
    for quantizer in quantizers(model):
        quantizer.quantizing = quantizer.observing = False
    return model


def train(
    model: Callable[..., Tensor],
    parameters: list[nn.Parameter],
    steps: int = 3,
    shape: tuple[int, ...] = (8, 6),
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 7,
) -> list[float]:
    """Plain SGD on noise; the losses."""
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(shape, generator=generator)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
