"""One-dimensional convolutions: images of one row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfx import jit

from .nets import Branches, Net, assert_agrees, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(5, 12, 3, padding=1), nn.Conv1d(12, 12, 5, padding=4, dilation=2, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        z: Tensor = self.second(y) + y
        return z


def lines() -> Branches:
    return Branches(
        residual=Residual(),
        strided=nn.Sequential(nn.Conv1d(5, 33, 4, stride=3, padding=2), nn.GELU(), nn.Conv1d(33, 7, 1)),
        one=nn.Conv1d(5, 1, 33),
        depthwise=nn.Sequential(nn.Conv1d(5, 5, 3, groups=5), nn.ReLU(), nn.Conv1d(5, 4, 2, bias=False)),
    )


@pytest.mark.parametrize("samples", [1, 3])
def test_lines(samples: int) -> None:
    torch.manual_seed(0)
    made = native(lines(), torch.randn(4, 5, 33))
    found = assert_agrees(made, torch.randn(samples, 5, 33))
    assert sum("conv1d" in d.node.name for d in found) == 7


def test_tokens_behind_a_line() -> None:
    """As encoders of speech do: features to the back, then rows."""
    torch.manual_seed(0)
    net = Net(lambda s, x: s.b(s.n(s.a(x).transpose(1, 2))), a=nn.Conv1d(5, 8, 3), n=nn.LayerNorm(8), b=nn.Linear(8, 6))
    made = native(net, x := torch.randn(4, 5, 20))
    assert_agrees(made, x)
    assert region_of(made).programs


def test_a_line_without_batch_runs_as_the_lowered_graph_does() -> None:
    net = Net(lambda s, x: s.a(x[0]).relu(), a=nn.Conv1d(5, 8, 3))
    x = torch.randn(1, 5, 20)
    made = native(net, x)
    torch.testing.assert_close(made(x), net(x), atol=0.1, rtol=0.1)
