"""What a quantized model refuses, by name: gradients through integers, and a change of its floating-point dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


def freeze(module: nn.Module, foreign: Collection[int] = frozenset()) -> None:
    """Replace parameters by ones that require no gradient; the user's own stay as they are. Tied ones stay tied.

    ``foreign``: addresses of storages (:func:`storages`) that belong to another model. Parameters and buffers in them
    become copies, so that neither model changes with the other; all else keeps its memory.
    """
    made: dict[Tensor, Any] = {}

    def own(t: Tensor) -> Any:
        if t not in made:
            data = t.detach().clone() if _address(t) in foreign else t.detach()
            made[t] = nn.Parameter(data, requires_grad=False) if isinstance(t, nn.Parameter) else data
        return made[t]

    for child in module.modules():
        child._parameters.update({name: own(p) for name, p in child._parameters.items() if p is not None})
        child._buffers.update({name: own(b) for name, b in child._buffers.items() if b is not None})


def storages(module: nn.Module) -> frozenset[int]:
    """The addresses of the memory that parameters and buffers of ``module`` lie in."""
    return frozenset(_address(t) for t in (*module.parameters(), *module.buffers())) - {0}


def _address(t: Tensor) -> int:
    """Where the tensor's memory begins; 0 where it has none."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


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
