"""A Llama-style language model, with the parameter names of Llama's first release and of llama2.c.

Touvron et al., "LLaMA", 2023: RMSNorm before each branch (Zhang and Sennrich, 2019), rotary positions on interleaved
pairs (Su et al., 2021), SwiGLU (Shazeer, 2020), grouped-query attention (Ainslie et al., 2023), and an output layer
that shares the embedding's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.models.seeded import seeded


@dataclass(frozen=True)
class LlamaConfig:
    """The geometry; the defaults are stories260K's."""

    vocab_size: int = 512
    dim: int = 64
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 172
    max_length: int = 512
    eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} is not an even multiple of heads {self.heads}: rotary positions need pairs"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


STORIES_260K = LlamaConfig()


def rope_tables(head_dim: int, length: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, float32 ``[length, head_dim / 2]`` each.

    Pair i turns by ``base ** (-2 i / head_dim)`` radians for each position.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), … of the last dimension: ``x`` is ``[N, heads, L, D]``, tables ``[L, D / 2]``."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class LlamaAttention(nn.Module):
    """Causal self-attention in which several query heads share one key and value head: ``[N, L, dim]`` to the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.repeats = config.heads // config.kv_heads
        self.wq = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.wq, self.wk, self.wv)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = (self._for_each_query_head(heads) for heads in (key, value))
        x = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = self.wo(x.transpose(1, 2).flatten(2))
        return x

    def _for_each_query_head(self, x: Tensor) -> Tensor:
        """``[N, kv_heads, L, D]`` to ``[N, heads, L, D]``, each head repeated for its group of query heads."""
        return x.unsqueeze(2).expand(-1, -1, self.repeats, -1, -1).flatten(1, 2)


class SwiGlu(nn.Module):
    """``w2(silu(w1 x) * w3 x)``: ``[N, L, dim]`` to the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return x


class LlamaLayer(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and beside a shortcut: ``[N, L, dim]`` to the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.attention = LlamaAttention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.feed_forward = SwiGlu(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class Llama(nn.Module):
    """Tokens, int ``[N, L]`` with L at most ``max_length``, to next-token logits, float ``[N, L, vocab_size]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig = STORIES_260K) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        # It is the output's weight too: logits of unit variance want this size.
        nn.init.normal_(self.tok_embeddings.weight, std=config.dim**-0.5)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_tables(config.head_dim, config.max_length, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens, where this model has {self.config.max_length} positions")
        cos, sin = self.cos[:length], self.sin[:length]
        x: Tensor = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.output(self.norm(x))
        return x


def build_llama(config: LlamaConfig = STORIES_260K, *, seed: int = 0) -> Llama:
    """A Llama-style model with random weights, in eval mode."""
    return seeded(lambda: Llama(config), seed)


def load_stories260k(path: str | Path) -> Llama:
    """The stories260K model, in eval mode; ``path`` is its state dict's file, or the folder of ``stories260K.pt``."""
    path = Path(path)
    state = torch.load(path / "stories260K.pt" if path.is_dir() else path, map_location="cpu", weights_only=True)
    model = build_llama()
    # The file names the shared weight once.
    model.load_state_dict({**state, "output.weight": state["tok_embeddings.weight"]})
    return model
