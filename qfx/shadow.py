"""A stand-in for the user's model, which capture may run, switch and throw away: the model itself is not touched."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qfx.errors import CaptureError


def shadow_of(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of ``model`` in eval mode that shares the memory of its parameters, and notes on what differs in it.

    Buffers are copied: a forward that runs may write to them. Caches of generating language models are turned off in
    the copy's ``config``, since a cache is an object that a graph cannot take or return.

    Raises:
        CaptureError: the model cannot be copied.
    """
    try:
        shadow = copy.deepcopy(model, {id(t): twin for t, twin in _twins(model)})
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="capture works on a copy.deepcopy of the model that shares its weights; drop what cannot be copied",
        ) from error
    shadow.eval()
    return shadow, _without_cache(shadow)


def _twins(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors that share memory instead of being copied: parameters, and what autograd made (which has no copy).

    They are tensors of their own, for ``module.half()`` changes a parameter in place.
    """
    for parameter in model.parameters():
        yield parameter, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for module in model.modules():
        yield from ((v, v.detach()) for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)


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
