"""Replace every FakeQuantize by explicit quantize and dequantize operators with constant parameters.

Before::

    %x_fake_quant = FakeQuantize<fake_quant.x>(%x)
    %conv = conv2d(%x_fake_quant, %weight_fake_quant, %bias)

After::

    %x_quantize = qfx.quantize(%x, @x_scale, @x_zero_point, ..., 0, 255, u8)
    %x_dequantize = qfx.dequantize(%x_quantize, @x_scale, @x_zero_point, ...)
    %bias_dequantize = qfx.dequantize(@bias_int32, @bias_scale, ...)
    %conv = conv2d(%x_dequantize, %weight_dequantize, %bias_dequantize)

A dynamic spec chooses its parameters in the graph, by ``qfx.choose_qparams``. A bias becomes int32 at ``input_scale *
weight_scale`` (Jacob et al., 2018, section 2.4); where it would not fit, the weight's scale of that channel grows until
it does, which happens only where the weights are below the bias' own rounding error. Weight-only layers, layers of few
bits, and those whose scale would have to leave float16, which their spec asks for, keep a float bias. Declines, with an
error that names the layer, when an observer has seen nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qfx import affine
from qfx.attributes import free_path, set_buffer
from qfx.errors import CalibrationError
from qfx.fake_quant import FakeQuantize
from qfx.operators import argument, lookup, tensor_inputs
from qfx.ops import choose_qparams, dequantize, quantize
from qfx.passes.annotate import specs
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, insert_get, replace_all
from qfx.roundings import fake_quant_of
from qfx.spec import DerivedSpec, QuantSpec, Scheme
from qfx.stage import Stage

LARGEST_BIAS = 2.0**30


@dataclass(frozen=True)
class Convert:
    """Weights first, then biases, then activations, so that a bias can widen its weight's scale."""

    name: ClassVar[str] = "convert"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CONVERTED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        nodes = [n for n in gm.graph.nodes if fake_quant_of(gm, n) is not None]
        for node in nodes:
            _check_calibrated(gm, node)
        found = [_bias_of(gm, n, i) for n in gm.graph.nodes for i, spec in specs(n) if isinstance(spec, DerivedSpec)]
        biases = [bias for bias in found if bias is not None and _fits(bias)]
        for bias in biases:  # all scales before the first bias: layers may share one weight
            bias.weight.scale = _fitting(bias)
        for bias in biases:
            _convert_bias(gm, bias)
        params: dict[FakeQuantize, tuple[str, str]] = {}
        for node in nodes:
            _convert(gm, node, params)
        return len(nodes)


def _check_calibrated(gm: fx.GraphModule, node: fx.Node) -> None:
    module = fake_quant_of(gm, node)
    if module is not None and module.scale.numel() == 0 and not module.dynamic:
        raise CalibrationError("this layer was never calibrated", where=module.layer, hint="run qfx.calibrate first")


def _convert(gm: fx.GraphModule, node: fx.Node, params: dict[FakeQuantize, tuple[str, str]]) -> None:
    module, source = fake_quant_of(gm, node), node.args[0]
    assert module is not None and isinstance(source, fx.Node)
    spec = module.spec
    layout = (module.axis, module.group_size)
    with gm.graph.inserting_before(node):
        if module.dynamic:
            assert isinstance(spec, QuantSpec)
            symmetric = spec.scheme is Scheme.SYMMETRIC
            limits = (spec.quant_min, spec.quant_max)
            chosen = insert_call(gm, choose_qparams, source, *layout, symmetric, *limits, like=source)
            scale, zero_point = (_item(gm, chosen, i) for i in range(2))
        else:
            if module not in params:
                params[module] = _register(gm, node, module)
            scale, zero_point = (insert_get(gm, path, like=source) for path in params[module])
        q = insert_call(
            gm, quantize, source, scale, zero_point, *layout, spec.quant_min, spec.quant_max, spec.element.dtype,
            like=source, name=f"{source.name}_quantize",
        )  # fmt: skip
        dtype = _dtype(source)
        back = insert_call(
            gm, dequantize, q, scale, zero_point, *layout, dtype, like=source, name=f"{source.name}_dequantize"
        )
    replace_all(node, back)
    gm.graph.erase_node(node)


