"""What an observer of ``torch.ao.quantization`` asks for, as a QuantSpec.

Nothing of ``torch.ao`` is imported: observer classes are known by their names, their arguments by their signatures.
A class that is none of torch's is taken as it is, by :mod:`qfx.foreign_observer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from qfx.errors import ConfigError
from qfx.foreign_observer import Foreign, is_observer
from qfx.observers import Factory, Histogram, MinMax, MovingAverageMinMax, Observer
from qfx.spec import (
    INT8,
    MAX_BITS,
    MIN_BITS,
    UINT8,
    Granularity,
    IntType,
    ObserverFactory,
    PerAxis,
    PerTensor,
    PerToken,
    QConfig,
    QuantSpec,
    Scheme,
)
from qfx.training import MOVING, Learned, Moving, Ranges

ACTIVATION, WEIGHT = "activation", "weight"

NEEDS_RANGE = "reduce_range is not needed: where 8-bit sums could saturate, a kernel that does not is chosen"
NEEDS_EPS = "eps is not needed: scales of any size are lowered"
NEEDS_TENSOR = "dynamic activations get a scale for every token, symmetric int8, in place of one per tensor"

_SIGNED = {"quint8": False, "uint8": False, "qint8": True, "int8": True}

_MIN_MAX = ("MinMaxObserver", "PerChannelMinMaxObserver")
_MOVING = ("MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver")
_HISTOGRAM = "HistogramObserver"
_PLACEHOLDER = "PlaceholderObserver"
_BINS = 2048  # of both observers, unless they are told otherwise
_FLOAT = ("Identity", "NoopObserver", "ReuseInputObserver")
_LEARNABLE = "_LearnableFakeQuantize"
_FAKE_QUANTS = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize", _LEARNABLE)
FIXED = ("FixedQParamsObserver", "FixedQParamsFakeQuantize")
REUSES = "ReuseInputObserver"

_TABLES = (
    "leave it out, and give qfx.prepare the recipe Recipe.from_qconfig_mapping(mapping).with_embedding_storage({}), "
    "which stores embeddings as integers"
)
_NO_DTYPE = {
    "quint4x2": f"for linear weights write Recipe.w4a16(); {_TABLES.format(4)}",
    "quint2x4": f"for linear weights write IntType(2, True) in a QuantSpec; {_TABLES.format(4)}",
    "float16": "convert the model itself with model.half(), or keep linear weights in 8 bits with Recipe.w8a16()",
    "bfloat16": "convert the model itself with model.bfloat16(), or keep linear weights in 8 bits with Recipe.w8a16()",
}
_NO_KIND = {
    **dict.fromkeys(
        FIXED, "let a MinMaxObserver find the range; a sigmoid or tanh behind an integer layer is a table of integers"
    ),
    "RecordingObserver": "look at values with qfx.dump(model, example_inputs), and calibrate with a HistogramObserver",
}


@dataclass(frozen=True)
class Reading:
    """An observer class, or a factory, with the arguments that it will get; ``fake`` names the fake-quant around it."""

    kind: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    fake: str = ""

    @property
    def name(self) -> str:
        return str(getattr(self.kind, "__name__", self.kind))

    @property
    def known(self) -> bool:
        """Whether it is one of torch's own classes."""
        return _of_torchs_own(self.kind)

    def get(self, option: str) -> Any:
        return self.options.get(option)


def _of_torchs_own(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and kind.__module__.startswith("torch.")
        and (kind is nn.Identity or hasattr(kind, "calculate_qparams"))
    )


def read(given: Any) -> Reading:
    """Take what stands in a qconfig apart: a class, ``Class.with_args(...)``, a partial, or any other factory."""
    kind, options = _unwrapped(given)
    if not _of_torchs_own(kind):
        if isinstance(kind, type) and "observer" in options:  # a fake-quant class of the user's
            return Reading(given, fake=kind.__name__)
        return Reading(kind if kind is given else given)
    options = _with_defaults(kind, options)
    if kind.__name__ not in _FAKE_QUANTS:
        return Reading(kind, options)
    inner = options.pop("observer")
    observer, own = _unwrapped(inner)
    outer = _accepted(observer, {name: value for name, value in options.items() if value is not None})
    if not _of_torchs_own(observer):
        return Reading(partial(inner, **outer), fake=kind.__name__)
    return Reading(observer, _with_defaults(observer, own | outer), kind.__name__)


def _unwrapped(given: Any) -> tuple[Any, dict[str, Any]]:
    """The class inside and all keyword arguments; those that were added last count."""
    options: dict[str, Any] = {}
    while True:
        wrapped = given if isinstance(given, partial) else getattr(given, "p", None)
        if not isinstance(wrapped, partial) or isinstance(given, type):
            return given, options
        positional = {}
        if wrapped.args and isinstance(wrapped.func, type):
            positional = dict(inspect.signature(wrapped.func).bind_partial(*wrapped.args).arguments)
        options = positional | wrapped.keywords | options
        given = wrapped.func


