"""The passes of the search: scores and bits on the nodes, and what was found before stays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx import api, score_cache
from qfx.allocation import InfeasibleBudget
from qfx.auto_recipe import AutoRecipe
from qfx.bit_allocation import Allocation, allocate_bits
from qfx.budget import Budget
from qfx.errors import CalibrationError, QfxWarning, UnsupportedError
from qfx.meta import graph_info, info, keep_calls, update_graph
from qfx.passes import AllocateBits, MeasureSensitivity, auto_ptq
from qfx.passes import measure_sensitivity as module
from qfx.pipeline import run_pass
from qfx.printer import show
from qfx.targets import Reference

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(score_cache, "_KEPT", type(score_cache._KEPT)())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.b(self.a(x).relu()).relu())
        return self.c(x @ x.t().softmax(0) @ x)


def calibrated(model: nn.Module | None = None) -> fx.GraphModule:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model or Net().eval(), X[:2], target="reference")
        api.keep_rows(made, 32)
        api.calibrate(made, [X])
    return api.graphs(made)[""]


AUTO = AutoRecipe(average_weight_bits=6.0, weight_bits=(2, 4, 8), score="kl")


def test_scores_then_bits() -> None:
    gm = calibrated()
    before = show(gm)
    assert run_pass(MeasureSensitivity(AUTO, Reference()), gm) == 3 * 3 + 5 - 1
    assert run_pass(AllocateBits(AUTO), gm) == 4
    assert show(gm) == before  # nothing is rounded otherwise yet
    found = graph_info(gm).allocation
    assert isinstance(found, Allocation) and found.costs["average_weight_bits"] <= 6.0
    assert graph_info(gm).sensitivity is found.sensitivity
    chosen = dict(zip((layer.path for layer in found.sensitivity.layers), found.choices, strict=True))
    linears = {n.name: n for n in gm.graph.nodes if info(n).bits is not None}
    assert [info(n).bits for n in linears.values()] == [8, chosen["b"].weight, chosen["b"].weight, 8]
    assert chosen["b"].weight in (2, 4) and chosen[""].weight is None
    scored = [n for n in gm.graph.nodes if info(n).sensitivity is not None]
    assert len(scored) == 4 + 2  # both products are at one place
    worst = found.sensitivity.worst(chosen["b"].weight or 0)
    assert info(scored[1]).sensitivity == dict(worst)["b:linear"]


def test_what_was_found_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = calibrated()
    run_pass(MeasureSensitivity(AUTO, Reference()), gm)
    found = graph_info(gm).sensitivity
    assert found is not None
    monkeypatch.setattr(module, "measure_sensitivity", None)  # would fail
    assert run_pass(MeasureSensitivity(AUTO, Reference()), gm) == 0
    mine = allocate_bits(found, Budget(8.0), pin=None)
    update_graph(gm, allocation=mine)
    run_pass(AllocateBits(AUTO), gm)
    assert graph_info(gm).allocation is mine


def test_calibration_forgets_what_was_measured_on_other_data() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(Net().eval(), X[:2], recipe=AUTO, target="reference")
        api.calibrate(made, [X])
        gm = api.graphs(made)[""]
        run_pass(MeasureSensitivity(AUTO, Reference()), gm)
        run_pass(AllocateBits(AUTO), gm)
        api.calibrate(made, [X + 1.0])
    assert graph_info(gm).sensitivity is None and graph_info(gm).allocation is None


def test_a_budget_that_nothing_meets() -> None:
    gm = calibrated()
    auto = AutoRecipe(weight_bytes=10, weight_bits=(2, 4), score="kl")
    run_pass(MeasureSensitivity(auto, Reference()), gm)
    with pytest.raises(InfeasibleBudget, match="weight_bytes 10 is too small: the least"):
        run_pass(AllocateBits(auto), gm)
    assert graph_info(gm).allocation is None


def test_nothing_to_measure_on() -> None:
    gm = calibrated()
    keep_calls(gm, ())
    with pytest.raises(CalibrationError, match="no data to measure sensitivity on"):
        run_pass(MeasureSensitivity(AUTO, Reference()), gm)
    with pytest.raises(UnsupportedError, match="no layer that is quantized"):
        run_pass(MeasureSensitivity(AUTO, Reference()), calibrated(nn.Softmax(-1)))


def test_the_order_of_the_passes() -> None:
    def names(auto: AutoRecipe) -> list[Any]:
        return [p.name for p in auto_ptq(auto, Reference())]

    found = names(AUTO)
    at = found.index("insert-observers")
    assert found[at + 1 : at + 5] == ["measure-sensitivity", "allocate-bits", "annotate-again", "convert"]
    assert "measure-latency" in names(AutoRecipe(latency_ms=3.0))
