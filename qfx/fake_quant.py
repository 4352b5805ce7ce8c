"""FakeQuantize: an observer and a simulated quantization in one module, one per share group of a PREPARED graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qfx import affine
from qfx.errors import CalibrationError
from qfx.observers import MinMax, Observer
from qfx.ops import fake_quantize
from qfx.spec import FixedSpec, QuantSpec, Scheme


class FakeQuantize(nn.Module):
    """Passes tensors through; while ``observing`` it looks at them, while ``quantizing`` it rounds them.

    ``scale`` and ``zero_point`` are buffers of the shape that the spec's granularity gives (empty until
    :meth:`calculate`). Gradients pass by the straight-through estimator. A dynamic spec finds its scale anew in every
    call, a fixed one has it from the start; both have no observer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec | FixedSpec, layer: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.observing = False
        self.quantizing = False
        self.observer: Observer | None = None
        scale, zero_point = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
        if isinstance(spec, FixedSpec):
            self.axis, self.group_size = None, None
            scale = torch.tensor(spec.scale, dtype=torch.float32)
            zero_point = torch.tensor(spec.zero_point, dtype=torch.int32)
        else:
            self.axis, self.group_size = spec.granularity.layout()
            if not spec.dynamic:
                self.observer = (spec.observer or MinMax)(spec)
                self.observer.layer = layer
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def dynamic(self) -> bool:
        return isinstance(self.spec, QuantSpec) and self.spec.dynamic

    def collect(self, collecting: bool) -> None:
        """Begin or end calibration; :meth:`calculate` then sets the range."""
        self.observing = collecting

    def calculate(self) -> None:
        """Set scale and zero point from what the observer saw.

        Raises:
            CalibrationError: it saw nothing; the text names the layer.
        """
        if self.observer is None:
            return
        if not self.observer.seen:
            raise CalibrationError(
                "no calibration data reached this layer, so it has no range",
                where=self.layer,
                hint="calibrate with data that exercise it, or leave it float with Recipe.skip",
            )
        self.scale, self.zero_point = self.observer.qparams()

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point with which ``x`` is quantized."""
        if not self.dynamic:
            return self.scale, self.zero_point
        assert isinstance(self.spec, QuantSpec)
        low, high = affine.min_max(x.detach(), self.axis, self.group_size)
        return affine.choose_qparams(
            low,
            high,
            symmetric=self.spec.scheme is Scheme.SYMMETRIC,
            quant_min=self.spec.quant_min,
            quant_max=self.spec.quant_max,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.observing and self.observer is not None:
            self.observer(x)
        if not self.quantizing:
            return x
        scale, zero_point = self.qparams(x)
        rounded: Tensor = fake_quantize(
            x, scale, zero_point, self.axis, self.group_size, self.spec.quant_min, self.spec.quant_max
        )[0]
        return rounded

    def extra_repr(self) -> str:
        return str(self.spec)
