"""Rows of all samples in one dimension, ``[batch * k, ...]``, as layers of transformers make them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfx import jit
from qfx.targets.native.inlined import inlined

from .nets import Net, assert_near, calls_of, linears, native

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it: on all rows at once, and its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.outputs)


def test_rows_of_all_samples() -> None:
    """Layers, functions, norms and arithmetic on them; in and out, in the middle, and given back as they are."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        rows = s.n(x.view(-1, 8))  # [N * 5, 8]
        y = s.b(s.a(rows).relu())
        parts = rows.view(-1, 2, 4)  # [N * 5, 2, 4]
        return (
            s.gpt(x), s.gpt2(s.gpt(x).relu()), rows, y, y.view(-1, 5, 6), y.softmax(-1), (y * y).mean(-1),
            y.mean(-1, keepdim=True) * y + s.row, s.c(parts) + s.c(parts), s.c(parts).flatten(1), y.view(-1, 30),
            s.c(rows.view(-1, 5, 2, 4)), y.unsqueeze(1), y.unsqueeze(1).squeeze(1) / 2,
        )  # fmt: skip

    ends = {"a": (8, 9), "b": (9, 6), "c": (4, 3)}
    net = Net(forward, gpt=Conv1D(8, 7), gpt2=Conv1D(7, 4), n=nn.LayerNorm(8), **linears(**ends))
    nn.init.uniform_(net.n.bias)
    net.row = nn.Parameter(torch.randn(6))
    example = torch.randn(4, 5, 8)
    made = native(net, example)
    for batch in (1, 3, 0):
        ((region, _),) = calls_of(made, x := example[:batch])
        assert not region.declined and len(region.programs) == 1
        with torch.no_grad():
            assert_near(made(x), inlined(made)(x), tolerance=0.02)
            assert_near(made(x), net(x), tolerance=0.1)


WHOLE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "joined with others": lambda s, y: torch.cat([y, y.sigmoid()], -1),
    "one behind the other": lambda s, y: torch.cat([y, y + 1], 0) * 2,
    "a part": lambda s, y: y[:, 1:4] * 2,
    "rows": lambda s, y: y[1:] * 2,
    "every other": lambda s, y: y[::2] * 2,
    "turned": lambda s, y: s.b(y.view(-1, 2, 3).transpose(1, 2)),
    "split": lambda s, y: y.split(3, -1)[1] + 1,
    "norm of a batch": lambda s, y: s.norm(y.sigmoid()),
    "other rows": lambda s, y: s.c(y.view(-1, 15, 2)[:, :, 0]),
    "samples inside": lambda s, y: s.b(y.view(5, -1, 2, 3).permute(1, 0, 3, 2)),
}


MIXED = {"one behind the other", "rows", "every other", "samples inside"}
"""Of these, those that know where one sample ends and the next begins, and do not keep to it."""


@pytest.mark.slow
def test_what_takes_rows_apart_is_right_all_the_same() -> None:
    """Where samples mix, the region is cut, or runs as the graph does, and says why."""
    declined = set()
    for name, forward in WHOLE.items():
        net = Net(
            lambda s, x, forward=forward: forward(s, s.a(x.view(-1, 8))),
            norm=nn.BatchNorm1d(6), **linears(a=(8, 6), b=(2, 4), c=(15, 4)),
        )  # fmt: skip
        example = torch.randn(4, 5, 8)
        made = native(net, example)
        for batch in (2, 3):
            calls = calls_of(made, x := example[1 : 1 + batch])
            if any(region.declined for region, _ in calls):
                declined.add(name)
            with torch.no_grad():
                got = made(x)
                assert_near(got, inlined(made)(x), tolerance=1e-5)
                assert_near(got, net(x), tolerance=0.1)
    assert declined == MIXED
