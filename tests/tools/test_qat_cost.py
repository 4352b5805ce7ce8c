"""What a model costs to run: bytes, and memory in a process of its own. No test asserts a time."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from qfx.tools import qat_cost
from qfx.tools.qat_cost import cost, peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cost_of_a_large_layer() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048, bias=False))
    model[1].weight = model[0].weight
    found = cost(model, model, torch.zeros(1, 2048))
    assert found.bytes == 2048 * 2048 * 4, "what is tied counts once"
    assert found.peak_bytes is not None and 1.0 < found.peak_bytes / found.bytes < 1.5
    assert found.latency_ms > 0 and found.speedup > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"measuring memory: .*mat1 and mat2"):
        peak_bytes(nn.Linear(2, 2), torch.zeros(1, 3))


def test_memory_is_not_measured_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes(nn.Linear(2, 2), torch.zeros(1, 2)) is None


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_calls_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat_cost, "peak_bytes", lambda model, inputs: 7)
    found = cost(Sum(), Sum(), {"a": torch.zeros(1), "b": torch.ones(1)})
    assert (found.bytes, found.peak_bytes) == (0, 7)
