"""Where the values of a native program lie: buffers, and strided views of them.

All sizes are per sample. The batch is the outermost dimension of every buffer, so that only the number of samples,
which the program gets at run time, is left open; among a view's sizes it is :data:`BATCH`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

BATCH = -1
"""Stands among sizes for the number of samples."""

Element = Literal["uint8_t", "int8_t", "bool", "float", "int64_t"]
Place = Literal["arena", "input", "output", "constant"]
BYTES: dict[Element, int] = {"uint8_t": 1, "int8_t": 1, "bool": 1, "float": 4, "int64_t": 8}


@dataclass(frozen=True)
class Border:
    """Positions stored around an image."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    def __or__(self, other: Border) -> Border:
        """The smallest border that holds both."""
        return Border(*(max(a, b) for a, b in zip(self.sides, other.sides, strict=True)))

    @property
    def sides(self) -> tuple[int, int, int, int]:
        return self.top, self.left, self.bottom, self.right

    def holds(self, other: Border) -> bool:
        return self | other == self


@dataclass(eq=False)
class Buffer:
    """Memory of ``size`` elements per sample (a constant: in all).

    ``index``: its number in its place; a constant's is
    where it begins, in bytes.
    """

    place: Place
    index: int
    element: Element
    size: int

    @property
    def bytes(self) -> int:
        return self.size * BYTES[self.element]


@dataclass(frozen=True)
class View:
    """A tensor in a buffer: element (i, j, ...) is at ``offset + i * strides[0] + j * strides[1] + ...``.

    ``border``: positions around it, where it is an image ``[BATCH, C, H, W]``, that belong to it as well.
    """

    buffer: Buffer
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    border: Border = field(default_factory=Border)

    @property
    def element(self) -> Element:
        return self.buffer.element

    @property
    def batched(self) -> bool:
        """True where the first dimension, and no other, is the batch."""
        return bool(self.sizes) and self.sizes[0] == BATCH and BATCH not in self.sizes[1:]

    @property
    def contiguous(self) -> bool:
        """True for the whole of a buffer in the natural order of dimensions."""
        whole = self.offset == 0 and numel(self.sizes) == self.buffer.size
        return whole and self.strides == natural_strides(self.sizes, self.buffer.size)

    @property
    def channels_last(self) -> bool:
        """True for an image whose channels lie side by side."""
        return self.batched and len(self.sizes) == 4 and (self.strides[1] == 1 or self.sizes[1] == 1)

    def permute(self, order: tuple[int, ...]) -> View:
        sizes, strides = tuple(self.sizes[i] for i in order), tuple(self.strides[i] for i in order)
        return replace(self, sizes=sizes, strides=strides, border=Border())

    def select(self, dim: int, index: int) -> View:
        keep = [i for i in range(len(self.sizes)) if i != dim]
        return replace(self.permute(tuple(keep)), offset=self.offset + index * self.strides[dim])

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> View:
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[dim], strides[dim] = length, strides[dim] * step
        offset = self.offset + start * self.strides[dim]
        return replace(self, sizes=tuple(sizes), strides=tuple(strides), offset=offset, border=Border())

    def expand(self, sizes: tuple[int, ...]) -> View:
        """The same elements, dimensions that are missing in front or of size 1 repeated to ``sizes``."""
        missing = len(sizes) - len(self.sizes)
        kept = zip(self.strides, self.sizes, sizes[missing:], strict=True)
        strides = [0] * missing + [stride if given == size else 0 for stride, given, size in kept]
        return self if sizes == self.sizes else replace(self, sizes=sizes, strides=tuple(strides), border=Border())

    def reshape(self, sizes: tuple[int, ...]) -> View | None:
        """The same elements, in the same order, with other sizes; None where that takes a copy."""
        strides: list[int] = []
        groups = iter(_merged(self))
        left, stride = 1, 0
        for size in reversed(sizes):
            if size == 1:
                strides.append(stride)
                continue
            while left == 1:
                left, stride = next(groups, (0, 0))
            if size == BATCH or left == BATCH:
                if size != left:
                    return None
                strides.append(stride)
                left = 1
                continue
            if size == 0 or left % size:
                return None
            strides.append(stride)
            left, stride = left // size, stride * size
        return replace(self, sizes=sizes, strides=tuple(reversed(strides)), border=Border())


def _merged(view: View) -> list[tuple[int, int]]:
    """``(size, stride)`` from the innermost, of runs of dimensions that can be walked as one; the batch is alone."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(reversed(view.sizes), reversed(view.strides), strict=True):
        if size == 1:
            continue
        if found and BATCH not in (size, found[-1][0]) and stride == found[-1][0] * found[-1][1]:
            found[-1] = (found[-1][0] * size, found[-1][1])
        else:
            found.append((size, stride))
    return found


def natural_strides(sizes: tuple[int, ...], sample: int) -> tuple[int, ...]:
    """Strides of the natural order, innermost last; ``sample``: elements between samples."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(sample if size == BATCH else step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def numel(sizes: tuple[int, ...]) -> int:
    """Elements of one sample."""
    return math.prod(size for size in sizes if size != BATCH)
