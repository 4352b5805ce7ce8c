"""BERT: a bidirectional transformer encoder with a classification head.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018: layer norm
behind each residual sum, exact GELU, learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.models.seeded import seeded


@dataclass(frozen=True)
class BertConfig:
    """The geometry; the defaults are BERT-base. ``num_labels=0`` leaves out pooler and classifier."""

    vocab_size: int = 30522
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    max_length: int = 512
    token_types: int = 2
    num_labels: int = 2
    eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")


BERT_BASE = BertConfig()
BERT_SMALL = BertConfig(dim=512, layers=4, heads=8, hidden=2048)


class BertEmbeddings(nn.Module):
    """Ids and types, int ``[N, L]``, to the normalised sum of three embeddings, float ``[N, L, dim]``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.position_embeddings = nn.Embedding(config.max_length, config.dim)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]
        else:
            types = self.token_type_embeddings(token_type_ids)
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        x: Tensor = self.dropout(self.norm(self.word_embeddings(input_ids) + positions + types))
        return x


class BertAttention(nn.Module):
    """Multi-head self-attention on ``[N, L, dim]``; ``mask`` is bool ``[N, 1, 1, L]``, true where a key is seen."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.output = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        x = self.output(x.transpose(1, 2).flatten(2))
        return x


class BertLayer(nn.Module):
    """Attention and a two-layer perceptron, each with residual and layer norm: ``[N, L, dim]`` to the same."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.intermediate = nn.Linear(config.dim, config.hidden)
        self.output = nn.Linear(config.hidden, config.dim)
        self.output_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        x = self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))
        return x


class Bert(nn.Module):
    """The encoder, with a classifier on the first token's state.

    Takes ``input_ids``, int ``[N, L]`` with L at most ``max_length``; ``attention_mask``, int or bool ``[N, L]``, zero
    where a key is padding; ``token_type_ids``, int ``[N, L]``, all zero by default. Returns a dict of ``"hidden"``,
    float ``[N, L, dim]``, and, with a head, ``"logits"``, float ``[N, num_labels]``.
    """

    def __init__(self, config: BertConfig = BERT_BASE) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        if config.num_labels:
            self.pooler = nn.Linear(config.dim, config.dim)
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = nn.Linear(config.dim, config.num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(f"{input_ids.shape[1]} tokens, where this model has {self.config.max_length} positions")
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        if not self.config.num_labels:
            return {"hidden": x}
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return {"logits": self.classifier(self.dropout(pooled)), "hidden": x}


def build_bert(config: BertConfig = BERT_BASE, *, seed: int = 0) -> Bert:
    """BERT with random weights, in eval mode."""
    return seeded(lambda: Bert(config), seed)
