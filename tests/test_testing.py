"""The helpers for tests of passes can fail, and say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.passes import Canonicalize
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.ones(2, 3)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * 2, training=self.training)


def test_assert_graph_compares_and_shows_the_difference() -> None:
    gm = run_passes(Doubled().eval(), X, Canonicalize())
    assert_graph(gm, """
        %x: f32[*, 3] = input
        %mul: f32[*, 3] = mul.Tensor(%x, 2)
        return (%mul)
    """)
    with pytest.raises(AssertionError) as raised:
        assert_graph(gm, """
            %x: f32[*, 3] = input
            %mul: f32[*, 3] = mul.Tensor(%x, 3)
            return (%mul)
        """)
    text = str(raised.value)
    assert "-%mul: f32[*, 3] = mul.Tensor(%x, 3)\n+%mul: f32[*, 3] = mul.Tensor(%x, 2)" in text
    assert text.endswith("graph is now\n%x: f32[*, 3] = input\n%mul: f32[*, 3] = mul.Tensor(%x, 2)\nreturn (%mul)\n")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda x: x + 0.5, "relative error 0.5, allowed are 0.001"),
        (lambda x: x[:1], "output 0"),
        (lambda x: x.double(), "output 0"),
        (lambda x: (x, x), "built differently"),
        (lambda x: x * float("nan"), "relative error inf"),
        (lambda x: x / 0, "relative error inf"),
    ],
)
def test_assert_same_numerics_fails(other: Any, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        assert_same_numerics(lambda x: x, other, X, tolerance=1e-3)


def nested(x: Tensor) -> dict[str, Any]:
    return {"a": x / 0, "b": [x * float("nan"), 3]}


def test_assert_same_numerics_holds() -> None:
    assert_same_numerics(lambda x: x, lambda x: x + 1e-4, X, tolerance=1e-3)
    assert_same_numerics(nested, nested, X)
    assert_same_numerics(lambda x, y: x + y, lambda x, y: y + x, {"x": X, "y": X})
    assert_same_numerics(lambda x: x.argmax(), lambda x: x.argmax(), (X,))


def test_assert_same_numerics_gives_copies() -> None:
    assert_same_numerics(lambda x: x.add_(1), lambda x: x.add_(1), X)
    assert torch.equal(X, torch.ones(2, 3))
