"""A stand-in for the user's model that capture may run, switch and throw away, so that the model itself is not touched."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qfx.errors import CaptureError


def shadow_of(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of ``model`` in eval mode that shares its parameters, and notes on what differs in it.

    Buffers are copied: a forward that runs may write to them. Caches of generating language models are turned off in
    the copy's ``config``, since a cache is an object that a graph cannot take or return.

    Raises:
        CaptureError: the model cannot be copied.
    """
    memo = {id(t): t for t in shared_tensors(model)}
    try:
        shadow = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="capture works on a copy.deepcopy of the model that shares its weights; drop what cannot be copied",
        ) from error
    shadow.eval()
    return shadow, _without_cache(shadow)


def shared_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, and tensors kept as plain attributes that autograd has made (which cannot be copied)."""
    yield from model.parameters()
    for module in model.modules():
        yield from (v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf)


def _without_cache(shadow: nn.Module) -> list[str]:
    configs = {id(c): c for m in shadow.modules() if getattr(c := getattr(m, "config", None), "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    return ["config.use_cache is off in the captured graph: it returns no key-value cache"] if configs else []


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
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        random.setstate(python)
        np.random.set_state(numpy)
