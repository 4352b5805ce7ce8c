"""What the tests of the benchmarks and of the worked cases share."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
from torch import nn

from qfx.attributes import nbytes
from qfx.tools import qat_case
from qfx.tools.qat_cost import Cost


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and latency have tests of their own."""

    def cost(model: nn.Module, *others: object) -> Cost:
        return Cost(nbytes([*model.parameters(), *model.buffers()]), None, 1.0, 1.0)

    monkeypatch.setattr(qat_case, "cost", cost)


class FakeImages(types.ModuleType):
    """Stands for PIL.Image: an "encoded image" is one byte, which all pixels then have."""

    @staticmethod
    def open(file: Any) -> Any:
        value = file.read()[0]
        return types.SimpleNamespace(convert=lambda mode: np.full((32, 32, 3), value, np.uint8))


@pytest.fixture
def one_byte_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow need not be there."""
    monkeypatch.setitem(sys.modules, "PIL", types.ModuleType("PIL"))
    monkeypatch.setitem(sys.modules, "PIL.Image", FakeImages("PIL.Image"))