def _with_defaults(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a constructor, those behind ``**`` among them."""
    bound = inspect.signature(kind).bind_partial(**options)
    bound.apply_defaults()
    flat: dict[str, Any] = {}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            flat |= bound.arguments.get(name, {})
        elif name in bound.arguments:
            flat[name] = bound.arguments[name]
    return flat


def _accepted(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the observer's constructor takes; a fake-quant has some of its own."""
    if not isinstance(kind, type):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return options
    return {name: value for name, value in options.items() if name in {p.name for p in parameters}}


# --- one side of a qconfig --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """``role``: activation or weight. ``place``: the entry of the mapping, named in errors. ``training``: for QAT."""

    role: str
    place: str
    training: bool = False

    def refused(self, fault: str, hint: str) -> ConfigError:
        return ConfigError(f"{self.role} of {self.place}: {fault}", hint=hint)


def qconfig_of(given: Any, place: str, *, training: bool = False) -> tuple[QConfig, tuple[str, ...]]:
    """A qconfig as qfx's, and what its user should know.

    Args:
        given: any object with ``activation`` and ``weight``; these are QuantSpecs, None, observer classes of
            torch's, of qfx's or of the user's, or factories of such.

    Raises:
        ConfigError: a part of it has no counterpart; the text names the field and says what to write instead.
    """
    if not (hasattr(given, ACTIVATION) and hasattr(given, WEIGHT)):
        raise ConfigError(
            f"the qconfig of {place} is a {type(given).__name__}",
            hint="give a qfx.QConfig(activation=..., weight=...), torch's QConfig, or None for float",
        )
    notes: list[str] = []
    parts = [_spec(getattr(given, role), Side(role, place, training), notes) for role in (ACTIVATION, WEIGHT)]
    return QConfig(*parts), tuple(dict.fromkeys(notes))


def _spec(given: Any, side: Side, notes: list[str]) -> QuantSpec | None:
    if given is None or isinstance(given, QuantSpec):
        return given
    if isinstance(given, nn.Module):
        raise side.refused(
            f"a {type(given).__name__} that is made already, and every tensor needs one of its own",
            "give the class, or Class.with_args(...)",
        )
    if isinstance(given, Factory) or (isinstance(given, type) and issubclass(given, Observer)):
        usual = QuantSpec(UINT8) if side.role == ACTIVATION else QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0))
        return QuantSpec(usual.element, usual.scheme, usual.granularity, given)
    if not callable(given):
        raise side.refused(f"a {type(given).__name__} is no observer", "give a class, Class.with_args(...) or None")
    try:
        reading = read(given)
    except TypeError as error:  # what its constructor would say
        raise side.refused(f"{given} cannot be made: {error}", "give it the arguments that its class takes") from None
    if reading.known:
        return _of_torch(reading, side, notes)
    return _of_user(reading, side, notes)


def _of_torch(reading: Reading, side: Side, notes: list[str]) -> QuantSpec | None:
    dtype = _name(reading.get("dtype"))
    if reading.name in _FLOAT or (reading.name == _PLACEHOLDER and dtype == "float32"):
        return None
    if reading.name in _NO_KIND:
        raise side.refused(f"{reading.name} has no counterpart", _NO_KIND[reading.name])
    _require_rounding(reading, side)
    element, narrow = _element(dtype, reading.get("quant_min"), reading.get("quant_max"), side)
    notes += [NEEDS_RANGE] * bool(reading.get("reduce_range"))
    notes += [NEEDS_EPS] * _unusual_eps(reading)
    if reading.get("is_dynamic"):
        return _dynamic(side, notes)
    if reading.name == _PLACEHOLDER:
        raise side.refused(
            f"PlaceholderObserver(dtype={dtype}) observes nothing", "give a HistogramObserver, or is_dynamic=True"
        )
    scheme, granularity = _layout(_name(reading.get("qscheme")), reading.get("ch_axis"), side)
    observer = _observer(reading, side)
    ranges = _ranges(reading, side, notes)
    return QuantSpec(element, scheme, granularity, observer, narrow_range=narrow, ranges=ranges)


