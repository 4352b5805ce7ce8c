"""Against torch's own FX mode on its toy models: with the same calibration qfx is never noisier.

The toy models come with torch (``torch.testing._internal.common_quantization``). Both sides see the same batches and
use 8-bit affine activations with histogram ranges and symmetric weights per channel.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.metrics import sqnr_db
from qfx.targets import TARGETS

pytest.importorskip("expecttest", reason="torch's test models import it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_quantization as toys

pytestmark = [
    pytest.mark.filterwarnings("ignore::qfx.QfxWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Not native, which compiles for seconds: tests/native has its own.
AVAILABLE = [name for name, target in TARGETS.items() if name != "native" and target.unavailable() is None]
ENGINE = "onednn"
BATCH = 64
MARGIN_DB = 0.5

IMAGE, VECTOR = ((3, 5, 5),), ((5,),)

OF_VECTORS = (
    "SingleLayerLinearModel", "LinearAddModel", "TwoLayerLinearModel", "LinearModelWithSubmodule",
    "LinearReluModel", "LinearReluLinearModel", "LinearReluAddModel", "LinearBnLeakyReluModel", "LinearTanhModel",
    "FunctionalLinear", "SingleLayerFunctionalLinearModel", "TwoLayerFunctionalLinearModel",
    "FunctionalLinearAddModel", "FunctionalLinearReluModel", "FunctionalLinearReluLinearModel", "NestedModel",
    "SkipQuantModel", "QuantStubModel", "QuantSubModel", "AnnotatedSubNestedModel",
    "AnnotatedCustomConfigNestedModel",
)  # fmt: skip

OF_IMAGES = (
    "ConvModel", "ConvBnModel", "ConvBnReLUModel", "TwoLayerConvModel", "ConvReluModel", "ConvReluConvModel",
    "ConvReluAddModel", "FunctionalConv2d", "SingleLayerFunctionalConvModel", "TwoLayerFunctionalConvModel",
    "FunctionalConvReluModel", "FunctionalConvReluConvModel", "AnnotatedConvBnModel", "AnnotatedConvBnReLUModel",
    "ConvBNReLU",
)  # fmt: skip

BOTH: dict[str, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(OF_VECTORS, VECTOR),
    **dict.fromkeys(OF_IMAGES, IMAGE),
    "ConvBnAddReluModel": ((5, 3, 3), (5, 2, 2)),
    "ModelForLinearBNFusion": ((20,),),
    "ModelWithSequentialFusion": ((3, 10, 10),),
    "ModelForFusionWithBias": ((3, 9, 9),),
    "SubModelForFusion": ((2, 6, 6),),
    "SubModelWithoutFusion": ((2, 6, 6),),
    "ResNetBase": ((3, 12, 12),),
    "ModelMultipleOps": ((3, 12, 12),),
    "ModelMultipleOpsNoAvgPool": ((3, 12, 12),),
}
"""Models that go through both, with the shapes of their inputs without the batch."""

ONLY_QFX: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {
    "ConvTransposeModel": (IMAGE, "FX mode has no scales per channel for transposed convolutions"),
    "ModelForConvTransposeBNFusion": (((3, 5),), "FX mode has no scales per channel for transposed convolutions"),
}
"""Models that go through qfx alone, and why not through FX mode."""

FLOAT_BY_RULE: dict[str, tuple[tuple[Any, ...], str]] = {
    "LSTMwithHiddenDynamicModel": (
        (torch.randn(4, 3, 2), (torch.randn(1, 3, 2), torch.randn(1, 3, 2))),
        "recurrent layers stay float",
    ),
    "EmbeddingModule": ((torch.tensor([[1, 2], [3, 9]]),), "embeddings stay float"),
    "ActivationsTestModel": ((torch.randn(8, 5),), "input x is float"),
}
"""Models in which qfx quantizes nothing, with their inputs and the reason that the table gives."""


# Not compared: NormalizationTestModel normalizes equal values, so that its result is the rounding of float arithmetic;
# RNN, QAT and Annotated* models are built for torch's other modes.


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    """torch's quantized engine is global state."""
    if ENGINE not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {ENGINE}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    yield
    torch.backends.quantized.engine = before


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(toys, name)().eval()


def batches(shapes: tuple[tuple[int, ...], ...], count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(BATCH, *shape, generator=generator) for shape in shapes) for _ in range(count)]


def fx_mode(model: nn.Module, data: list[tuple[Tensor, ...]]) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(ENGINE), data[0])
        for item in data:
            prepared(*item)
        return convert_fx(prepared)


def quality(model: nn.Module, made: nn.Module, item: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        return sqnr_db(model(*item), made(*item))


@pytest.mark.parametrize("name", BOTH)
def test_no_noisier_than_fx_mode(name: str) -> None:
    model = build(name)
    *data, held_out = batches(BOTH[name], 4)
    peer = quality(model, fx_mode(model, data), held_out)
    for target in AVAILABLE:
        qmodel = qfx.quantize(model, data[0], calibration=data, target=target, verbose=False)
        assert quality(model, qmodel, held_out) >= peer - MARGIN_DB, f"{target}; FX mode reaches {peer:.1f} dB"


@pytest.mark.parametrize("name", ONLY_QFX)
def test_what_fx_mode_cannot_do(name: str) -> None:
    shapes, _ = ONLY_QFX[name]
    model = build(name)
    *data, held_out = batches(shapes, 4)
    for target in AVAILABLE:
        qmodel = qfx.quantize(model, data[0], calibration=data, target=target, verbose=False)
        assert quality(model, qmodel, held_out) > 25 and qfx.report(qmodel).integer_macs > 0.9


@pytest.mark.parametrize("name", FLOAT_BY_RULE)
def test_what_stays_float_by_rule(name: str) -> None:
    inputs, reason = FLOAT_BY_RULE[name]
    model = build(name)
    qmodel = qfx.quantize(model, inputs, target="reference", verbose=False)
    rows = qfx.report(qmodel).rows
    assert not any(row.integer for row in rows) and any(reason in row.reason for row in rows)
    with torch.no_grad():
        want, got = model(*inputs), qmodel(*inputs)
    first = (want[0], got[0]) if isinstance(want, tuple) else (want, got)
    assert torch.equal(*first)
