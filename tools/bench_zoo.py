"""Models of torchvision, timm and transformers for the coverage benchmark, with random weights: no downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from qfx.models import random_images, random_tokens, seeded, settle_batch_norm
from qfx.tools.bench_figures import need

Made = tuple[nn.Module, Any]

# The least share of multiply-accumulates in integer.
CONVOLUTIONAL, TRANSFORMER = 0.99, 0.98


@dataclass(frozen=True)
class Image:
    """An image model by name; ``arguments`` go to its function.

    ``share``: the least share of multiply-accumulates in integer.
    """

    name: str
    size: int = 224
    share: float = CONVOLUTIONAL
    arguments: Mapping[str, Any] = field(default_factory=dict)


TORCHVISION = (
    Image("alexnet"),
    Image("vgg11_bn"),
    Image("resnet18", 128),
    Image("squeezenet1_1"),
    Image("densenet121", 128),
    Image("googlenet", 128, arguments={"init_weights": False}),
    Image("shufflenet_v2_x1_0", 128),
    Image("mobilenet_v3_large", 128),
    Image("efficientnet_b0", 128),
    Image("regnet_y_400mf", 128),
    Image("convnext_tiny", 128),
    Image("segmentation.lraspp_mobilenet_v3_large", 128, arguments={"weights_backbone": None}),
    Image("vit_b_16", 224, TRANSFORMER),
    Image("swin_t", 224, TRANSFORMER),
)
TIMM = (
    Image("resnet26d", 128),
    Image("res2net50_26w_4s", 128),
    Image("mobilenetv3_small_100", 128),
    Image("ghostnet_100", 128),
    Image("repvgg_a0", 128),
    Image("tf_efficientnet_lite0", 128),
    Image("convnext_atto", 128),
    Image("poolformer_s12", 128),
    Image("mobilevit_xxs", 128, TRANSFORMER),
    Image("mixer_s32_224", 224, TRANSFORMER),
    Image("vit_tiny_patch16_224", 224, TRANSFORMER),
    Image("deit_tiny_patch16_224", 224, TRANSFORMER),
    Image("levit_128s", 224, TRANSFORMER),
)


def torchvision_model(entry: Image) -> Made:
    owner = need("torchvision").models
    *packages, name = entry.name.split(".")
    for package in packages:
        owner = getattr(owner, package)
    return _settled(partial(getattr(owner, name), weights=None, **entry.arguments), entry)


def timm_model(entry: Image) -> Made:
    return _settled(partial(need("timm").create_model, entry.name, pretrained=False, **entry.arguments), entry)


def _settled(build: Callable[[], nn.Module], entry: Image) -> Made:
    example = (random_images(entry.size),)
    model = seeded(lambda: _without_zero_weights(build()))
    return settle_batch_norm(model, example, batch_size=4), example


@torch.no_grad()
def _without_zero_weights(model: nn.Module) -> nn.Module:
    """Vision transformers start with a head of zeros, behind which nothing could be seen."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.02)
    return model


# --- transformers: tiny configurations ---------------------------------------------------------------------------

VOCABULARY, LENGTH = 128, 16
# The geometry under the names that most configurations share.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
IMAGES = {"image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Language:
    """A transformers model: its class, its configuration's class and arguments, and which inputs it takes."""

    model: str
    config: str
    arguments: Mapping[str, Any]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    share: float = TRANSFORMER


TRANSFORMERS = (
    Language("BertForSequenceClassification", "BertConfig", TINY),
    Language("RobertaModel", "RobertaConfig", TINY),
    Language(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 128,
            "max_position_embeddings": 64,
        },
    ),
    Language("AlbertModel", "AlbertConfig", {**TINY, "embedding_size": 32}),
    Language(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False},
        ("input_ids",),
    ),
    Language(
        "LlamaForCausalLM", "LlamaConfig", {**TINY, "num_key_value_heads": 2, "use_cache": False}, ("input_ids",)
    ),
    Language(
        "MistralForCausalLM", "MistralConfig", {**TINY, "num_key_value_heads": 2, "use_cache": False}, ("input_ids",)
    ),
    Language(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        ("input_ids", "decoder_input_ids"),
    ),
    Language("ViTForImageClassification", "ViTConfig", {**TINY, **IMAGES}, ("pixel_values",)),
    Language(
        "CLIPVisionModel", "CLIPVisionConfig", {**TINY, **IMAGES, "projection_dim": 32}, ("pixel_values",)
    ),
)

INPUTS: Mapping[str, Callable[[], torch.Tensor]] = {
    "input_ids": lambda: random_tokens(LENGTH, VOCABULARY),
    "decoder_input_ids": lambda: random_tokens(LENGTH, VOCABULARY, seed=1),
    "attention_mask": lambda: torch.ones(1, LENGTH, dtype=torch.int64, device="cpu"),
    "pixel_values": lambda: random_images(IMAGES["image_size"]),
}


def transformers_model(entry: Language) -> Made:
    package = need("transformers")
    config = getattr(package, entry.config)(**entry.arguments)
    model: nn.Module = seeded(partial(getattr(package, entry.model), config))
    return model, {name: INPUTS[name]() for name in entry.inputs}
