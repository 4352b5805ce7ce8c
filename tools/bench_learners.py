"""Training steps to be timed: a model in float, prepared by qfx, and prepared by torch's FX mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.models import BERT_SMALL, build_bert, build_resnet_cifar
from qfx.tools.bench_figures import Skip

Step = Callable[[], Tensor]
BATCHES = {"resnet20": 128, "bert_small": 32}
TOKENS = 128


def learner(name: str, what: str, *, small: bool = False) -> Step:
    """One step of SGD with momentum: forward, loss, backward, update; it returns the loss.

    Args:
        name: ``resnet20`` (batch 128 of 32x32 images) or ``bert_small`` (batch 32 of 128 tokens).
        what: ``float``, ``int8`` or another recipe of qfx, or ``fx``: torch's FX mode.
        small: a batch of 2.

    Raises:
        Skip: this torch has no FX mode, or FX mode cannot trace the model.
    """
    torch.manual_seed(0)
    rows = 2 if small else BATCHES[name]
    if name == "resnet20":
        model: nn.Module = build_resnet_cifar(20)
        x = torch.randn(rows, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    else:
        model = build_bert(BERT_SMALL)
        x = torch.randint(0, BERT_SMALL.vocab_size, (rows, TOKENS))
    model.train()
    trained = _PREPARED.get(what, _qfx)(model, x, what)
    labels = torch.randint(0, 2, (rows,))
    optimizer = torch.optim.SGD(trained.parameters(), 1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(trained(x)), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _logits(result: Tensor | Mapping[str, Tensor]) -> Tensor:
    """``[rows, classes]``: the result itself, or BERT's by its name."""
    return result if isinstance(result, Tensor) else result["logits"]


def _float(model: nn.Module, x: Tensor, what: str) -> nn.Module:
    return model


def _qfx(model: nn.Module, x: Tensor, what: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return qfx.prepare(model, x[:2], recipe=what, mode="qat")


def _fx(model: nn.Module, x: Tensor, what: str) -> nn.Module:
    try:
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx
    except ImportError as error:
        raise Skip(f"this torch has no FX mode: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its removal
        try:
            prepared: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (x[:2],))
        except Exception as error:
            raise Skip(f"FX mode cannot prepare it: {type(error).__name__}") from error
    return prepared


_PREPARED: dict[str, Callable[[nn.Module, Tensor, str], nn.Module]] = {"float": _float, "fx": _fx}
