"""``net(lambda self, x: ..., conv=nn.Conv2d(...))``: a module from one line, for the tests of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

Net = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def net() -> Net:
    def build(forward: Callable[..., Any], **parts: Any) -> nn.Module:
        module = type("Net", (nn.Module,), {"forward": forward})()
        for name, part in parts.items():
            setattr(module, name, part)
        return module.eval()

    return build