def _of_user(reading: Reading, side: Side, notes: list[str]) -> QuantSpec:
    """An observer that is none of torch's: its attributes say what its scales are for."""
    try:
        made = reading.kind()
    except TypeError as error:
        raise side.refused(f"{reading.name} cannot be made: {error}", "bind its arguments by with_args") from None
    if not is_observer(made):
        raise side.refused(
            f"{reading.name} gives a {type(made).__name__}, which is no observer",
            "give a module with forward(x) and calculate_qparams(), or a subclass of qfx.observers.Observer",
        )
    fake = bool(reading.fake) or hasattr(made, "fake_quant_enabled")
    _require_rounding(Reading(type(made), fake="yes" if fake else ""), side)
    if not hasattr(made, "dtype"):
        raise side.refused(f"{type(made).__name__} has no dtype", "let it have one: torch.uint8 or torch.int8")
    notes += ["in training ranges move as averages; an observer of the user's sees what calibrates"] * side.training
    element, narrow = _element(
        _name(made.dtype), getattr(made, "quant_min", None), getattr(made, "quant_max", None), side
    )
    qscheme = _name(getattr(made, "qscheme", "per_tensor_affine"))
    scheme, granularity = _layout(qscheme, getattr(made, "ch_axis", 0), side)
    return QuantSpec(element, scheme, granularity, Foreign(reading.kind), narrow_range=narrow)


def _name(value: Any) -> str:
    """``qint8`` of ``torch.qint8``: dtypes and schemes, none of which may be named here, by their names."""
    return str(value).removeprefix("torch.")


def _require_rounding(reading: Reading, side: Side) -> None:
    if side.training and not reading.fake and not reading.get("is_dynamic"):
        raise side.refused(
            f"{reading.name} only observes, and training needs what rounds",
            f"write FakeQuantize.with_args(observer={reading.name}), or take get_default_qat_qconfig_mapping()",
        )


def _element(dtype: str, low: int | None, high: int | None, side: Side) -> tuple[IntType, bool]:
    """The integers, and whether the lowest is left out."""
    if dtype not in _SIGNED:
        raise side.refused(f"dtype={dtype} has no counterpart", _NO_DTYPE.get(dtype, "write qint8 or quint8"))
    signed = _SIGNED[dtype]
    if low is None or high is None:
        return IntType(8, signed), False
    for bits in range(MIN_BITS, MAX_BITS + 1):
        for element in (IntType(bits, signed), IntType(bits, not signed)):
            for narrow in (False, True):
                if (element.quant_min + narrow, element.quant_max) == (low, high):
                    return element, narrow
    raise side.refused(
        f"quant_min={low}, quant_max={high} is no range of {MIN_BITS} to {MAX_BITS} bits",
        "write that of n bits, such as -8 to 7, 0 to 15, or -127 to 127 without the lowest",
    )


def _layout(qscheme: str, axis: int | None, side: Side) -> tuple[Scheme, Granularity]:
    if qscheme == "per_channel_affine_float_qparams":
        raise side.refused("qscheme=per_channel_affine_float_qparams is for tables", _TABLES.format("8 or 4"))
    if qscheme.startswith("per_channel") and side.role == ACTIVATION:
        raise side.refused(f"qscheme={qscheme}, and activations have one scale", "write torch.per_tensor_affine")
    scheme = Scheme.SYMMETRIC if qscheme.endswith("symmetric") else Scheme.AFFINE
    return scheme, PerAxis(axis or 0) if qscheme.startswith("per_channel") else PerTensor()


def _dynamic(side: Side, notes: list[str]) -> QuantSpec:
    if side.role == WEIGHT:
        raise side.refused("is_dynamic=True, and weights do not change", "leave is_dynamic out")
    notes.append(NEEDS_TENSOR)
    return QuantSpec(INT8, Scheme.SYMMETRIC, PerToken(), dynamic=True)


def _observer(reading: Reading, side: Side) -> ObserverFactory:
    if reading.name == _HISTOGRAM:
        bins = int(reading.get("bins"))
        return Histogram if bins == _BINS else Histogram.with_options(bins=bins)
    if reading.name in _MIN_MAX or (reading.name in _MOVING and side.role == WEIGHT):  # a weight is seen once
        return MinMax
    if reading.name in _MOVING:
        constant = float(reading.get("averaging_constant"))
        usual_constant = Moving().averaging_constant
        with_constant = MovingAverageMinMax.with_options(averaging_constant=constant)
        return MovingAverageMinMax if constant == usual_constant else with_constant
    raise side.refused(
        f"{reading.name} has no counterpart", "write a HistogramObserver or a MinMaxObserver, or one of qfx.observers"
    )


def _ranges(reading: Reading, side: Side, notes: list[str]) -> Ranges:
    if reading.fake == _LEARNABLE:
        return Learned()
    if side.role == WEIGHT or not reading.fake:
        return MOVING
    if reading.name in _MOVING:
        return Moving(float(reading.get("averaging_constant")))
    notes += [f"in training ranges move as averages; {reading.name} sees what calibrates"] * side.training
    return MOVING


def _unusual_eps(reading: Reading) -> bool:
    parameters: Callable[..., Any] = reading.kind
    usual = inspect.signature(parameters).parameters.get("eps")
    return usual is not None and reading.get("eps") not in (None, usual.default)
