"""A convolution or linear layer, as its kernels take it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qfx.targets.base import Step
from qfx.targets.native.choice import Choice
from qfx.targets.native.emitter import Emitter
from qfx.targets.native.epilogues import Epilogue
from qfx.targets.native.images import base, border_fill, image
from qfx.targets.native.isa import Isa
from qfx.targets.native.program import Program
from qfx.targets.native.views import View
from qfx.targets.reference import MatmulLeaf
from qfx.targets.x86_kernels import Convolution
from qfx.targets.x86_static import StaticLeaf, signed


@dataclass(frozen=True)
class Geometry:
    """A layer as a convolution: a linear layer is one of 1 x 1 on an image of one row."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def geometry_of(leaf: StaticLeaf) -> Geometry:
    if len(leaf.weight_shape) == 2:
        return Geometry()
    conv = leaf.geometry
    assert isinstance(conv, Convolution)
    kernel = leaf.weight_shape[2:]
    if conv.dims == 1:
        kernel, conv = (1, *kernel), conv.wide()
    return Geometry(kernel, conv.stride, conv.padding, conv.dilation, conv.groups)


def steps_of(leaf: StaticLeaf | MatmulLeaf) -> tuple[Step, ...]:
    """What runs behind the sums."""
    return tuple(Step(name, None, args, None, tuple(kwargs.items())) for name, _, args, kwargs in leaf.calls)


def flip_of(leaf: StaticLeaf) -> int:
    """What is added to int8 data to read them as uint8."""
    return 128 if leaf.data.limits["dtype"] == torch.int8 else 0


@dataclass(frozen=True)
class Layer:
    """``x`` and ``out``: images ``[BATCH, C, H, W]``, channels last."""

    emitter: Emitter
    node: fx.Node
    leaf: StaticLeaf
    geometry: Geometry
    x: View
    out: View
    epilogue: Epilogue
    choice: Choice = field(default_factory=Choice)

    @property
    def program(self) -> Program:
        return self.emitter.program

    @property
    def isa(self) -> Isa:
        return self.emitter.isa

    @property
    def weight(self) -> Tensor:
        """int8 ``[O, I, kh, kw]``."""
        found = signed(self.leaf)
        return found.reshape(*found.shape[:2], *self.geometry.kernel)

    @property
    def positions(self) -> int:
        """Of the output, per sample."""
        return self.out.sizes[2] * self.out.sizes[3]

    @property
    def flip(self) -> int:
        return flip_of(self.leaf)

    @property
    def images(self) -> str:
        """The first three fields of every C++ struct: input, output, addend."""
        return ", ".join(image(view) for view in (self.x, self.out, self.epilogue.other or self.out))

    @property
    def steps(self) -> tuple[int, int]:
        """Input elements from one output position to the next, down and across."""
        return self.geometry.stride[0] * self.x.strides[2], self.geometry.stride[1] * self.x.strides[3]

    @property
    def first(self) -> int:
        """Input elements from position (0, 0) to the first element of the window of output position (0, 0)."""
        return -self.geometry.padding[0] * self.x.strides[2] - self.geometry.padding[1] * self.x.strides[3]

    @property
    def data(self) -> str:
        """A C++ pointer to the input image."""
        return base(self.x)

    def window(self) -> tuple[list[int], int]:
        """Where the runs of contiguous elements of a window begin, from its first element, and their length."""
        (height, width), (down, across) = self.geometry.kernel, self.geometry.dilation
        row, pixel = self.x.strides[2:]
        inputs = self.leaf.weight_shape[1]
        whole = self.geometry.groups == 1 and across == 1 and pixel == inputs
        columns = [0] if whole else [x * across * pixel for x in range(width)]
        runs = [y * down * row + column for y in range(height) for column in columns]
        return runs, width * inputs if whole else inputs

    def parts(self, blocks: int, tiles: int) -> int:
        """Into how many parts the channels are split between threads, where there are too few blocks of positions."""
        threads = self.program.threads
        if self.choice.parts is not None:
            return min(tiles, self.choice.parts)
        return min(tiles, 1 if blocks >= 4 * threads else threads) if threads > 1 else 1

    def scaled(self, size: int) -> int:
        """The size of a block, as the choice scales it."""
        return size if self.choice.scale is None else int(size * self.choice.scale)

    def block(self, most: int, total: int, unit: int) -> int:
        """Into blocks of how many, in whole ``unit``, ``total`` is cut: about ``most``, and nearly as many in each."""
        blocks = -(-total // max(unit, -(-self.scaled(most) // unit) * unit))
        return max(1, -(-total // (max(1, blocks) * unit))) * unit

    def packed(self, kernel: str, make: Callable[[], tuple[Tensor, int]]) -> tuple[str, int]:
        """A C++ pointer to the weights for ``kernel``, which ``make`` packs, and the number that it gives with them."""
        key = (self.node, kernel)
        if key not in self.emitter.packed:
            tensor, number = make()
            self.emitter.packed[key] = (self.program.constant(tensor), number)
        return self.emitter.packed[key]

    @property
    def signature(self) -> str:
        """All that the speed of a kernel depends on."""
        sizes = f"{self.x.sizes[1:]} {self.x.strides} {self.out.sizes[1:]} {self.out.strides[2:]}"
        behind = self.epilogue.code.partition(" epilogue")[0].removeprefix("const ")
        flip = f"flip {self.flip}"
        return f"{self.leaf.weight_shape} {self.geometry} {sizes} {flip} {behind} {self.program.threads} threads"

    def add(self, call: str, header: str, kernel: str, scratch: str = "0") -> None:
        """Add the step: the C++ statement ``call`` behind that of the epilogue, which it names."""
        self.program.headers.add(header)
        zero = 0 if self.leaf.output is None else int(self.leaf.output.zero_point) & 255  # what a reader's padding is
        code = "\n".join([border_fill(self.out, zero), self.epilogue.code, call])
        reads = [self.x] if self.epilogue.other is None else [self.x, self.epilogue.other]
        dims = len(self.leaf.weight_shape) - 2
        name = f"conv{dims}d" if dims else "linear"
        full = "+".join([f"{kernel} {name}", *(step.name for step in steps_of(self.leaf))])
        macs = self.positions * math.prod(self.leaf.weight_shape)
        told = {"macs": macs, "layer": self.signature, "choice": self.choice}
        self.emitter.step(code, reads, [self.out], self.node, full, scratch=scratch, **told)
