"""TrainedFakeQuantize: the FakeQuantize of quantization-aware training, whose range moves, is learned, or stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from qfx import affine
from qfx.distributed import joint_extremes, joint_mean, several_ranks
from qfx.errors import CalibrationError, ConfigError, TrainingError
from qfx.fake_quant import FakeQuantize
from qfx.observers import MinMax, Observer
from qfx.ops import fake_quantize, fake_quantize_learned, min_max
from qfx.part import Part
from qfx.recompute import recomputing
from qfx.spec import FixedSpec, IntType, QuantSpec, Scheme
from qfx.training import Estimator, Learned, Moving


class TrainedFakeQuantize(Part, FakeQuantize):
    """Rounds from the first batch on; in training its range follows :attr:`QuantSpec.ranges`.

    Until it has a range (from calibration, or from the first batch in training mode) it lets tensors through. Buffers
    keep their shape from the start, so that a state dict of any moment loads: ``scale`` (float32) and ``zero_point``
    (int32) of the granularity's shape, ``low`` and ``high`` (float32) where ranges move. A learned scale is the
    parameter ``step`` (float32, ``[max(1, scales)]``). What is switched is part of the state dict too.

    Args:
        spec: how to quantize.
        layer: the user's layer, named in errors.
        shape: the shape of the scale (:func:`qfx.affine.scale_shape`).
        constant: it quantizes a weight, which is all there at every step, and the same on every rank.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, spec: QuantSpec | FixedSpec, layer: str = "", *, shape: tuple[int, ...] = (), constant: bool = False
    ) -> None:
        super().__init__(spec, layer)
        self.constant = constant
        self.recipe_bits = spec.bits
        self.observer = None  # made for calibration only
        self.observing = self.quantizing = True
        self.ready = isinstance(spec, FixedSpec) or spec.dynamic
        self.collecting = False
        self.ranges = spec.ranges if isinstance(spec, QuantSpec) and not spec.dynamic else None
        if self.ranges is None:
            return
        self.scale = torch.zeros(shape)
        self.zero_point = torch.zeros(shape, dtype=torch.int32)
        if isinstance(self.ranges, Learned):
            self.step = nn.Parameter(torch.zeros(max(1, math.prod(shape))))
        elif isinstance(self.ranges, Moving) and not constant:
            self.register_buffer("low", torch.zeros(shape))
            self.register_buffer("high", torch.zeros(shape))

    # --- the forward pass -------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        clamp_min: float | None = None,
        clamp_max: float | None = None,
    ) -> Tensor:
        """``fake_quantize(clamp(x * factor)) / factor``; both steps are left out where they are None.

        Args:
            x: any floating-point tensor that fits the spec's granularity.
            factor: of a batch norm behind the layer, for a weight.
            clamp_min, clamp_max: bounds of a relu or hardtanh in front, which is done in the same pass.
        """
        if isinstance(self.ranges, Learned) and not self._trains() and several_ranks():
            # DistributedDataParallel stops at a parameter without gradient.
            x = cast(Tensor, _WithParameter.apply(x, self.step))  # type: ignore[no-untyped-call]
        scaled = x if factor is None else x * factor
        if self.collecting:
            self._collect(scaled.detach(), clamp_min, clamp_max)
        elif self.training and self.observing and self.ranges is not None and not recomputing():
            self._follow(scaled.detach(), clamp_min, clamp_max)
        if not (self.quantizing and self.ready) or self.collecting:
            return x if clamp_min is clamp_max is None else x.clamp(clamp_min, clamp_max)
        rounded = self._round(scaled, clamp_min, clamp_max)
        return rounded if factor is None else rounded / factor

    def _round(self, x: Tensor, clamp_min: float | None, clamp_max: float | None) -> Tensor:
        layout = (self.axis, self.group_size, self.spec.quant_min, self.spec.quant_max)
        clamps = {"clamp_min": clamp_min, "clamp_max": clamp_max}
        if isinstance(self.ranges, Learned):
            scale = self._learned_scale()
            if self.observing:
                self._sync()
            gradient_scale = self._gradient_scale(x) if self.ranges.scaled else 1.0
            learned: Tensor = fake_quantize_learned(x, scale, self.zero_point, *layout, gradient_scale, **clamps)
            return learned
        scale, zero_point = self.qparams(x if not self.dynamic else _clamped(x, clamp_min, clamp_max))
        through = isinstance(self.spec, QuantSpec) and self.spec.estimator is Estimator.STRAIGHT_THROUGH
        rounded: Tensor = fake_quantize(x, scale, zero_point, *layout, **clamps, straight_through=through)[0]
        return rounded

    def _trains(self) -> bool:
        """Whether a forward pass leads a gradient to the learned scale."""
        return self.observing and self.quantizing and self.ready

    def _learned_scale(self) -> Tensor:
        """An optimizer may step across zero: the sign says nothing.

        A frozen scale is the buffer, for the momentum of an optimizer may go on moving the parameter.
        """
        if not self.observing:
            return self.scale
        scale = self.step.abs().clamp_min(affine.MIN_SCALE).reshape(self.scale.shape)
        if self.spec.scale_dtype == scale.dtype:
            return scale
        return cast(Tensor, _Representable.apply(scale, self.spec.scale_dtype))  # type: ignore[no-untyped-call]

    def _gradient_scale(self, x: Tensor) -> float:
        return 1.0 / math.sqrt(max(1, x.numel() // self.step.numel()) * self.spec.quant_max)

    # --- ranges -----------------------------------------------------------------------------------------------------

    def _collect(self, x: Tensor, clamp_min: float | None, clamp_max: float | None) -> None:
        if self.observer is not None and not (self.constant and self.observer.seen):
            self.observer(_clamped(x, clamp_min, clamp_max))

    def collect(self, collecting: bool) -> None:
        """Begin or end calibration; :meth:`calculate` then sets the range."""
        self.collecting = collecting and self.ranges is not None
        if self.collecting:
            self.observer = self._new_observer()

    def calculate(self) -> None:
        """Set the range from what calibration saw.

        Raises:
            CalibrationError: it saw nothing; the text names the layer.
        """
        if self.observer is None:
            return
        if not self.observer.seen:
            super().calculate()
        low, high = self.observer.range()
        self.observer = None
        self._start(low, high)

    def _new_observer(self) -> Observer:
        assert isinstance(self.spec, QuantSpec)
        observer: Observer = (self.spec.observer or MinMax)(self.spec)
        observer.layer = self.layer
        return observer.to(self.scale.device)

    def _follow(self, x: Tensor, clamp_min: float | None, clamp_max: float | None) -> None:
        """Let the range follow this batch, as the spec's ``ranges`` say."""
        if isinstance(self.ranges, Moving):
            self._move(x, clamp_min, clamp_max)
        elif not self.ready:
            low, high = self._observed(_clamped(x, clamp_min, clamp_max))
            if not self.constant:
                low, high = joint_mean(low), joint_mean(high)
            if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                self._start(low, high)

    def _move(self, x: Tensor, clamp_min: float | None, clamp_max: float | None) -> None:
        assert isinstance(self.ranges, Moving)
        low, high = min_max(x) if self.axis is None else affine.min_max(x, self.axis, self.group_size)
        low, high = (_clamped(t.float(), clamp_min, clamp_max) for t in (low, high))
        if self.constant:
            self._set(low, high)
            self.ready = True
            return
        if not x.numel():
            low, high = low + math.inf, high - math.inf
        low, high = joint_extremes(low, high)
        if not self.ready:
            if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
                self._start(low, high)
            return
        with torch.no_grad():
            finite = torch.isfinite(low) & torch.isfinite(high)  # a batch that overflows moves nothing
            for kept, new in ((self.low, low), (self.high, high)):
                moved = torch.lerp(kept, new, self.ranges.averaging_constant)
                kept.copy_(torch.where(finite, moved, kept))
            self._set(self.low, self.high)

    def _observed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch; NaN where the batch is empty or not finite."""
        if not x.numel() or not bool(torch.isfinite(x).all()):
            unknown = torch.full_like(self.scale, math.nan)
            return unknown, unknown
        observer = self._new_observer()
        observer(x)
        low, high = observer.range()
        return low, high

    def _start(self, low: Tensor, high: Tensor) -> None:
        """Take ``[low, high]`` for the range, and be ready.

        Raises:
            CalibrationError: a scale is to be learned of nothing but zeros.
        """
        low, high = (t.to(self.scale).reshape(self.scale.shape) for t in (low, high))
        if isinstance(self.ranges, Learned):
            self._refuse_sharded("starts", "run qfx.calibrate(prepared, data), or a batch, before fully_shard")
            low, high = self._learnable(low, high)
        with torch.no_grad():
            if isinstance(self.ranges, Moving) and not self.constant:
                self.low.copy_(low)
                self.high.copy_(high)
            self._set(low, high)
            if isinstance(self.ranges, Learned):
                self.step.copy_(self.scale.reshape(self.step.shape))
        self.ready = True

    def _refuse_sharded(self, what: str, hint: str) -> None:
        """Parameters of a model that ``fully_shard`` has taken over are whole only while it runs, as copies."""
        if getattr(self, "_is_fsdp_managed_module", False):
            raise TrainingError(f"a learned scale {what} in a sharded model", where=self.layer, hint=hint)

    def _learnable(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Channels that are all zero get the widest range of the others: from no range none can be learned."""
        width = torch.maximum(high, -low)
        if not bool((width > 0).any()):
            raise CalibrationError(
                "all values here are zero: no step size can be learned from them",
                where=self.layer,
                hint="calibrate with data that exercise the layer, or let its range move: ranges=Moving()",
            )
        empty = width <= 0
        return torch.where(empty, -width.amax(), low), torch.where(empty, width.amax(), high)

    def _set(self, low: Tensor, high: Tensor) -> None:
        assert isinstance(self.spec, QuantSpec)
        scale, zero_point = affine.choose_qparams(
            low,
            high,
            symmetric=self.spec.scheme is Scheme.SYMMETRIC,
            quant_min=self.spec.quant_min,
            quant_max=self.spec.quant_max,
            scale_dtype=self.spec.scale_dtype,
        )
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    # --- what a schedule switches -----------------------------------------------------------------------------------

    def set_bits(self, bits: int) -> None:
        """Go on with ``bits`` over the same range.

        Raises:
            TrainingError: the scale is learned, and the model sharded.
            ConfigError: the range is frozen, or the spec is of fixed parameters.
        """
        if not isinstance(self.spec, QuantSpec):
            raise ConfigError(f"{self.spec} has bits of its own", where=self.layer)
        if bits == self.spec.bits:
            return
        if not self.observing:
            raise ConfigError(
                f"{bits} bits after the ranges were frozen: they were chosen for {self.spec.bits} bits",
                where=self.layer,
                hint="freeze observers at a later step than the last change of bits",
            )
        if isinstance(self.ranges, Learned):
            self._refuse_sharded("changes its bits", "train with the final bits from the start, or without fully_shard")
        self._sync()
        low = (self.spec.quant_min - self.zero_point) * self.scale
        high = (self.spec.quant_max - self.zero_point) * self.scale
        self.spec = replace(self.spec, element=IntType(bits, self.spec.element.signed))
        if self.ready and self.ranges is not None:
            self._set(low, high)
            if isinstance(self.ranges, Learned):
                with torch.no_grad():
                    self.step.copy_(self.scale.reshape(self.step.shape))

    def _sync(self) -> None:
        """Let the buffer say what the parameter says, unless it is frozen."""
        if isinstance(self.ranges, Learned) and self.observing:
            with torch.no_grad():
                self.scale.copy_(self._learned_scale())

    def settled(self) -> FakeQuantize:
        """A plain FakeQuantize of the same scale and zero point."""
        self._sync()
        plain = FakeQuantize(self.spec, self.layer).to(self.scale.device)
        if self.ready and not self.dynamic:
            # A state dict may have brought scales of another recipe.
            plain.scale = affine.representable_scale(self.scale.detach().clone(), self.spec.scale_dtype)
            plain.zero_point = self.zero_point.clone()
        plain.train(self.training)
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device; ranges and scales keep float32, whatever becomes of the model's dtype."""

        def keep(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        return cast(Self, super()._apply(keep, recurse))  # type: ignore[no-untyped-call]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.observing, self.quantizing, self.ready, self.spec.bits], dtype=torch.int32)

    def set_extra_state(self, state: Tensor) -> None:
        self.observing, self.quantizing, self.ready = (bool(flag) for flag in state[:3])
        bits = int(state[3])
        if isinstance(self.spec, QuantSpec) and bits != self.spec.bits:
            self.spec = replace(self.spec, element=IntType(bits, self.spec.element.signed))


class _WithParameter(torch.autograd.Function):
    """``x``, with a gradient of zeros for a parameter that takes no part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = parameter.shape, parameter.dtype, parameter.device  # ranges may start meanwhile: it is not saved
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


class _Representable(torch.autograd.Function):
    """:func:`qfx.affine.representable_scale`, through which gradients go straight."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return affine.representable_scale(scale, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _clamped(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x if low is high is None else x.clamp(low, high)
