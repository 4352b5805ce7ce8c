"""What is trained, and how, as values: how a scale finds its range, which gradient passes, what acts in training only.

The first two are parts of a :class:`qfx.spec.QuantSpec`. The others mark nodes of a graph that stands in eval form:
``follow-training`` reads the marks and puts the modules in place that follow ``self.training``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from qfx.errors import ConfigError


class Estimator(Enum):
    """Which gradient passes through rounding (Bengio et al., 2013, arXiv:1308.3432).

    ``CLIPPED``: 1 inside the representable range and 0 outside. ``STRAIGHT_THROUGH``: 1 everywhere.
    """

    CLIPPED = "clipped"
    STRAIGHT_THROUGH = "straight-through"


@dataclass(frozen=True)
class Moving:
    """Activations: a moving average of every batch's extremes. Weights: the extremes they have at every step.

    Method: Jacob et al., 2018 (arXiv:1712.05877), section 3.1.
    """

    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ConfigError(f"averaging_constant lies in (0, 1], got {self.averaging_constant}")


@dataclass(frozen=True)
class Learned:
    """The scale is a parameter, trained with the weights; the zero point stays.

    Its gradient is scaled by ``1 / sqrt(elements of one scale * quant_max)`` where ``scaled`` is set.
    Method: LSQ, Esser et al., 2020 (arXiv:1902.08153).
    """

    scaled: bool = True


@dataclass(frozen=True)
class Fixed:
    """The range of calibration, or of the first batch, stays from step 0 on."""


Ranges = Moving | Learned | Fixed
MOVING = Moving()


# --- marks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNormMark:
    """``path``: the user's batch norm. ``bias``: the bias of the layer that it is folded into.

    The other fields name its tensors; what it has not is None.
    """

    path: str
    mean: str
    var: str
    weight: str | None = None
    shift: str | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    frozen: bool = False
    bias: str | None = None


@dataclass(frozen=True)
class DropoutMark:
    """``operator``: ``dropout``, ``feature_dropout`` or ``alpha_dropout``."""

    operator: str
    p: float


@dataclass(frozen=True)
class AttentionMark:
    """Dropout of attention weights inside ``scaled_dot_product_attention``."""

    p: float


@dataclass(frozen=True)
class DropPathMark:
    """Whole samples are dropped (stochastic depth, Huang et al., 2016, arXiv:1603.09382).

    ``kept``: the dimensions along which samples differ. ``scaled``: survivors are divided by ``keep``. ``uniform``: the
    mask is ``floor(keep + rand)``, else ``bernoulli``; they draw other random numbers.
    """

    keep: float
    kept: tuple[int, ...]
    scaled: bool = True
    uniform: bool = False


@dataclass(frozen=True)
class DetachMark:
    """No gradient passes here."""


@dataclass(frozen=True)
class ClampMark:
    """The FakeQuantize behind it does what ``operator`` (``relu``, ``hardtanh``, ``clamp``) did here."""

    operator: str


Mark = BatchNormMark | DropoutMark | AttentionMark | DropPathMark | DetachMark | ClampMark
