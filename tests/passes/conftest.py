"""``net(lambda self, x: ..., conv=nn.Conv2d(...))``: a module from one line; and graphs as far as calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, fx, nn

from qfx import calibration
from qfx.capture import capture
from qfx.examples import as_example
from qfx.passes import (
    Annotate,
    Canonicalize,
    Functionalize,
    FuseBnConv,
    FuseConvBn,
    FuseEpilogues,
    FuseLinearBn,
    InsertObservers,
    ShareScales,
    qat,
)
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.targets import Reference
from qfx.testing import run_passes

Net = Callable[..., nn.Module]
Calibrated = Callable[..., fx.GraphModule]


@pytest.fixture(scope="session")
def net() -> Net:
    def build(forward: Callable[..., Any], **parts: Any) -> nn.Module:
        module = type("Net", (nn.Module,), {"forward": forward})()
        for name, part in parts.items():
            setattr(module, name, part)
        return module.eval()

    return build


@pytest.fixture(scope="session")
def calibrated() -> Calibrated:
    """``calibrated(model, example, recipe, data=...)``: the CALIBRATED graph, by default on the example alone."""

    def build(model: nn.Module, example: Any, recipe: Recipe | None = None, *, data: Any = None) -> fx.GraphModule:
        fuse = (Functionalize(), Canonicalize(), FuseConvBn(), FuseLinearBn(), FuseBnConv(), FuseEpilogues())
        annotate = Annotate(recipe or Recipe.int8(), Reference())
        gm = run_passes(model, example, *fuse, annotate, ShareScales(), InsertObservers())
        calibration.observe_weights(gm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", calibration.CalibrationWarning)
            calibration.run(gm, [gm], [example] if data is None else data, as_example(example))
        return gm

    return build


@pytest.fixture(scope="session")
def fake_quantized() -> Callable[..., Tensor]:
    """``fake_quantized(gm, x)``: what a CALIBRATED graph returns while its FakeQuantize modules round."""

    def run(gm: fx.GraphModule, *args: Tensor) -> Any:
        modules = {m for _, m in calibration.fake_quants(gm)}
        for m in modules:
            m.quantizing = True
        result = gm(*args)
        for m in modules:
            m.quantizing = False
        return result

    return run


@pytest.fixture(scope="session")
def trained() -> Callable[..., fx.GraphModule]:
    """``trained(model, example, recipe, until="absorb-clamps")``: the graph of training behind that pass."""

    def build(
        model: nn.Module, example: Any, recipe: Recipe | None = None, until: str = "absorb-clamps"
    ) -> fx.GraphModule:
        gm = capture(model, example, training=True)
        for p in qat(recipe or Recipe.int8(), Reference()):
            run_pass(p, gm)
            if p.name == until:
                break
        return gm.train()

    return build
