"""``qfx.compat`` beside the FX mode that it stands in for: torch's own toy models, one mapping, the same data."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qfx
from qfx import compat
from qfx.metrics import sqnr_db
from qfx.tools.bench_figures import Figure, Options, Skip, at_least, brief
from qfx.tools.bench_fx_mode import engine

ENGINES = ("onednn", "x86")  # 8 bits of activations, which saturate without VNNI; and 7
BATCH, BATCHES, MARGIN_DB = 64, 16, 0.5  # with few batches what counts is how far the held-out one lies outside

_FLOAT = "qfx leaves it float"

Inputs = tuple[Any, ...]
MakeInputs = Callable[[torch.Generator], Inputs]


def normal(*shapes: tuple[int, ...]) -> MakeInputs:
    """Batches of normal values; ``shapes`` are without the batch."""
    return lambda g: tuple(torch.randn(BATCH, *shape, generator=g) for shape in shapes)


def indices(count: int, *shape: int) -> MakeInputs:
    return lambda g: (torch.randint(count, (BATCH, *shape), generator=g),)


def bags(*dense: int) -> MakeInputs:
    """Indices and offsets of an ``EmbeddingBag``, two indices a bag; and a batch of ``dense`` normal values."""

    def make(g: torch.Generator) -> Inputs:
        found, offsets = torch.randint(10, (2 * BATCH,), generator=g), torch.arange(0, 2 * BATCH, 2)
        return (found, offsets, *(torch.randn(BATCH, size, generator=g) for size in dense))

    return make


def weighted_bags(g: torch.Generator) -> Inputs:
    """As :func:`bags`, with a weight for every index and the end of the last bag."""
    found, offsets = bags()(g)
    return found, torch.cat([offsets, torch.tensor([2 * BATCH])]), torch.randn(2 * BATCH, generator=g)


def lstm(g: torch.Generator) -> Inputs:
    state = torch.randn(1, BATCH, 2, generator=g)
    return torch.randn(4, BATCH, 2, generator=g), (state, torch.zeros_like(state))


OF_VECTORS = (
    "ActivationsTestModel", "NestedModel", "AnnotatedNestedModel", "AnnotatedSubNestedModel",
    "AnnotatedCustomConfigNestedModel", "QuantSubModel", "InnerModule", "SkipQuantModel", "AnnotatedSkipQuantModel",
    "QuantStubModel", "ManualLinearQATModel", "ManualDropoutQATModel", "ManualLinearDynamicQATModel",
)  # fmt: skip

INPUTS: dict[str, MakeInputs] = {
    **dict.fromkeys(OF_VECTORS, normal((5,))),
    **dict.fromkeys(("ManualConvLinearQATModel", "ManualConvLinearSymmQATModel"), normal((3, 10, 10))),
    **dict.fromkeys(("SubModelForFusion", "SubModelWithoutFusion"), normal((2, 6, 6))),
    **dict.fromkeys(("ResNetBase", "ModelMultipleOps", "ModelMultipleOpsNoAvgPool"), normal((3, 12, 12))),
    **dict.fromkeys(("EmbeddingModule", "DeFusedEmbeddingBagLinear"), indices(10, 4)),
    **dict.fromkeys(("EmbeddingWithStaticLinear", "SparseNNModel"), bags(4)),
    "EmbeddingBagModule": weighted_bags,
    "ManualEmbeddingBagLinear": bags(),
    "RNNDynamicModel": lambda g: (torch.randn(4, BATCH, 2, generator=g),),
    "RNNCellDynamicModel": normal((2,)),
    "LSTMwithHiddenDynamicModel": lstm,
    "ModelForFusion": normal((3, 1, 19)),
    "ConvBNReLU": normal((3, 5, 5)),
    "ModelWithSequentialFusion": normal((3, 10, 10)),
    "ModelForFusionWithBias": normal((3, 9, 9)),
    "ModelForLinearBNFusion": normal((20,)),
    "ModelForConvTransposeBNFusion": normal((3, 5)),
    "ModelWithFunctionals": normal((3,)),
}
"""Inputs of those that do not give an example themselves."""

# What constructors of toy models ask for.
ARGUMENTS: dict[str, Any] = {"qengine": "fbgemm", "qconfig": None}
MOD_TYPES = {"RNNDynamicModel": "LSTM", "RNNCellDynamicModel": "LSTMCell"}

LEFT_OUT = {
    "DummyObserver": "it is no model",
    "DenseTopMLP": "it is a part of SparseNNModel",
    "EmbBagWrapper": "it is a part of SparseNNModel",
    "NormalizationTestModel": "it normalizes equal values: its result is the rounding of float arithmetic",
}


def toys() -> Mapping[str, type[nn.Module]]:
    """torch's toy models, by name.

    Raises:
        Skip: this torch has none, or lacks what they import.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.testing._internal import common_quantization as module
        except ImportError as error:
            raise Skip(f"torch's toy models cannot be imported: {error}") from error
    found = {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__
    }
    return found


