"""Results of operators that convolutional networks are made of, on plain tensors without data, worked out here.

Torch works them out in Python, by code that imports ``sympy`` and all of ``torch._dynamo`` on its first use: this takes
longer than all else that loading such a model does. What is plain is settled here: tensors in the order of their
dimensions, and arguments that leave no question. Torch is asked for the rest, and to say what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.ops import dequantize, quantize

aten = torch.ops.aten
Shape = tuple[int, ...]
Sizes = int | Sequence[int]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def plain_result(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What torch says that ``target`` gives of tensors on the meta device; None where torch is to be asked itself.

    Args:
        args: by place; all that the operator cannot do without, each of a type that its schema takes.
    """
    if kwargs or (target not in _SHAPES and target not in _DTYPES):
        return None
    by_place = [a for a in target._schema.arguments if not a.kwarg_only]  # type: ignore[attr-defined]
    if len(args) > len(by_place) or not _is_plain(args[0]):
        return None
    shape, dtype = args[0].shape, args[0].dtype
    if target in _DTYPES:
        return torch.empty(shape, dtype=args[_DTYPES[target]], device="meta")
    tensors = [given for given, a in zip(args, by_place, strict=False) if "Tensor" in str(a.type) and given is not None]
    if dtype not in _FLOATS or not all(_is_plain(t) and t.dtype is dtype for t in tensors):
        return None
    shape = _SHAPES[target](*args)
    return None if shape is None else torch.empty(shape, dtype=dtype, device="meta")


def _is_plain(x: object) -> bool:
    """A tensor with elements, in the order of its dimensions; of a dimension of size 1 the stride counts too."""
    return isinstance(x, Tensor) and x.numel() > 0 and x.stride() == torch.empty(x.shape, device="meta").stride()


def _same(x: Tensor) -> Shape:
    return tuple(x.shape)


def _bounded(x: Tensor, low: complex = -1.0, high: complex = 1.0) -> Shape | None:
    return tuple(x.shape) if type(low) in (int, float) and type(high) in (int, float) else None


def _of_both(x: Tensor, y: Tensor) -> Shape | None:
    return tuple(x.shape) if x.shape == y.shape else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Shape | None:
    fits = x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and _is_bias(bias, weight)
    return (*x.shape[:-1], weight.shape[0]) if fits else None


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Shape | None:
    if not x.ndim == weight.ndim == 4 or x.shape[1] != weight.shape[1] * groups or not _is_bias(bias, weight):
        return None
    places = _places(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return (x.shape[0], weight.shape[0], *places) if places else None


def _is_bias(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is None or bias.shape == weight.shape[:1]


def _max_pooled(x: Tensor, kernel: Sizes, stride: Sizes = (), padding: Sizes = 0, *more: object) -> Shape | None:
    if x.ndim != 4 or more or any(2 * p > k for p, k in zip(_pair(padding), _pair(kernel), strict=False)):
        return None
    places = _places(x.shape[2:], kernel, kernel if stride in ((), []) else stride, padding, 1)
    return (*x.shape[:2], *places) if places else None


def _places(sizes: Sequence[int], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Shape | None:
    """How many places a window has along each of two dimensions; None where it has none, or is no window."""
    settings = [_pair(setting) for setting in (kernel, stride, padding, dilation)]
    if any(len(setting) != 2 for setting in settings):
        return None
    found = []
    for size, k, s, p, d in zip(sizes, *settings, strict=True):
        free = size + 2 * p - d * (k - 1) - 1
        if min(k, s, d) < 1 or min(p, free) < 0:
            return None
        found.append(free // s + 1)
    return tuple(found)


def _pair(setting: Sizes) -> Sequence[int]:
    return (setting, setting) if isinstance(setting, int) else setting


def _averaged(x: Tensor, size: Sizes) -> Shape | None:
    return (*x.shape[:2], 1, 1) if x.ndim == 4 and tuple(_pair(size)) == (1, 1) else None


_SHAPES: Mapping[Any, Callable[..., Shape | None]] = {
    **dict.fromkeys((aten.relu.default, aten.gelu.default, aten.tanh.default, aten.hardswish.default), _same),
    aten.hardtanh.default: _bounded,
    aten.add.Tensor: _of_both,
    aten.mul.Tensor: _of_both,
    aten.linear.default: _linear,
    aten.conv2d.default: _convolved,
    aten.max_pool2d.default: _max_pooled,
    aten.adaptive_avg_pool2d.default: _averaged,
}
"""Operators on floats of one dtype, which their results have too: the shape, None where it is not settled here."""

_DTYPES: Mapping[Any, int] = {quantize: 7, dequantize: 5}
"""Operators whose results are like their first argument: where the argument stands that says of what dtype."""
