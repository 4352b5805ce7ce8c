"""Put a FakeQuantize on every annotated edge, one module per share group.

Before::

    %conv = conv2d(%x, %weight)       {in uint8 ..., int8 ...; out uint8 ...}
    %ln = layer_norm(%x)

After::

    %x_fake_quant = FakeQuantize<fake_quant.x>(%x)
    %weight_fake_quant = FakeQuantize<fake_quant.weight>(%weight)
    %conv = conv2d(%x_fake_quant, %weight_fake_quant)
    %conv_fake_quant = FakeQuantize<fake_quant.conv>(%conv)
    %ln = layer_norm(%x)

A value that a float operator makes stays as it is for float readers. A value that an integer kernel makes is rounded
for all of them: they cost one dequantize and nothing else. Nothing is declined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qfx import affine
from qfx.attributes import free_path, set_module
from qfx.fake_quant import FakeQuantize
from qfx.meta import describe, info, value
from qfx.operators import is_constant, tensor_inputs
from qfx.rewrite import root_of
from qfx.spec import FixedSpec, QuantSpec
from qfx.stage import Stage
from qfx.trained_fake_quant import TrainedFakeQuantize


@dataclass(frozen=True)
class InsertObservers:
    """Inserts ``fake_quant.<group>`` modules; several specs of one value get modules of their own.

    ``training``: the modules are those of quantization-aware training.
    """

    training: bool = False

    name: ClassVar[str] = "insert-observers"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.ANNOTATED, Stage.PREPARED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        edges = wanted_edges(gm)
        modules: dict[tuple[str, QuantSpec | FixedSpec], str] = {}
        for source, by_spec in edges.items():
            inserted = self._insert_all(gm, source, list(by_spec), modules)
            for spec, readers in by_spec.items():
                for reader, position in readers:
                    _redirect(reader, position, inserted[spec])
            if info(source).output is not None:
                widest = inserted[max(inserted, key=lambda spec: spec.bits)]
                others = [u for u in source.users if u not in inserted.values()]
                for reader in others:
                    reader.replace_input_with(source, widest)
        return len(edges)

    def _insert_all(self, gm: fx.GraphModule, source: fx.Node, specs: list[Rounding], modules: Modules) -> Inserted:
        """One call for each spec. Where a kernel makes the value, narrower integers are made of its widest ones."""
        inserted: Inserted = {}
        widest = None
        for spec in sorted(specs, key=lambda spec: -spec.bits):
            inserted[spec] = _insert(gm, source, spec, modules, widest or source, self.training)
            if info(source).output is not None and widest is None:
                widest = inserted[spec]
        return inserted


Rounding = QuantSpec | FixedSpec
Inserted = dict[Rounding, fx.Node]
Modules = dict[tuple[str, Rounding], str]
Edges = dict[fx.Node, dict[QuantSpec | FixedSpec, list[tuple[fx.Node, int]]]]


def wanted_edges(gm: fx.GraphModule) -> Edges:
    """For every value that is quantized: who asks for it with which spec, at which tensor input."""
    edges: Edges = {}
    for node in gm.graph.nodes:
        for position, spec in enumerate(info(node).inputs):
            source = tensor_inputs(node)[position]
            if isinstance(spec, QuantSpec | FixedSpec) and isinstance(value(source), torch.Tensor | None):
                edges.setdefault(source, {}).setdefault(spec, []).append((node, position))
    return edges


def _insert(
    gm: fx.GraphModule, source: fx.Node, spec: Rounding, modules: Modules, read: fx.Node, training: bool
) -> fx.Node:
    """Round ``read``, which is ``source`` or what was made of it with more bits."""
    shared = "" if is_constant(source) else info(source).group
    key = (shared or source.name, spec)
    if key not in modules:
        name = root_of(source).name if is_constant(source) else key[0]
        modules[key] = free_path(gm, f"fake_quant.{name}")
        layer = info(source).origin or source.name
        set_module(gm, modules[key], _trained(spec, layer, source) if training else FakeQuantize(spec, layer))
    with gm.graph.inserting_after(read):
        node = gm.graph.create_node("call_module", modules[key], (read,), {}, name=f"{source.name}_fake_quant")
    node.meta.update(describe(source))
    return node


def _trained(spec: Rounding, layer: str, source: fx.Node) -> TrainedFakeQuantize:
    """A module whose buffers have their final shape; a scale that is found at run time has none."""
    static = isinstance(spec, QuantSpec) and not spec.dynamic
    shape = affine.scale_shape(value(source), *spec.granularity.layout()) if static else []  # type: ignore[union-attr]
    return TrainedFakeQuantize(spec, layer, shape=tuple(shape), constant=is_constant(source))


def _redirect(reader: fx.Node, position: int, new: fx.Node) -> None:
    """Replace only the tensor input ``position`` of ``reader``: one node may stand at several with other specs."""
    seen = -1

    def swap(old: fx.Node) -> fx.Node:
        nonlocal seen
        seen += 1
        return new if seen == position else old

    reader.args, reader.kwargs = fx.map_arg((reader.args, reader.kwargs), swap)
