"""What a quantized model refuses, by name: gradients through integers, and a change of its floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qfx.errors import UnsupportedError
from qfx.meta import graph_info


@dataclass(frozen=True)
class GradientGuard:
    """A forward pre-hook (``with_kwargs=True``): rounding to integers has no gradient, so none may be asked for."""

    model: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            raise UnsupportedError(
                f"{self.model} is quantized: its integers have no gradient, but an input requires one",
                hint="call it under torch.no_grad(), or detach the input; to train, quantize after training",
            )


def freeze(module: nn.Module) -> None:
    """Replace parameters by ones that require no gradient, on the same storage; the user's own stay as they are.

    Tied parameters stay tied.
    """
    frozen = {p: nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters() if p.requires_grad}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = frozen.get(parameter, parameter)


def refuse_dtype(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where ``fn`` of ``Module._apply`` would change floating-point dtypes of a lowered graph.

    Raises:
        UnsupportedError: scales must stay float32, and kernels were chosen for the dtype around them.
    """
    if graph_info(module).stage != "LOWERED":
        return
    for dtype in {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}:
        if (new := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
            raise UnsupportedError(
                f"a quantized model keeps the dtype that it was quantized in: {dtype} cannot become {new}",
                hint="convert the float model first (model.half(), model.bfloat16()) and quantize that",
            )
