"""Sums are written over operands that nobody reads again, and only over those; integers come in the layout read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import qfx
from qfx.errors import VerifyError
from qfx.meta import update_graph
from qfx.ops import quantize
from qfx.stage import Stage
from qfx.targets import TARGETS, Leaf
from qfx.verify import leaf_of, verify

needs_x86 = pytest.mark.skipif(TARGETS["x86"].unavailable() is not None, reason=str(TARGETS["x86"].unavailable()))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block; ``late`` reads the shortcut once more, behind the sum."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.stem, self.first, self.body, self.last = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.late = late

    def forward(self, x: torch.Tensor) -> Any:
        shortcut = self.stem(x).relu()
        y = (self.body(self.first(shortcut)) + shortcut).relu()
        y = self.last(y)
        return (y, self.last(shortcut)) if self.late else y


def lowered(model: nn.Module, target: str = "x86") -> Any:
    return qfx.quantize(model.eval(), IMAGES, target=target, verbose=False)


def overwriting(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if (leaf := leaf_of(gm, n)) is not None and leaf.overwrites]


@needs_x86
def test_the_last_reader_overwrites() -> None:
    gm = lowered(Block())
    assert overwriting(gm) == ["conv2d_2_leaf"]
    first = gm(IMAGES)
    assert torch.equal(first, gm(IMAGES)), "a second call must find its constants as they were"
    kept = copy.deepcopy(gm)
    for leaf in (m for m in kept.modules() if isinstance(m, Leaf)):
        leaf.overwrites = False
    assert torch.equal(first, kept(IMAGES))


@needs_x86
def test_declines_when_both_inputs_are_one_tensor() -> None:
    class Same(Block):
        def forward(self, x: torch.Tensor) -> Any:
            shortcut = self.stem(x).relu()
            return self.last((self.body(shortcut) + shortcut).relu())

    assert overwriting(lowered(Same())) == []


@needs_x86
def test_declines_when_the_operand_is_read_later() -> None:
    assert overwriting(lowered(Block(late=True))) == []


@needs_x86
def test_declines_when_a_view_shares_its_memory() -> None:
    class Viewed(Block):
        def forward(self, x: torch.Tensor) -> Any:
            shortcut = self.stem(x).relu()
            y = (self.body(self.first(shortcut)) + shortcut).relu()
            return self.last(y), self.last(shortcut[:, :, :4])

    assert overwriting(lowered(Viewed())) == []


@needs_x86
def test_a_reader_added_later_is_found_out() -> None:
    gm = lowered(Block())
    call = next(n for n in gm.graph.nodes if n.name in overwriting(gm))
    with gm.graph.inserting_before(gm.graph.output_node()):
        late = gm.graph.call_function(torch.ops.aten.clone.default, (call.args[-1],))
    output = gm.graph.output_node()
    output.args = ((*output.args[0], late),)
    update_graph(gm, stage="LOWERED")
    with pytest.raises(VerifyError, match="overwrites its last input, but clone"):
        verify(gm, Stage.LOWERED)


@needs_x86
def test_integers_for_convolutions_are_made_channels_last() -> None:
    gm = lowered(Block())
    (node,) = (n for n in gm.graph.nodes if n.target is quantize)
    assert node.kwargs == {"channels_last": True}
    assert all(leaf.channels_last for leaf in gm.modules() if isinstance(leaf, Leaf))
