"""Observers of the user's that know nothing of qfx: modules with ``forward(x)`` and ``calculate_qparams()``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import ConfigError
from qfx.observers import Observer
from qfx.spec import QuantSpec, Scheme


@dataclass(frozen=True)
class Foreign:
    """An observer factory for a :class:`qfx.spec.QuantSpec`; ``make()`` gives the user's observer, a module."""

    make: Callable[[], nn.Module]

    def __call__(self, spec: QuantSpec) -> ForeignObserver:
        return ForeignObserver(spec, self.make())

    @property
    def __name__(self) -> str:
        made = self.make
        return getattr(made, "__name__", "") or str(made)


class ForeignObserver(Observer):
    """Lets the user's observer see the data, and takes its scale and zero point as they are.

    ``inner(x)`` observes; ``inner.calculate_qparams()`` gives ``(scale, zero_point)``: one element each, or for a
    ``PerAxis`` spec as many as the axis has.
    """

    def __init__(self, spec: QuantSpec, inner: nn.Module) -> None:
        super().__init__(spec)
        self.inner = inner
        self.scales = 1

    def observe(self, x: Tensor) -> None:
        self.min_max(x)  # refuses NaN and infinity in the terms of the layer
        self.scales = 1 if self.axis is None else x.shape[self.axis]
        self.inner(x)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """As the user's observer gives them.

        Raises:
            ConfigError: they are no scale and zero point of the spec; the text names the layer.
        """
        scale, zero_point = (torch.as_tensor(t).detach() for t in self.inner.calculate_qparams())  # type: ignore[operator]
        self._require(
            scale.numel() == zero_point.numel() == self.scales,
            f"gives {scale.numel()} scales and {zero_point.numel()} zero points where there are {self.scales}",
        )
        shape = () if self.axis is None else (self.scales,)
        scale, zero_point = scale.float().reshape(shape), zero_point.to(torch.int32).reshape(shape)
        self._require(bool((torch.isfinite(scale) & (scale > 0)).all()), "gives a scale that is not above zero")
        spec = self.spec
        inside = (zero_point >= spec.quant_min) & (zero_point <= spec.quant_max)
        self._require(bool(inside.all()), f"gives a zero point outside of {spec.quant_min} to {spec.quant_max}")
        if spec.scheme is Scheme.SYMMETRIC:
            middle = (spec.quant_min + spec.quant_max + 1) // 2
            self._require(bool((zero_point == middle).all()), f"is symmetric, but its zero point is not {middle}")
        return scale, zero_point

    def range(self) -> tuple[Tensor, Tensor]:
        """The range from which :func:`qfx.affine.choose_qparams` finds the same scale and zero point."""
        scale, zero_point = self.qparams()
        if self.spec.scheme is Scheme.SYMMETRIC:
            reach = scale * (float(self.spec.quant_max - self.spec.quant_min) / 2)
            return -reach, reach
        return (self.spec.quant_min - zero_point) * scale, (self.spec.quant_max - zero_point) * scale

    def with_spec(self, spec: QuantSpec) -> Observer:
        if spec != self.spec:
            raise ConfigError(
                f"{type(self.inner).__name__} chose its scale for {self.spec}; {spec} needs the data again",
                where=self.layer,
                hint="let one of qfx's observers see what is to be given other bits, such as Histogram",
            )
        return super().with_spec(spec)

    def _require(self, met: bool, what: str) -> None:
        if not met:
            raise ConfigError(
                f"{type(self.inner).__name__} {what}",
                where=self.layer,
                hint="let its dtype, qscheme, quant_min and quant_max say what calculate_qparams() is computed for",
            )

    def extra_repr(self) -> str:
        return str(self.spec)


def is_observer(made: Any) -> bool:
    """Whether a module can serve as one."""
    return isinstance(made, nn.Module) and callable(getattr(made, "calculate_qparams", None))
