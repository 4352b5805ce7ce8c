"""Lowered graphs of many products of two activations side by side: one program shows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qfx.graph_module import CapturedModule
from qfx.operators import OPS
from qfx.targets import AnchorRegion, QParams, Step
from qfx.targets.reference import MatmulLeaf

from ..targets import regions as r
from .nets import rounded

aten = torch.ops.aten
UINT8, INT8 = r.qparams(0.03, 117), r.qparams(0.03, 0, torch.int8)
LOW, HIGH, ODD = r.qparams(0.06, 0), r.qparams(0.06, 255), r.qparams(0.03, -77, torch.int8)
RELU, SIGMOID = Step("relu", aten.relu.default), Step("sigmoid", aten.sigmoid.default)
ADD, ADD_FLOAT = Step("add", aten.add.Tensor, other=r.qparams(0.05, 90)), Step("add", aten.add.Tensor)


@dataclass(frozen=True)
class Case:
    """``[*heads, rows, length] @ [*heads, length, columns]`` of each sample.

    ``left_order`` and ``right_order``: the operand is a permutation of what comes in, whose dimensions, the batch
    among them, then stand in another order in memory.
    """

    rows: int
    length: int
    columns: int
    heads: tuple[int, ...] = ()
    left: QParams = UINT8
    right: QParams = UINT8
    output: QParams | None = None
    steps: tuple[Step, ...] = ()
    left_order: tuple[int, ...] | None = None
    right_order: tuple[int, ...] | None = None

    @property
    def result(self) -> tuple[int, ...]:
        return (*self.heads, self.rows, self.columns)

    @property
    def given(self) -> list[tuple[int, ...]]:
        """Sizes of a sample of each input: left, right, addends."""
        wanted = ((*self.heads, self.rows, self.length), (*self.heads, self.length, self.columns))
        sizes = [_before(s, order) for s, order in zip(wanted, (self.left_order, self.right_order), strict=True)]
        return [*sizes, *(self.result for step in self.steps if step.name == "add")]

    def leaf(self) -> MatmulLeaf:
        op, target = OPS["matmul"], aten.matmul.default
        region = AnchorRegion(
            op, target, self.left, None, None, 8, None, None, (), self.steps, self.output, torch.float32, self.right
        )
        return MatmulLeaf(region)


def _before(sizes: tuple[int, ...], order: tuple[int, ...] | None) -> tuple[int, ...]:
    """What has ``sizes`` behind a permutation."""
    if order is None:
        return sizes
    return tuple(sizes[order.index(dim) - 1] for dim in range(1, len(order)))


def graph_of(cases: Sequence[Case]) -> fx.GraphModule:
    """Every operand is rounded, put in order and multiplied."""
    root, graph = nn.Module(), fx.Graph()
    inputs = iter([graph.placeholder(f"x_{i}") for i in range(len(inputs_of(cases, 1)))])
    results = []

    for i, case in enumerate(cases):
        root.add_module(f"product_{i}", case.leaf())
        args = []
        for q, order in ((case.left, case.left_order), (case.right, case.right_order)):
            operand = rounded(root, next(inputs), q)
            args.append(operand if order is None else graph.call_function(aten.permute.default, (operand, list(order))))
        for step in case.steps:
            if step.name == "add":
                args.append(next(inputs) if step.other is None else rounded(root, next(inputs), step.other))
        results.append(graph.call_module(f"product_{i}", tuple(args)))
    graph.output(tuple(results))
    return CapturedModule.of(root, graph, "Region")


def inputs_of(cases: Sequence[Case], samples: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of every case, some beyond what 8 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn((samples, *sizes), generator=generator) for case in cases for sizes in case.given)
