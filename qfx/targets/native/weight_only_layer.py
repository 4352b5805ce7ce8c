"""Linear layers with narrow weights on floats, as steps of a program."""

from __future__ import annotations

import torch
from torch import fx

from qfx.meta import value
from qfx.targets.native.emitter import Emitter, Operator
from qfx.targets.native.epilogues import number
from qfx.targets.native.floats import dense
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.program import pointer
from qfx.targets.native.views import View, numel
from qfx.targets.native.weight_only import NativeWeightOnlyLeaf, library
from qfx.targets.native.weight_only_packing import PackedWeight


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    leaf = gm.get_submodule(str(node.target))
    assert isinstance(leaf, NativeWeightOnlyLeaf)
    if not leaf.packs:
        return "these scales have no native layout"
    return None if value(node).dtype == torch.float32 else "native programs compute such layers in float32"


def _emit(emitter: Emitter, node: fx.Node) -> None:
    leaf = emitter.module(node)
    x = dense(emitter, node.args[0], node)
    packed: PackedWeight = leaf.packed()
    out = emitter.tensor(node, "float")
    program = emitter.program
    program.headers.add("weight_only.h")
    bias = "nullptr" if leaf.bias is None else program.constant(leaf.bias.float())
    zero = "nullptr" if packed.zero is None else program.constant(packed.zero)
    sizes = f"{packed.in_features}, {packed.out_features}, {packed.group}, {packed.bits}"
    parts = f"{program.constant(packed.weight)}, {program.constant(packed.scale)}, {zero}, {number(packed.middle)}"
    layer = f"const weight_only::Layer layer{{{sizes}, {parts}, {bias}}};"
    arranged = _arranged(emitter, node, packed, x, layer)
    rows = numel(x.sizes) // packed.in_features
    data = pointer(arranged.buffer)
    code = f"{layer}\nweight_only::multiply(team, layer, {data}, n * {rows}, {pointer(out.buffer)});"
    macs = rows * packed.in_features * packed.out_features
    emitter.step(code, [arranged], [out], node, f"linear on int{packed.bits} weights", macs=macs)


def _arranged(emitter: Emitter, node: fx.Node, packed: PackedWeight, x: View, layer: str) -> View:
    """The data in the order in which the kernel reads them; layers that read the same share them."""
    key = (x.buffer, packed.in_features, packed.group, packed.bits, packed.zero is None)
    if key not in emitter.arranged:
        kernel = library()
        if kernel is None:
            raise NotNative("there is no compiler")
        rows = numel(x.sizes) // packed.in_features
        floats = kernel.qfx_weight_only_scratch(packed.in_features, packed.group, packed.bits) * rows
        made = emitter.arranged[key] = emitter.program.tensor("float", (x.sizes[0], floats))
        code = f"{layer}\nweight_only::arrange(team, layer, {pointer(x.buffer)}, n * {rows}, {pointer(made.buffer)});"
        emitter.step(code, [x], [made], node, "arrange")
    return emitter.arranged[key]


WEIGHT_ONLY = Operator(_refusal, _emit, by_row=True)