def compat_sqnr(options: Options, *, names: Sequence[str] = ()) -> Iterator[Figure]:
    """SQNR against the float model on held-out data, 8 bits, torch's default mapping; FX mode's best is the bar.

    ``names``: of models; none: all.
    """
    chosen = {name: kind for name, kind in toys().items() if not names or name in names}
    figures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in chosen.items():
            out = LEFT_OUT.get(name)
            figures.append(Figure.skip(name, out) if out else compared(name, kind, options))
            yield figures[-1]
    yield Figure("models that both do", sum(f.bar is not None and f.value is not None for f in figures))
    yield Figure("of these, float in qfx by rule", sum(_FLOAT in f.note for f in figures))
    yield Figure("models that only qfx does", sum(f.bar is None and f.value is not None for f in figures))
    yield Figure("models that miss", sum(not f.good for f in figures))


def compared(name: str, kind: type[nn.Module], options: Options) -> Figure:
    """One model through both. Where FX mode fails there is no bar."""
    try:
        model = _built(kind)
        *data, held_out = _batches(name, kind)
        with torch.no_grad():
            want = model(*held_out)
    except Exception as error:
        return Figure.skip(name, f"the float model fails: {brief(error)}")
    quality = partial(_quality, want, held_out)
    reached, note = [], ""
    for backend in ENGINES:
        try:
            with engine(backend):
                reached.append(quality(fx_mode(model, data, backend)))
        except Exception as error:  # whatever stops the peer is no failure of ours
            note = f"FX mode fails: {brief(error)}"
    if reached:
        note = f"FX mode reaches {max(reached):.1f} dB"
    bar = at_least(max(reached) - MARGIN_DB) if reached else None
    try:
        made = through_compat(model, data, options)
        value = quality(made)
    except Exception as error:
        return Figure.fail(name, f"{brief(error)}; {note}", bar)
    integers = [row for row in qfx.report(made).rows if row.integer]
    return Figure(name, value, "dB", bar, note if integers else f"{note}; {_FLOAT}: {_why_float(made)}")


def fx_mode(model: nn.Module, data: Sequence[Inputs], backend: str) -> nn.Module:
    """By torch; to be run inside :func:`qfx.tools.bench_fx_mode.engine`."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(backend), data[0])
        for item in data:
            prepared(*item)
        quantized: nn.Module = convert_fx(prepared)
    return quantized


def through_compat(model: nn.Module, data: Sequence[Inputs], options: Options) -> nn.Module:
    """The same code, with the names of ``qfx.compat``, and torch's own mapping."""
    from torch.ao.quantization import get_default_qconfig_mapping

    with torch.no_grad():
        prepared = compat.prepare_fx(model, get_default_qconfig_mapping(), data[0], target=options.target)
        for item in data:
            prepared(*item)
        return compat.convert_fx(prepared)


def _built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    given = ARGUMENTS | {"mod_type": MOD_TYPES.get(kind.__name__)}
    wanted = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in given.items() if name in wanted}).eval()


def _batches(name: str, kind: type[nn.Module]) -> list[Inputs]:
    make = INPUTS.get(name)
    if make is None:
        example = _built(kind).get_example_inputs()  # type: ignore[operator]
        make = normal(*(tuple(t.shape[1:]) for t in example))
    generator = torch.Generator().manual_seed(1)
    return [make(generator) for _ in range(BATCHES + 1)]


def _quality(want: Any, inputs: Inputs, made: nn.Module) -> float:
    """In decibels; infinite where nothing differs."""
    with torch.no_grad():
        got = made(*inputs)
    first = (want[0], got[0]) if isinstance(want, tuple) else (want, got)
    assert all(isinstance(t, Tensor) for t in first)
    return sqnr_db(*first)


def _why_float(made: nn.Module) -> str:
    reasons = [row.reason for row in qfx.report(made).rows if row.reason]
    return "; ".join(dict.fromkeys(reasons)) or "it has no operators"
