"""Which steps behind a convolution or linear layer oneDNN's kernels do themselves.

Every row was tried: oneDNN refuses some combinations, and gives wrong numbers for others (``qlinear`` with the binary
post-op ``add`` and integer operands). What no row names runs behind the kernel, on its float32 output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qfx.targets.base import QParams, Step


@dataclass(frozen=True)
class PostOp:
    """An element-wise function in oneDNN's words."""

    attr: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


NONE = PostOp()


def _clip(low: Any = None, high: Any = None) -> PostOp | None:
    bounded = low is not None and high is not None and low <= high
    return PostOp("hardtanh", (float(low), float(high))) if bounded else None


def _gelu(approximate: str = "none") -> PostOp:
    return PostOp("gelu", (), approximate)


def _leaky_relu(negative_slope: float = 0.01) -> PostOp:
    return PostOp("leaky_relu", (float(negative_slope),))


_CONV2D: dict[str, Callable[..., PostOp | None]] = {
    "relu": lambda: PostOp("relu"),
    "relu6": lambda: PostOp("hardtanh", (0.0, 6.0)),
    "hardtanh": lambda low=-1.0, high=1.0: _clip(low, high),
    "clamp": _clip,
    "hardswish": lambda: PostOp("hardswish"),
    "silu": lambda: PostOp("swish"),
}

POST_OPS: dict[str, dict[str, Callable[..., PostOp | None]]] = {
    "conv2d": _CONV2D,
    "conv3d": {},
    "conv_transpose2d": _CONV2D,
    "conv_transpose3d": {},
    "linear": _CONV2D | {"leaky_relu": _leaky_relu, "gelu": _gelu, "tanh": lambda: PostOp("tanh")},
}
"""kernel -> step -> its post-op, made from the step's arguments; None where these do not fit."""

BOUNDS: dict[str, Callable[..., tuple[float | None, float | None]]] = {
    "relu": lambda: (0.0, None),
    "relu6": lambda: (0.0, 6.0),
    "hardtanh": lambda low=-1.0, high=1.0: (low, high),
    "clamp": lambda low=None, high=None: (low, high),
}
"""Steps that bound a value. Rounding keeps order, so that bounding the integers afterwards gives the same."""

SUM = ("conv2d", "linear")
"""Kernels that add an integer tensor of the output's own dtype (oneDNN's post-op ``sum``), and then may take a relu."""


@dataclass(frozen=True)
class Fusion:
    """How a layer's steps run.

    ``inside``: by the kernel itself, with the element-wise ``post`` op, behind the addition of ``other`` where
    ``adds``; then the output's integers are bounded by the reals ``low`` and ``high``. Not inside: the kernel gives
    float32, and the steps follow.
    """

    inside: bool
    adds: bool = False
    post: PostOp = NONE
    low: float = -math.inf
    high: float = math.inf


BEHIND = Fusion(inside=False)


def fuse(kernel: str, steps: tuple[Step, ...], output: QParams | None) -> Fusion:
    """The first of these that holds: no step; a post-op; bounds on integers; a sum with any of these; else behind."""
    adds = bool(steps) and steps[0].name == "add"
    rest = steps[1:] if adds else steps
    if len(rest) > 1 or (adds and not _can_add(kernel, steps[0].other, output)):
        return BEHIND
    if not rest:
        return Fusion(inside=True, adds=adds)
    step = rest[0]
    post_ops = POST_OPS[kernel] if not adds else {"relu": _CONV2D["relu"]}
    post = _of(post_ops, step)
    if post is not None:
        return Fusion(inside=True, adds=adds, post=post)
    limits = real_bounds(step)
    if limits is not None and output is not None:
        return Fusion(inside=True, adds=adds, low=limits[0], high=limits[1])
    return BEHIND


def real_bounds(step: Step) -> tuple[float, float] | None:
    """What the step bounds its values to, or None where it does anything else."""
    limits = _of(BOUNDS, step)
    if limits is None:
        return None
    low, high = limits
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _can_add(kernel: str, other: QParams | None, output: QParams | None) -> bool:
    same = other is not None and output is not None and other.dtype == output.dtype
    return kernel in SUM and same and other is not None and other.dtype in (torch.uint8, torch.int8)


def _of(table: dict[str, Callable[..., Any]], step: Step) -> Any:
    row = table.get(step.name)
    return None if row is None else row(*step.args, *dict(step.kwargs).values())
