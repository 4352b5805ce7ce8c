"""The table of a native model's steps. The peak is a given number here, so that shares can be computed again."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import fx, nn

import qfx
from qfx import jit
from qfx.errors import ConfigError
from qfx.targets.native import making
from qfx.targets.native.declined import Declined
from qfx.targets.native.float_twin import Times
from qfx.targets.native.inlined import regions_of
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.target import Native
from qfx.tools import bench_latency, latency_subject, roofline
from qfx.tools.roofline import of_reference_model, step_times

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

PEAK = 1e9
BATCH = 4
X = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two regions: nothing native adds up along a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x).cumsum(1))
        return y


MACS = {"first.0": BATCH * 6 * 8, "first.2": BATCH * 8 * 6, "last": BATCH * 6 * 4}


def quantized(model: nn.Module, target: Any = "native") -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        made = qfx.quantize(model.eval(), (X,), target=target, verbose=False)
    assert isinstance(made, fx.GraphModule)
    return made


@pytest.fixture(scope="module")
def model() -> fx.GraphModule:
    torch.manual_seed(0)
    return quantized(Two())


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the peak was measured for."""
    found: list[tuple[str, int]] = []

    def measured(isa: Any, threads: int) -> float:
        found.append((isa.name, threads))
        return PEAK

    monkeypatch.setattr(roofline, "measured_peak", measured)
    return found


def cells(table: str) -> list[list[str]]:
    """Of the head and of every row; columns are as wide as the rule below the head."""
    head, rule, *rows = table.split("\n\n")[0].splitlines()
    ends = [match.span() for match in re.finditer("-+", rule)]
    return [[line[a:b].strip() for a, b in ends] for line in (head, *rows)]


def test_the_steps_are_those_of_the_programs(model: fx.GraphModule) -> None:
    regions = regions_of(model)
    assert len(regions) == 2
    steps = step_times(model, X)
    assert [s.kernel for s in steps] == [s.kernel for r in regions.values() for p in r.programs for s in p.steps]
    assert {s.layer: s.macs for s in steps if s.macs} == MACS
    assert all(0 < s.seconds < 60 for s in steps)
    assert all(not region._forward_pre_hooks for region in regions.values())


def test_a_batch_has_as_many_products_as_samples(model: fx.GraphModule) -> None:
    assert {s.layer: s.macs for s in step_times(model, torch.cat([X, X])) if s.macs} == {
        name: 2 * macs for name, macs in MACS.items()
    }


def test_hooks_are_gone_after_an_error(model: fx.GraphModule) -> None:
    with pytest.raises(Exception, match=r"shape|size|match"):
        step_times(model, torch.randn(4, 5))
    assert all(not region._forward_pre_hooks for region in regions_of(model).values())


def test_the_table(model: fx.GraphModule, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = step_times(model, X)
    monkeypatch.setattr(roofline, "step_times", lambda *given: steps)
    text = roofline.roofline(model, X)
    assert text.endswith(f"measured int8 peak: {2e-12 * PEAK:.3f} TOPS; Winograd saves products, and may pass it\n")
    head, *rows, last = cells(text)
    assert head == ["layer", "kernel", "µs", "TOPS", "of the peak"]
    assert [row[:2] for row in rows] == [[s.layer, s.kernel] for s in steps]
    for row, step in zip(rows, steps, strict=True):
        assert row[2] == f"{step.seconds * 1e6:.1f}"
        rate = step.macs / step.seconds
        assert row[3:] == ([f"{2e-12 * rate:.3f}", f"{rate / PEAK:.0%}"] if step.macs else ["", ""])
        assert not step.macs or 0 < rate / PEAK < float("inf")
    seconds, macs = sum(s.seconds for s in steps), sum(MACS.values())
    assert last[:2] == ["all steps", ""] and last[2] == f"{seconds * 1e6:.1f}"
    assert last[3:] == [f"{2e-12 * macs / seconds:.3f}", f"{macs / seconds / PEAK:.0%}"]
    assert len(asked) == 1 and asked[0][1] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["not native", "no samples"])
def test_where_nothing_is_multiplied_there_is_no_share(model: fx.GraphModule, name: str) -> None:
    given = (model, X[:0]) if name == "no samples" else (quantized(nn.Linear(6, 4), target="x86"), X)
    *_, last = cells(roofline.roofline(*given))
    assert last == ["all steps", "", "0.0", "", ""]


def test_of_a_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized for native, and called on as many rows of data that were not seen before."""
    monkeypatch.setattr(latency_subject, "MODELS", {"two": lambda: (Two().eval(), (X[:1],))})
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
    shown: list[tuple[fx.GraphModule, Any]] = []
    monkeypatch.setattr(roofline, "roofline", lambda model, example: shown.append((model, example)) or "the table")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        assert of_reference_model("two", 3) == "the table"
    ((model, example),) = shown
    assert len(regions_of(model)) == 2
    assert [x.shape for x in example] == [(3, 6)] and not torch.equal(example[0][:1], X[:1])


def test_bad_arguments(
    model: fx.GraphModule, asked: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="no instruction set"):
        roofline.roofline(model, X, isa="sse9")
    assert not asked
    roofline.roofline(model, X, isa="portable")
    assert asked == [("portable", torch.get_num_threads())]
    with pytest.raises(KeyError):
        of_reference_model("no such model", 1)
    for argv in (["no such model", "1", "--roofline"], ["resnet50", "0", "--roofline"], ["--roofline"]):
        with pytest.raises(SystemExit):
            bench_latency.main(argv)
    assert "MODEL" in capsys.readouterr().err


def test_a_region_that_runs_in_float_has_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has one that runs as its graph does."""
    monkeypatch.setattr(making, "build", lambda *args, **options: None)
    monkeypatch.setattr(making, "tune", lambda *args: {})
    monkeypatch.setattr(making, "compare_times", lambda *args: Times(2.0, 1.0))
    assert step_times(quantized(Two(), target=Native(tune="fast")), X) == []
