"""Modules of a graph that is trained: they follow ``self.training``, with the user's hyper-parameters.

Dropout is torch's own (:data:`DROPOUTS`). A batch norm is torch's own too, except that it can be frozen, that a
repeated forward pass of gradient checkpointing does not count twice, and that a batch with NaN leaves its statistics
alone.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qfx.part import Part
from qfx.recompute import recomputing

DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
}
"""ATen's name of a dropout → the module that does it."""


class LiveBatchNorm(Part, _BatchNorm):
    """A batch norm whose statistics can be frozen: it then stays in eval mode whatever ``train()`` says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = self.frozen_by_user = False

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or take up again) the collection of statistics; weight and bias go on training."""
        self.frozen = frozen
        self.training = self.training and not frozen

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()  # no NaN and no repetition must reach them
        output = F.batch_norm(input, mean, var, self.weight, self.bias, True, self._momentum(), self.eps)
        if not recomputing():
            with torch.no_grad():
                self.running_mean.copy_(torch.where(torch.isfinite(mean), mean, self.running_mean))
                self.running_var.copy_(torch.where(torch.isfinite(var), var, self.running_var))
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return output

    def _momentum(self) -> float:
        """Of this batch; without a momentum the average is cumulative, as in :class:`torch.nn.BatchNorm2d`."""
        if self.momentum is None:
            assert self.num_batches_tracked is not None
            return 1.0 / (float(self.num_batches_tracked) + 1.0)
        return self.momentum

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.frozen])

    def set_extra_state(self, state: Tensor) -> None:
        self.frozen = bool(state[0])
        self.training = self.training and not self.frozen


class LiveBatchNorm1d(LiveBatchNorm, nn.BatchNorm1d):
    """On ``[N, C]`` or ``[N, C, L]``."""


class LiveBatchNorm2d(LiveBatchNorm, nn.BatchNorm2d):
    """On ``[N, C, H, W]``."""


class LiveBatchNorm3d(LiveBatchNorm, nn.BatchNorm3d):
    """On ``[N, C, D, H, W]``."""


BATCH_NORMS = {2: LiveBatchNorm1d, 3: LiveBatchNorm1d, 4: LiveBatchNorm2d, 5: LiveBatchNorm3d}
"""By the rank of the input."""


class DropPath(nn.Module):
    """Stochastic depth: in training whole samples become zero, with probability ``1 - keep``.

    Method: Huang et al., 2016 (arXiv:1603.09382). The fields are those of :class:`qfx.training.DropPathMark`.
    """

    def __init__(self, keep: float, kept: tuple[int, ...], scaled: bool, uniform: bool) -> None:
        super().__init__()
        self.keep, self.kept, self.scaled, self.uniform = keep, kept, scaled, uniform

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = [size if i in self.kept else 1 for i, size in enumerate(x.shape)]
        scale = self.keep if self.scaled and self.keep > 0.0 else 1.0
        if self.uniform:
            return x / scale * torch.floor(self.keep + torch.rand(shape, dtype=x.dtype, device=x.device))
        noise = x.new_empty(shape).bernoulli_(self.keep)
        return x * noise.div_(scale)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


class Attention(nn.Module):
    """``scaled_dot_product_attention`` that drops attention weights in training, with probability ``p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask, p, is_causal, **kwargs)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Absorbed(nn.Module):
    """Stands where a relu or another clamp was: the FakeQuantize behind it clamps in the same pass over memory."""

    def forward(self, x: Tensor, *bounds: Any) -> Tensor:
        return x


class BatchNormFactor(nn.Module):
    """What a weight is multiplied with before it is fake-quantized, and divided by afterwards.

    ``weight / sqrt(running_var + eps)``, 1 over the root where ``weight`` is 0, shaped to broadcast against the layer's
    weight. Where scales are per channel (``sign_only``) only its sign matters, for every other part of the factor is a
    part of the scale; so statistics may move without moving a learned scale. No gradient passes.
    """

    def __init__(self, eps: float, weight_shape: tuple[int, ...], axis: int, groups: int, sign_only: bool) -> None:
        super().__init__()
        self.eps, self.weight_shape, self.axis, self.groups, self.sign_only = eps, weight_shape, axis, groups, sign_only
        self.last: Tensor | None = None

    def forward(self, var: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.last is not None and recomputing():  # statistics have moved since
            return self.last
        with torch.no_grad():
            root = torch.rsqrt(var.double() + self.eps)
            factor = root if weight is None else root * weight.double()
            if self.sign_only:
                factor = torch.where(factor < 0, -1.0, 1.0)
            else:
                factor = torch.where(factor.abs() < SMALLEST_FACTOR, root, factor)
            self.last = channel_factor(factor, self.weight_shape, self.axis, self.groups).to(var.dtype)
        return self.last


SMALLEST_FACTOR = 1e-12
"""Below it a batch norm's weight counts as 0: what it lets through vanishes beside its bias."""


def channel_factor(values: Tensor, shape: tuple[int, ...], axis: int, groups: int) -> Tensor:
    """``[C]`` values of output channels, shaped to broadcast against a weight of ``shape``.

    ``axis`` 0: the output channels are the weight's first dimension. ``axis`` 1 (transposed convolutions):
    ``[in, out / groups, ...]``, and every group has output channels of its own.
    """
    ones = [1] * (len(shape) - 2)
    if axis == 0:
        return values.reshape(-1, 1, *ones)
    by_group = values.reshape(groups, 1, -1)
    per_input = by_group if groups == 1 else by_group.expand(groups, shape[0] // groups, -1)
    return per_input.reshape(-1, shape[1], *ones)