def _dtype(source: fx.Node) -> torch.dtype:
    val = source.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else torch.float32


def _item(gm: fx.GraphModule, chosen: fx.Node, index: int) -> fx.Node:
    return insert_call(gm, operator.getitem, chosen, index, like=chosen)


def _register(gm: fx.GraphModule, node: fx.Node, module: FakeQuantize) -> tuple[str, str]:
    """Buffers for the module's scale and zero point, named after the group."""
    name = str(node.target).removeprefix("fake_quant.")
    paths = free_path(gm, f"{name}_scale"), free_path(gm, f"{name}_zero_point")
    for path, tensor in zip(paths, (module.scale, module.zero_point), strict=True):
        set_buffer(gm, path, tensor.clone())
    return paths


# --- biases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bias:
    """The float32 bias ``[C]`` of the layer ``node``, with what quantizes the layer's data and weight."""

    node: fx.Node
    source: fx.Node
    values: Tensor
    groups: int
    data: FakeQuantize
    weight: FakeQuantize


def _bias_of(gm: fx.GraphModule, node: fx.Node, position: int) -> _Bias | None:
    """The bias at tensor input ``position``; None where there is no one scale per output channel: it stays float."""
    row = lookup(node)
    assert row is not None and row.weight is not None
    data, weight, source = node.args[0], node.args[row.weight], tensor_inputs(node)[position]
    assert isinstance(data, fx.Node) and isinstance(weight, fx.Node)
    of_data, of_weight = fake_quant_of(gm, data), fake_quant_of(gm, weight)
    if of_data is None or of_weight is None or of_data.scale.ndim != 0 or of_weight.scale.ndim > 1:
        return None
    groups = argument(node, 6, "groups", 1) if row.channel_axis == 1 else 1
    return _Bias(node, source, evaluate(gm, source).float(), groups, of_data, of_weight)


def _convert_bias(gm: fx.GraphModule, bias: _Bias) -> None:
    node, source, values = bias.node, bias.source, bias.values
    row = lookup(node)
    assert row is not None and row.bias is not None
    scale = (bias.data.scale * bias.weight.scale).expand(values.numel() // bias.groups).repeat(bias.groups)
    integers = torch.round(values.double() / scale.double()).to(torch.int32)
    zero_point = torch.zeros_like(integers)
    with gm.graph.inserting_before(node):
        paths = [free_path(gm, f"{node.name}_bias_{what}") for what in ("int32", "scale", "zero_point")]
        constants = [
            insert_buffer(gm, path, tensor, like=source)
            for path, tensor in zip(paths, (integers, scale, zero_point), strict=True)
        ]
        back = insert_call(gm, dequantize, *constants, 0, None, _dtype(source), like=source)
    args: list[Any] = list(node.args)
    args[row.bias] = back
    node.args = tuple(args)
    erase_dead(gm, source)


def _needed(bias: _Bias) -> Tensor:
    """The least scales of the weight at which the bias stays within int32, one a channel of its groups."""
    return bias.values.abs().reshape(bias.groups, -1).amax(0) / (LARGEST_BIAS * bias.data.scale)


def _fits(bias: _Bias) -> bool:
    return not bool((_needed(bias) > torch.finfo(bias.weight.spec.scale_dtype).max).any())


def _fitting(bias: _Bias) -> Tensor:
    """The weight's scale, raised where ``bias / (input_scale * weight_scale)`` would leave int32."""
    needed, scale = _needed(bias), bias.weight.scale
    raised = torch.maximum(scale, needed.amax() if scale.ndim == 0 else needed)
    return affine.representable_scale(raised, bias.weight.spec.scale_dtype)
