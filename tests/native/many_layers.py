"""Lowered graphs of many small layers side by side, each with an input of its own: one program shows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.graph_module import CapturedModule
from qfx.targets import QParams, Step
from qfx.targets.x86 import X86
from qfx.targets.x86_static import StaticLeaf

from ..targets import regions as r
from .nets import rounded

aten = torch.ops.aten
UINT8, INT8 = r.qparams(0.04, 120), r.qparams(0.04, -9, torch.int8)
ADDEND = r.qparams(0.05, 90)
RELU = Step("relu", aten.relu.default)


@dataclass(frozen=True)
class Case:
    """A layer on inputs of ``size``: ``[H, W]`` for a convolution, what is before the channels for a linear one.

    ``kernel`` None: a linear layer. ``addend``: an integer one is added behind the sums, then relu.
    """

    inputs: int
    outputs: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, int] | None = None
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1
    addend: bool = False
    floats: bool = False
    data: QParams = UINT8

    @property
    def sample(self) -> tuple[int, ...]:
        return (*self.size, self.inputs) if self.kernel is None else (self.inputs, *self.size)

    @property
    def result(self) -> tuple[int, ...]:
        if self.kernel is None:
            return (*self.size, self.outputs)
        span = [self.dilation * (k - 1) for k in self.kernel]
        ends = zip(self.size, self.padding, span, strict=True)
        return (self.outputs, *((size + 2 * padding - over - 1) // self.stride + 1 for size, padding, over in ends))

    def leaf(self, seed: int) -> StaticLeaf:
        shape = (self.outputs, self.inputs // self.groups, *(self.kernel or ()))
        args: tuple[Any, ...] = ([self.stride], list(self.padding), [self.dilation], self.groups)
        output = r.qparams(r.output_scale(shape, 0, float(self.data.scale)), 120)
        steps = (Step("add", aten.add.Tensor, other=ADDEND), RELU) if self.addend else ()
        made = X86().lower_anchor(
            r.anchor(
                "linear" if self.kernel is None else "conv2d",
                shape,
                () if self.kernel is None else args,
                data=self.data,
                output=None if self.floats else output,
                steps=steps,
                seed=seed,
            )
        )
        assert isinstance(made, StaticLeaf)
        return made


def graph_of(cases: Sequence[Case]) -> fx.GraphModule:
    """One layer, behind a quantization, for each case; an addend is the next input."""
    root, graph = nn.Module(), fx.Graph()
    inputs = iter([graph.placeholder(f"x_{i}") for i in range(len(inputs_of(cases, 1)))])
    results = []

    for i, case in enumerate(cases):
        root.add_module(f"layer_{i}", case.leaf(seed=i))
        args = [rounded(root, next(inputs), case.data)]
        if case.addend:
            args.append(rounded(root, next(inputs), ADDEND))
        results.append(graph.call_module(f"layer_{i}", tuple(args)))
    graph.output(tuple(results))
    return CapturedModule.of(root, graph, "Region")


def inputs_of(cases: Sequence[Case], samples: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of every case and addend, some beyond what 8 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = []
    for case in cases:
        shapes.append(case.sample)
        if case.addend:
            shapes.append(case.result)
    return tuple(4 * torch.randn((samples, *shape), generator=generator) for shape in shapes)
