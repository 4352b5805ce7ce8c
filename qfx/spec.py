"""What quantization is asked for, as values: element types, schemes, granularities and specs.

Every class here is frozen: it compares, hashes and prints as a value and holds no tensor and no graph node.
A spec names an *observer factory* without importing the observers: any hashable callable ``factory(spec) -> Observer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from qfx.errors import ConfigError
from qfx.training import MOVING, Estimator, Ranges

MIN_BITS, MAX_BITS = 2, 8
SCALE_DTYPES = (torch.float32, torch.float16)
"""What the scales of weights may be values of."""


@dataclass(frozen=True, order=True)
class IntType:
    """An integer element type of 2 to 8 bits, stored in one byte (or packed: see :func:`qfx.ops.pack`)."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"an integer type has {MIN_BITS} to {MAX_BITS} bits, got {self.bits!r}",
                hint="1 bit is out of scope; ternary weights are 2 bits with narrow_range=True",
            )

    @property
    def quant_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that carries one element: ``torch.int8`` or ``torch.uint8``."""
        return torch.int8 if self.signed else torch.uint8

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"


ElementType = IntType  # the union of all element types; floats and codebooks join it as classes of their own

INT8, UINT8 = IntType(8, True), IntType(8, False)
INT4, UINT4 = IntType(4, True), IntType(4, False)


class Scheme(Enum):
    """How a range maps onto integers: around zero, or with a zero point of its own."""

    SYMMETRIC = "symmetric"
    AFFINE = "affine"


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; scale shape ``[]``."""

    def layout(self) -> tuple[int | None, int | None]:
        return None, None

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale for every index of ``axis``; scale shape ``[x.shape[axis]]``."""

    axis: int = 0

    def layout(self) -> tuple[int | None, int | None]:
        return self.axis, None

    def __str__(self) -> str:
        return f"per axis {self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale for every ``size`` neighbours along ``axis``; scale shape is x's with that axis ``ceil(K / size)``.

    A ragged last group is allowed: it holds the ``K % size`` elements that are left.
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"a group holds at least one element, got {self.size}", hint="use 32, 64 or 128")

    def layout(self) -> tuple[int | None, int | None]:
        return self.axis, self.size

    def __str__(self) -> str:
        return f"per group of {self.size}"


@dataclass(frozen=True)
class PerToken:
    """One scale for every vector along the last axis; scale shape is x's with the last axis 1."""

    def layout(self) -> tuple[int | None, int | None]:
        return -1, -1

    def __str__(self) -> str:
        return "per token"


Granularity = PerTensor | PerAxis | PerGroup | PerToken

ObserverFactory = Callable[..., Any]


@dataclass(frozen=True)
class QuantSpec:
    """A tensor is to be quantized with a scale that is observed (``dynamic=False``) or found at run time.

    ``observer`` is a factory ``factory(spec) -> Observer``; it is not used when ``dynamic`` is set.
    ``narrow_range`` leaves out the lowest integer, so that a symmetric signed type is symmetric in its values too.
    ``ranges`` and ``estimator`` say how quantization-aware training treats the tensor (:mod:`qfx.training`).
    ``scale_dtype``, for weights: every scale is a value of it, and :func:`qfx.save` stores it so. Graphs hold scales as
    float32 all the same: what computes with them is not concerned.
    """

    element: IntType
    scheme: Scheme = Scheme.AFFINE
    granularity: Granularity = PerTensor()
    observer: ObserverFactory | None = None
    dynamic: bool = False
    narrow_range: bool = False
    ranges: Ranges = MOVING
    estimator: Estimator = Estimator.CLIPPED
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ConfigError("per-token scales exist only at run time", hint="set dynamic=True, or choose PerTensor()")
        if self.scale_dtype not in SCALE_DTYPES:
            known = " or ".join(map(str, SCALE_DTYPES))
            raise ConfigError(f"scales are not kept as {self.scale_dtype!r}", hint=f"choose {known}")
        if self.dynamic and self.scale_dtype != torch.float32:
            raise ConfigError("scales that are found at run time are float32", hint=_FOR_WEIGHTS)

    @property
    def quant_min(self) -> int:
        return self.element.quant_min + int(self.narrow_range)

    @property
    def quant_max(self) -> int:
        return self.element.quant_max

    @property
    def bits(self) -> int:
        return self.element.bits

    def __str__(self) -> str:
        words = [str(self.element), self.scheme.value, str(self.granularity)]
        words += ["dynamic"] * self.dynamic + ["narrow range"] * self.narrow_range
        words += ["float16 scales"] * (self.scale_dtype == torch.float16)
        return " ".join(words)


_FOR_WEIGHTS = "scale_dtype=torch.float16 is for weights"


@dataclass(frozen=True)
class FixedSpec:
    """A tensor whose range is known beforehand, such as the output of a sigmoid: scale and zero point are given."""

    element: IntType
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < math.inf:
            raise ConfigError(f"a scale is positive and finite, got {self.scale}")
        if not self.quant_min <= self.zero_point <= self.quant_max:
            raise ConfigError(
                f"zero point {self.zero_point} is no {self.element}, so that zero has no integer",
                hint=f"choose one from {self.quant_min} to {self.quant_max}",
            )

    @property
    def quant_min(self) -> int:
        return self.element.quant_min

    @property
    def quant_max(self) -> int:
        return self.element.quant_max

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32

    def __str__(self) -> str:
        return f"{self.element} fixed scale {self.scale:g} zero point {self.zero_point}"


@dataclass(frozen=True)
class SharedSpec:
    """The output has the scale and zero point of the tensor input ``position``: reshapes, max pooling, cat."""

    position: int
    spec: QuantSpec | FixedSpec

    @property
    def bits(self) -> int:
        return self.spec.bits

    def __str__(self) -> str:
        return f"shares input {self.position}"


@dataclass(frozen=True)
class DerivedSpec:
    """A bias: int32 at ``input_scale * weight_scale``, zero point 0."""

    bits: int = 32

    def __str__(self) -> str:
        return "int32 at input_scale * weight_scale"


BIAS_BITS = 15


def bias_spec(activation: QuantSpec | None, weight: QuantSpec | None) -> DerivedSpec | None:
    """How a layer's bias is kept: int32 where its step, ``input_scale * weight_scale``, is fine; else float (None).

    With few bits that step is wide, wider than one of the output's: a bias of 2-bit weights on 2-bit data would be off
    by several. Together they have :data:`BIAS_BITS` where it is not.
    """
    if activation is None or weight is None or activation.dynamic:
        return None
    return DerivedSpec() if activation.bits + weight.bits >= BIAS_BITS else None


Spec = QuantSpec | FixedSpec | SharedSpec | DerivedSpec


@dataclass(frozen=True)
class QConfig:
    """What a rule asks for a layer: a spec for its activations and one for its weight; ``None`` leaves that float."""

    activation: QuantSpec | None
    weight: QuantSpec | None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation.scale_dtype != torch.float32:
            raise ConfigError("scales of activations are float32", hint=_FOR_WEIGHTS)

    def __str__(self) -> str:
        return f"weight: {_shown(self.weight)}; activation: {_shown(self.activation)}"


def _shown(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    observer = f" by {getattr(spec.observer, '__name__', spec.observer)}" if spec.observer else ""
    return f"{spec}{observer}"
