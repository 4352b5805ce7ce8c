"""Modules that drop something in training, in the styles in which such code is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropSamples(nn.Module):
    """Stochastic depth with a mask made by ``new_empty`` and drawn in place."""

    def __init__(self, p: float = 0.4, scaled: bool = True) -> None:
        super().__init__()
        self.p, self.scaled = p, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        if self.scaled and keep > 0.0:
            mask.div_(keep)
        return x * mask


class DropRowsOrBatch(nn.Module):
    """Stochastic depth with a mask from ``torch.empty``, for each row or for the batch as a whole."""

    def __init__(self, p: float = 0.4, rows: bool = True) -> None:
        super().__init__()
        self.p, self.rows = p, rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        survival = 1.0 - self.p
        shape = [x.shape[0] if self.rows else 1, *[1] * (x.dim() - 1)]
        mask = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(survival)
        if survival > 0.0:
            mask.div_(survival)
        return mask * x


class DropByFloor(nn.Module):
    """Stochastic depth with a uniform draw that is floored, on what was divided before."""

    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1.0 - self.p
        mask = keep + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        mask.floor_()
        return x.div(keep) * mask


class Residual(nn.Module):
    """``[N, 6]``: a shortcut around a layer and ``dropper``."""

    def __init__(self, dropper: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.dropper = nn.Linear(6, 6), nn.Linear(6, 6), dropper

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x + self.dropper(F.relu(self.first(x))))
        return result


class Between(nn.Module):
    """``[N, 3, 8, 8]``: ``dropper`` between two convolutions."""

    def __init__(self, dropper: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.dropper = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), dropper

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.dropper(F.relu(self.first(x))))
        return result


class Function(nn.Module):
    """``function(x, self.training)``."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.training)


class Attention(nn.Module):
    """``[N, L, 16]``: attention that drops weights, by torch's operator."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.qkv, self.out, self.p = nn.Linear(16, 48), nn.Linear(16, 16), p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class HeadsOfTorch(nn.Module):
    """``[N, L, 16]``: torch's own attention module, with or without the weights as a result."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True)
        self.out, self.need_weights = nn.Linear(16, 16), need_weights

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.heads(x, x, x, need_weights=self.need_weights)[0])
        return result


class Shared(nn.Module):
    """``[N, 6]``: one dropout module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.drop(F.relu(self.first(self.drop(x)))))
        return result


ROWS, IMAGES, TOKENS = (5, 6), (4, 3, 8, 8), (3, 5, 16)

DROPPERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "samples": (lambda: Residual(DropSamples()), ROWS),
    "samples, not scaled": (lambda: Residual(DropSamples(scaled=False)), ROWS),
    "all samples": (lambda: Residual(DropSamples(1.0)), ROWS),
    "rows": (lambda: Between(DropRowsOrBatch()), IMAGES),
    "batch": (lambda: Between(DropRowsOrBatch(rows=False)), IMAGES),
    "by floor": (lambda: Residual(DropByFloor()), ROWS),
    "dropout": (lambda: Residual(nn.Dropout(0.3)), ROWS),
    "everything": (lambda: Residual(nn.Dropout(1.0)), ROWS),
    "nothing": (lambda: Residual(nn.Dropout(0.0)), ROWS),
    "function": (lambda: Residual(Function(lambda x, training: F.dropout(x, 0.3, training))), ROWS),
    "nested": (lambda: Residual(Function(lambda x, t: F.dropout(F.dropout(x, 0.2, t), 0.1, t))), ROWS),
    "channels": (lambda: Between(nn.Dropout2d(0.4)), IMAGES),
    "alpha": (lambda: Residual(nn.AlphaDropout(0.3)), ROWS),
    "shared": (Shared, ROWS),
    "attention": (Attention, TOKENS),
    "heads": (lambda: HeadsOfTorch(False), TOKENS),
    "heads with weights": (lambda: HeadsOfTorch(True), TOKENS),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.2, batch_first=True), TOKENS),
    "pre-norm encoder": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.2, "gelu", batch_first=True, norm_first=True),
        TOKENS,
    ),
}
"""Name → a model that drops something, and the shape of its input."""
