"""A stand-in for the user's model, which capture may run, switch and throw away: the model itself is not touched."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qfx.errors import CaptureError


def shadow_of(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of ``model`` in eval mode that shares the memory of its parameters, and notes on what differs in it.

    Buffers are copied: a forward that runs may write to them. Caches of generating language models are turned off in
    the copy's ``config``, since a cache is an object that a graph cannot take or return.

    Raises:
        CaptureError: the model cannot be copied.
    """
    shadow = _copied(model, {id(t): twin for t, twin in _twins(model)})
    shadow.eval()
    return shadow, _without_cache(shadow)


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with memory of its own, in the same modes, for training that leaves ``model`` as it is.

    Raises:
        CaptureError: the model cannot be copied.
    """
    return _copied(model, {id(v): v.detach().clone() for m in model.modules() for v in _made_by_autograd(m)})


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="capture works on a copy.deepcopy of the model; drop what cannot be copied",
        ) from error


def train_flags(model: nn.Module, shadow: nn.Module) -> dict[nn.Module, bool]:
    """Which modules of the stand-in train: those of ``model`` that do, or all where it is in eval mode."""
    whole = model.training
    own = dict(model.named_modules())
    return {module: own[path].training if whole else True for path, module in shadow.named_modules()}


@contextmanager
def switched(flags: Mapping[nn.Module, bool]) -> Iterator[None]:
    """The modules in the modes of ``flags``; afterwards in eval mode.

    A batch norm that averages cumulatively (``momentum=None``) reads its counter's value, which a trace cannot: it gets
    a momentum meanwhile, which nobody uses.
    """
    cumulative = [m for m in flags if isinstance(m, _BatchNorm) and m.momentum is None]
    try:
        for module, training in flags.items():
            module.training = training
        for module in cumulative:
            module.momentum = 0.1
        yield
    finally:
        for module in flags:
            module.training = False
        for module in cumulative:
            module.momentum = None


def _twins(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors that share memory instead of being copied: parameters, and what autograd made (which has no copy).

    They are tensors of their own, for ``module.half()`` changes a parameter in place.
    """
    for parameter in model.parameters():
        yield parameter, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for module in model.modules():
        yield from ((v, v.detach()) for v in _made_by_autograd(module))


def _made_by_autograd(module: nn.Module) -> list[Tensor]:
    return [v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]


def _without_cache(shadow: nn.Module) -> list[str]:
    configs: list[Any] = [getattr(module, "config", None) for module in shadow.modules()]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", None) is True}
    for config in caching.values():
        config.use_cache = False
    return ["config.use_cache is off in the captured graph: it returns no key-value cache"] if caching else []


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run without gradients and without torch's fused encoder kernels; afterwards all is as before.

    The states of all random generators come back. The fused kernels (``torch.backends.mha``) would hide a whole
    transformer layer in one opaque operator.
    """
    python, numpy = random.getstate(), np.random.get_state()
    fused = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        random.setstate(python)
        np.random.set_state(numpy)
