"""Random weights that a seed decides, with torch's global random state left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm)


def seeded(build: Callable[[], M], seed: int = 0) -> M:
    """Call ``build()`` with the CPU generator at ``seed``; the model comes back on the CPU and in eval mode.

    The layers keep torch's own initialisation, but every normalisation gets a weight in [0.5, 1.5) and a bias of
    standard deviation 0.1: ones and zeros would hide a folding that forgets them.
    The global random state is the same afterwards, on every device.
    """
    # Not torch.manual_seed, which would seed the accelerators too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = build()
        _vary_norms(model)
    return model.eval()


@torch.no_grad()
def _vary_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, NORMS):
            for name, parameter in module.named_parameters(recurse=False):
                if name == "weight":
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.1)
