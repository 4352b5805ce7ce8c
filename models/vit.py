"""Vision transformer (ViT-S/16 by default), with timm's parameter names.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020; the small variant of Touvron et al., "DeiT", 2020: layer norm
before each branch, one linear layer for query, key and value, a class token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.models.seeded import seeded


@dataclass(frozen=True)
class VitConfig:
    """The geometry; ``image_size`` and ``patch_size`` are sides in pixels."""

    image_size: int = 224
    patch_size: int = 16
    dim: int = 384
    layers: int = 12
    heads: int = 6
    hidden: int = 1536
    num_classes: int = 1000
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


VIT_S16 = VitConfig()


class PatchEmbedding(nn.Module):
    """Images ``[N, 3, H, W]`` to one token for each patch, ``[N, patches, dim]``."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2)


class VitAttention(nn.Module):
    """Multi-head self-attention: ``[N, L, dim]`` to the same."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return x


class Mlp(nn.Module):
    """Linear, exact GELU, linear: ``[N, L, dim]`` to the same."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(self.act(self.fc1(x)))
        return x


class VitBlock(nn.Module):
    """Attention and perceptron, each behind a layer norm and beside a shortcut: ``[N, L, dim]`` to the same."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = VitAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Vit(nn.Module):
    """Images, float ``[N, 3, image_size, image_size]``, to logits, float ``[N, num_classes]``."""

    def __init__(self, config: VitConfig = VIT_S16) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.patches + 1, config.dim))
        self.blocks = nn.Sequential(*(VitBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        x = self.head(x[:, 0])
        return x


def build_vit(config: VitConfig = VIT_S16, *, seed: int = 0) -> Vit:
    """A vision transformer with random weights, in eval mode."""
    return seeded(lambda: Vit(config), seed)
