"""Pooling over images of integers: the windows are those of :mod:`qfx.kernels`."""

from __future__ import annotations

from typing import Any

from torch import fx

from qfx import kernels
from qfx.meta import value
from qfx.targets.native.copies import image_of
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import number, quantize_to
from qfx.targets.native.images import base, border_fill
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import ELEMENTS
from qfx.targets.native.views import View
from qfx.targets.reference import QParamsBuffers
from qfx.targets.x86_point import LoopLeaf

_Windows = tuple[kernels.Windows, kernels.Windows]


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    if not isinstance(leaf, LoopLeaf) or value(node.args[0]).ndim != 4:  # type: ignore[arg-type]
        return f"no native kernel for {getattr(leaf, 'kernel', leaf)}"
    if leaf.operator != "mean":
        return None
    dims = leaf.named.get("dim") or ()
    over = {d % 4 for d in ((dims,) if isinstance(dims, int) else dims)}
    return None if over == {2, 3} else "no native mean over these axes"


def _ordinary(named: dict[str, Any], sizes: tuple[int, ...], out: tuple[int, ...]) -> _Windows:
    return kernels.pool_windows(
        sizes,
        named["kernel_size"],
        named.get("stride"),
        named.get("padding", 0),
        named.get("dilation", 1),
        named.get("ceil_mode", False),
        named.get("count_include_pad", True),
    )


def _adaptive(named: dict[str, Any], sizes: tuple[int, ...], out: tuple[int, ...]) -> _Windows:
    return kernels.adaptive_windows(sizes[0], out[0]), kernels.adaptive_windows(sizes[1], out[1])


WINDOWS = {"max_pool2d": _ordinary, "avg_pool2d": _ordinary, "adaptive_avg_pool2d": _adaptive, "mean": _adaptive}
"""By the operator: what each output sees, from its arguments and the sizes of input and output."""


def _emit(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    x = image_of(emitter, emitter.view(node.args[0]), str(node))
    element = ELEMENTS[leaf.output.limits["dtype"]]
    flat = len(emitter.size(node)) == 2  # a mean that drops the axes
    out = _as_pixel(emitter.tensor(node, element)) if flat else emitter.image(node, element)
    if leaf.operator != "max_pool2d" and x.sizes[2] * x.sizes[3] > kernels.MOST_SUMMED:
        raise NotNative(f"{node} sums more than int32 holds")
    rows, cols = WINDOWS[leaf.operator](leaf.named, x.sizes[2:], out.sizes[2:])
    fields = [x.sizes[1], len(rows), len(cols), rows.step, cols.step, *(_declared(emitter, w) for w in (rows, cols))]
    steps = ", ".join(f"{{{', '.join(map(str, (v.strides[0], *v.strides[2:])))}}}" for v in (x, out))
    pooling = emitter.program.declare("Pooling", "pool", f"{{{', '.join(map(str, fields))}, {steps}}}")
    emitter.program.headers.add("pool.h")
    call = f"pool(team, {pooling}, n, {_inside(x)}, {_operation(leaf, x, out)});"
    fill = border_fill(out, int(leaf.output.zero_point) & 255)
    emitter.step(f"{fill}\n{call}", [x], [out], node, leaf.operator)


def _declared(emitter: Emitter, windows: kernels.Windows) -> str:
    """The C++ name of a table of windows."""
    table = zip(windows.begin, windows.end, windows.divisor, strict=True)
    rows = ", ".join(f"{{{begin}, {end}, {divisor}}}" for begin, end, divisor in table)
    return emitter.program.declare("Window", "windows", f"[] = {{{rows}}}")


def _operation(leaf: LoopLeaf, x: View, out: View) -> str:
    if leaf.operator == "max_pool2d":
        return f"Max<{x.element}>{{{_inside(out)}}}"
    reader = leaf.inputs[0]
    assert isinstance(reader, QParamsBuffers)
    affine = f"{number(float(reader.scale))}, {int(reader.zero_point)}, {leaf.named.get('divisor_override') or 0}"
    return f"Mean<{x.element}, {out.element}>{{{_inside(out)}, {affine}, {quantize_to(leaf.output)}}}"


def _inside(view: View) -> str:
    """The C++ pointer to position (0, 0), behind the border."""
    return f"{base(view)} + {view.border.top * view.strides[2] + view.border.left * view.strides[3]}"


def _as_pixel(view: View) -> View:
    """``[BATCH, C]`` as an image of one pixel."""
    channels = view.sizes[1]
    return View(view.buffer, (*view.sizes, 1, 1), (view.strides[0], 1, channels, channels), view.offset)


POOL = Operator(_refusal, _emit)
