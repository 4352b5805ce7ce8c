"""Reference models for tests, examples and benchmarks; they need torch only.

``MODELS[name]()`` gives a model in eval mode with example inputs of batch 1, ``MODELS_SMALL[name]()`` a small one of
the same code. Weights are random, decided by ``seed``, with settled batch-norm statistics.
"""

from qfx.models.bert import BERT_BASE, BERT_SMALL, Bert, BertConfig, build_bert
from qfx.models.digits import DigitsResNet, load_digits, train_digits
from qfx.models.examples import random_images, random_tokens
from qfx.models.llama import STORIES_260K, Llama, LlamaConfig, build_llama, load_stories260k
from qfx.models.mobilenet_v2 import MobileNetV2, build_mobilenet_v2
from qfx.models.resnet import ResNet, build_resnet
from qfx.models.resnet_cifar import CifarResNet, build_resnet_cifar, load_resnet20
from qfx.models.seeded import seeded
from qfx.models.settle import settle_batch_norm
from qfx.models.table import MODELS, MODELS_SMALL, Example, ModelFactory
from qfx.models.vit import VIT_S16, Vit, VitConfig, build_vit

__all__ = [
    "BERT_BASE",
    "BERT_SMALL",
    "MODELS",
    "MODELS_SMALL",
    "STORIES_260K",
    "VIT_S16",
    "Bert",
    "BertConfig",
    "CifarResNet",
    "DigitsResNet",
    "Example",
    "Llama",
    "LlamaConfig",
    "MobileNetV2",
    "ModelFactory",
    "ResNet",
    "Vit",
    "VitConfig",
    "build_bert",
    "build_llama",
    "build_mobilenet_v2",
    "build_resnet",
    "build_resnet_cifar",
    "build_vit",
    "load_digits",
    "load_resnet20",
    "load_stories260k",
    "random_images",
    "random_tokens",
    "seeded",
    "settle_batch_norm",
    "train_digits",
]

if __name__ != "qfx.models":
    raise ImportError(f"this package is qfx.models and is imported under that name only, not as {__name__}")
