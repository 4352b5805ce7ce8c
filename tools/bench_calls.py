"""Calls of a model at other sizes than its example, and whether two results have one structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx.metrics import sqnr_db
from qfx.structure import flatten


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on ``inputs`` as ``qfx.quantize`` understands them: a tensor, a tuple, or a dict of keywords."""
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*tensors(inputs))


def tensors(inputs: Any) -> tuple[Tensor, ...]:
    """The tensors of ``inputs``, in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values() if isinstance(inputs, Mapping) else inputs)


def resized(inputs: Any, batch: int, *, length: int | None = None, seed: int = 0) -> Any:
    """Other inputs of the same kind, with ``batch`` rows and, for token tensors, ``length`` columns.

    Floating-point tensors are drawn from a standard normal distribution, integers and booleans from the example's own
    values (so that ids stay in the vocabulary, and a mask of ones stays one).
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.randn(batch, *x.shape[1:], generator=generator, device="cpu").to(x)
        shape = (batch, *x.shape[1:]) if length is None or x.ndim < 2 else (batch, length, *x.shape[2:])
        picks = torch.randint(x.numel(), shape, generator=generator, device="cpu")
        return x.flatten()[picks]

    if isinstance(inputs, Mapping):
        return {name: draw(x) for name, x in inputs.items()}
    return draw(inputs) if isinstance(inputs, Tensor) else tuple(draw(x) for x in inputs)


def token_length(inputs: Any) -> int | None:
    """The number of columns of the first integer tensor; None for a model that takes no tokens."""
    values = inputs.values() if isinstance(inputs, Mapping) else (inputs if isinstance(inputs, tuple) else (inputs,))
    return next((int(x.shape[1]) for x in values if not x.is_floating_point() and x.ndim > 1), None)


def mismatch(want: Any, got: Any) -> str:
    """How ``got`` differs from ``want`` in structure, shapes or dtypes; ``""`` where it does not."""
    (wanted, structure), (given, other) = flatten(want), flatten(got)
    if structure != other:
        return f"the output is {other} in place of {structure}"
    for i, (x, y) in enumerate(zip(wanted, given, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"output {i} is {y.dtype} {list(y.shape)} in place of {x.dtype} {list(x.shape)}"
        if y.is_floating_point() and bool(x.isfinite().all()) and not bool(y.isfinite().all()):
            return f"output {i} is not finite"
    return ""


def worst_sqnr_db(want: Any, got: Any) -> float:
    """The least SQNR, in dB, over the floating-point tensors of two results of one structure."""
    pairs = zip(flatten(want)[0], flatten(got)[0], strict=True)
    return min(sqnr_db(x, y) for x, y in pairs if x.is_floating_point())
