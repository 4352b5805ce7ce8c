"""Views as the C++ of ``image.h`` knows them."""

from __future__ import annotations

from qfx.targets.native.program import pointer
from qfx.targets.native.views import Border, View


def image(view: View) -> str:
    """A C++ ``Image`` of a view ``[BATCH, C, H, W]`` whose channels lie side by side."""
    _, channels, height, width = view.sizes
    sample, _, row, pixel = view.strides
    sides = ", ".join(map(str, view.border.sides))
    return f"Image{{{height}, {width}, {channels}, {sides}, {sample}, {row}, {pixel}}}"


def base(view: View) -> str:
    """The C++ pointer to where the image begins, its border included."""
    if view.border == Border():
        return pointer(view.buffer, view.offset)
    inside = view.border.top * view.strides[2] + view.border.left * view.strides[3]
    return pointer(view.buffer, view.offset - inside)


def border_fill(view: View, zero: int) -> str:
    """The C++ statement that fills the border of bytes around ``view``; empty where there is none."""
    return "" if view.border == Border() else f"fill_border(team, {image(view)}, n, {base(view)}, {zero});"
