"""Which operators of a lowered graph have a native form."""

from __future__ import annotations

from torch import fx

from qfx.operators import name_of
from qfx.ops import dequantize, quantize
from qfx.targets.native.crossings import DEQUANTIZE, QUANTIZE
from qfx.targets.native.elementwise import ELEMENTWISE
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.floats import FLOATS
from qfx.targets.native.joins import JOIN
from qfx.targets.native.layers import CONVOLUTION, LINEAR
from qfx.targets.native.moves import MOVES
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.pads import PAD
from qfx.targets.native.points import BINARY, TABLE
from qfx.targets.native.pools import POOL, WINDOWS
from qfx.targets.native.products import PRODUCT
from qfx.targets.native.rolls import ROLL
from qfx.targets.native.weight_only import NativeWeightOnlyLeaf
from qfx.targets.native.weight_only_layer import WEIGHT_ONLY
from qfx.targets.reference import MatmulLeaf
from qfx.targets.x86_point import LoopLeaf, TableLeaf
from qfx.targets.x86_static import StaticLeaf

_LOOPS = {
    **dict.fromkeys(("add", "mul"), BINARY),
    **dict.fromkeys(WINDOWS, POOL),
    **dict.fromkeys(("pad", "constant_pad_nd"), PAD),
}
"""What x86 has C++ loops for, and moves."""


def _nothing(emitter: Emitter, node: fx.Node) -> None:
    raise NotNative(f"{node} has no native form")


NONE = Operator(lambda gm, node: "no native kernel", _nothing)


def operator_of(gm: fx.GraphModule, node: fx.Node) -> Operator:
    """How ``node`` gets into a program; :data:`NONE` where it does not."""
    if node.op == "call_module":
        leaf = gm.get_submodule(str(node.target))
        if isinstance(leaf, StaticLeaf):
            return LINEAR if len(leaf.weight_shape) == 2 else CONVOLUTION
        if isinstance(leaf, NativeWeightOnlyLeaf):
            return WEIGHT_ONLY
        if isinstance(leaf, MatmulLeaf):
            return PRODUCT
        if isinstance(leaf, TableLeaf):
            return TABLE
        return _LOOPS.get(leaf.operator, NONE) if isinstance(leaf, LoopLeaf) else NONE
    if node.target is quantize:
        return QUANTIZE
    if node.target is dequantize:
        return DEQUANTIZE
    name = name_of(node)
    if name in ("cat", "stack"):
        return JOIN
    if name == "roll":
        return ROLL
    return MOVES.get(name) or ELEMENTWISE.get(name) or FLOATS.get(name, NONE)
