"""The benchmark of exported models: what it compares, and that an engine's failure is a figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfx.models import MODELS_SMALL
from qfx.tools import bench_onnx
from qfx.tools.bench_figures import Options
from qfx.tools.bench_onnx import Case, exported

pytestmark = [pytest.mark.filterwarnings("ignore::qfx.QfxWarning")]


def test_agreement_and_the_worst_output() -> None:
    wanted = [[torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2)], [torch.tensor([[1.0, 0.0]]), torch.ones(1)]]
    found = [[wanted[0][0].flip(1), torch.ones(2)], [wanted[1][0], torch.full((1,), 1.1)]]
    top1, sqnr = bench_onnx._compared("it", wanted, found, True)
    assert top1.value == pytest.approx(100 / 3) and top1.verdict == "MISSED" and top1.note == "3 inputs"
    assert sqnr.value is not None and sqnr.value < 0 and sqnr.verdict == "MISSED"
    assert [f.verdict for f in bench_onnx._compared("it", wanted, wanted, True)] == ["met", "met"]
    assert [f.verdict for f in bench_onnx._compared("it", wanted, found, False)] == ["", ""]


def test_an_engine_that_fails_is_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")

    class Broken:
        name = "Broken"

        def __init__(self, *_: Any) -> None:
            raise RuntimeError("no such engine")

    monkeypatch.setattr(bench_onnx, "RUNS", (("int8", "onnxruntime", Broken, {}, "default", True),))
    monkeypatch.setattr(bench_onnx.qfx, "export_onnx", lambda *_, **__: None)
    model, example = MODELS_SMALL["resnet20"]()
    *control, figure = bench_onnx._figures(Case("it", model, [example], [example]))
    assert len(control) == 2
    assert figure.verdict == "FAILED" and "no such engine" in figure.note


@pytest.mark.slow
def test_every_run_on_digits() -> None:
    for engine in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(engine)
    figures = list(exported(Options(target="reference"), images=16, models=()))
    assert len(figures) == 2 * len(bench_onnx.RUNS) + 5 and figures[-1].verdict == "skipped"
    assert all(f.good for f in figures), figures
