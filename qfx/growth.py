"""One example, two batch sizes: the row alone and the row repeated, and whether results agree on it.

``torch.export`` fixes a size of 1, so a batch of 1 is grown to 2 for tracing; an example of a larger batch is narrowed
to 1, to see that the graph runs there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_RELATIVE: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The greatest difference, relative to the greatest magnitude, by which equal computations may differ."""

_DEFAULT_RELATIVE = 1e-3


def batch_of(tensors: Sequence[Tensor]) -> int:
    """The batch size: the leading size of the first tensor that has one; 0 where none has."""
    return next((int(t.shape[0]) for t in tensors if t.dim()), 0)


def resized(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The example with its batch of 1 repeated to 2, or with a larger one narrowed to 1; None without a batch.

    Tensors whose leading size is another than the batch stay as they are.
    """
    batch = batch_of(tensors)
    if batch == 0:
        return None
    change = _repeated if batch == 1 else _narrowed
    return tuple(change(t) if t.dim() and t.shape[0] == batch else t for t in tensors)


def _repeated(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor[:1]


def row_disagreement(single: Sequence[Any], batch: Sequence[Any]) -> str:
    """Why the results for one row are not the first of those for the batch; ``""`` where they are."""
    if len(single) != len(batch):
        return f"it returns {len(single)} tensors for a row alone and {len(batch)} for a batch"
    for one, many in zip(single, batch, strict=True):
        if isinstance(one, Tensor) and isinstance(many, Tensor):
            if one.dim() != many.dim() or any(a > b for a, b in zip(one.shape, many.shape, strict=True)):
                return f"a result has shape {list(one.shape)} for a row alone and {list(many.shape)} for a batch"
            corner = many[tuple(slice(0, n) for n in one.shape)]
            if text := difference(one, corner):
                return f"the first row of a batch is not what the row gives alone: {text}"
    return ""


def differences(want: Sequence[Any], got: Sequence[Any]) -> str:
    """The first difference between two flat results; ``""`` where there is none beyond rounding."""
    if len(want) != len(got):
        return f"{len(got)} results in place of {len(want)}"
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
                return f"result {i} is {b!r} in place of {a!r}"
        elif text := difference(a, b):
            return f"result {i}: {text}"
    return ""


def difference(want: Tensor, got: Tensor) -> str:
    """How two tensors differ beyond rounding; ``""`` where they do not."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{got.dtype} of shape {list(got.shape)} in place of {want.dtype} of shape {list(want.shape)}"
    if not want.numel():
        return ""
    if not (want.is_floating_point() or want.is_complex()):
        return "" if torch.equal(want, got) else f"{int((want != got).sum())} of {want.numel()} integers differ"
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = want.to(wide), got.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return ""
    finite = a.isfinite()
    most = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
    off = float((a - b)[~same].abs().nan_to_num(torch.inf).max())
    bound = _RELATIVE.get(want.dtype, _DEFAULT_RELATIVE) * most + 1e-6
    return "" if off <= bound else f"values differ by up to {off:.3g}, the greatest magnitude is {most:.3g}"
