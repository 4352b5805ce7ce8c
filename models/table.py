"""The reference models by name, at their published size and small, each with example inputs of batch 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from qfx.models.bert import BERT_BASE, BERT_SMALL, BertConfig, build_bert
from qfx.models.examples import random_images, random_tokens
from qfx.models.llama import STORIES_260K, LlamaConfig, build_llama
from qfx.models.mobilenet_v2 import Stage, build_mobilenet_v2
from qfx.models.resnet import build_resnet
from qfx.models.resnet_cifar import build_resnet_cifar
from qfx.models.vit import VIT_S16, VitConfig, build_vit

Example = tuple[Tensor, ...] | dict[str, Tensor]


class ModelFactory(Protocol):
    """Gives a model in eval mode and what to call it with: positional arguments as a tuple, or keywords as a dict."""

    def __call__(self, *, seed: int = 0) -> tuple[nn.Module, Example]: ...


def _convolutional(build: Callable[..., nn.Module], image_size: int) -> ModelFactory:
    def make(*, seed: int = 0) -> tuple[nn.Module, Example]:
        return build(image_size=image_size, seed=seed), (random_images(image_size, seed=seed),)

    return make


def _vit(config: VitConfig) -> ModelFactory:
    def make(*, seed: int = 0) -> tuple[nn.Module, Example]:
        return build_vit(config, seed=seed), (random_images(config.image_size, seed=seed),)

    return make


def _bert_by_keyword(config: BertConfig, length: int) -> ModelFactory:
    def make(*, seed: int = 0) -> tuple[nn.Module, Example]:
        ids = random_tokens(length, config.vocab_size, seed=seed)
        types = (torch.arange(length, device="cpu") >= length // 2).long().unsqueeze(0)
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
        return build_bert(config, seed=seed), example

    return make


def _bert_by_position(config: BertConfig, length: int) -> ModelFactory:
    def make(*, seed: int = 0) -> tuple[nn.Module, Example]:
        return build_bert(config, seed=seed), (random_tokens(length, config.vocab_size, seed=seed),)

    return make


def _llama(config: LlamaConfig, length: int) -> ModelFactory:
    def make(*, seed: int = 0) -> tuple[nn.Module, Example]:
        return build_llama(config, seed=seed), (random_tokens(length, config.vocab_size, seed=seed),)

    return make


MODELS: dict[str, ModelFactory] = {
    "resnet18": _convolutional(partial(build_resnet, 18), 224),
    "resnet50": _convolutional(partial(build_resnet, 50), 224),
    "resnet20": _convolutional(build_resnet_cifar, 32),
    "mobilenet_v2": _convolutional(build_mobilenet_v2, 224),
    "bert_base": _bert_by_keyword(BERT_BASE, 128),
    "bert_small": _bert_by_position(BERT_SMALL, 128),
    "vit_s16": _vit(VIT_S16),
    "llama": _llama(STORIES_260K, 128),
}

# The same code and names at sizes that capture, calibrate and run within moments: for tests.
MODELS_SMALL: dict[str, ModelFactory] = {
    "resnet18": _convolutional(partial(build_resnet, 18, blocks=(1, 1, 1, 1), width=16, num_classes=10), 64),
    "resnet50": _convolutional(partial(build_resnet, 50, blocks=(2, 1, 1, 1), width=16, num_classes=10), 64),
    "resnet20": _convolutional(partial(build_resnet_cifar, 8), 32),
    "mobilenet_v2": _convolutional(
        partial(
            build_mobilenet_v2,
            stages=(Stage(1, 16, 1, 1), Stage(6, 24, 2, 2), Stage(6, 32, 1, 2)),
            width_multiplier=0.5,
            num_classes=10,
        ),
        64,
    ),
    "bert_base": _bert_by_keyword(
        BertConfig(vocab_size=200, dim=64, layers=2, heads=4, hidden=256, max_length=64), length=16
    ),
    "bert_small": _bert_by_position(
        BertConfig(vocab_size=200, dim=48, layers=1, heads=4, hidden=192, max_length=64), length=16
    ),
    "vit_s16": _vit(VitConfig(image_size=32, patch_size=8, dim=48, layers=2, heads=3, hidden=192, num_classes=10)),
    "llama": _llama(LlamaConfig(vocab_size=128, dim=32, layers=2, heads=4, kv_heads=2, hidden=84, max_length=64), 16),
}
