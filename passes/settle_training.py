"""Turn a trained graph into the CALIBRATED graph that post-training quantization would have made.

Before::

    %relu_fake_quant = TrainedFakeQuantize<...>(%relu, clamp_min=0.0)       # %relu absorbed
    %weight_fake_quant = TrainedFakeQuantize<...>(%weight, factor=%factor)
    %conv = conv2d(%relu_fake_quant, %weight_fake_quant, %bias)
    %conv_bn = LiveBatchNorm2d<bn1>(%conv)
    %dropout = Dropout<dropout>(%conv_bn)

After::

    %relu_fake_quant = FakeQuantize<...>(%relu)
    %scaled = mul(%weight, @weight_factor)
    %weight_fake_quant = FakeQuantize<...>(%scaled)
    %conv = conv2d(%relu_fake_quant, %weight_fake_quant, @bias_folded)

The integers of a weight stay those of training: where scales are per channel, they take up the batch norm's factor.
Every spec in NodeInfo becomes that of its FakeQuantize, whose bits a schedule may have changed. Nothing is declined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qfx import affine
from qfx.attributes import drop_unused, free_path, set_buffer, set_module
from qfx.fake_quant import FakeQuantize
from qfx.meta import info, set_value, update, value
from qfx.operators import lookup, tensor_inputs
from qfx.ops import fake_quantize
from qfx.passes import batch_norm
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_get, propagate, root_of
from qfx.roundings import fake_quant_of, rounded_by
from qfx.spec import DerivedSpec, QuantSpec, SharedSpec, bias_spec
from qfx.stage import Stage
from qfx.trained_fake_quant import TrainedFakeQuantize
from qfx.training import AttentionMark, BatchNormMark, ClampMark, DetachMark, DropoutMark, DropPathMark
from qfx.training_modules import BatchNormFactor, LiveBatchNorm, channel_factor

aten = torch.ops.aten


@dataclass(frozen=True)
class SettleTraining:
    """Undoes ``follow-training`` and ``absorb-clamps``, and makes every TrainedFakeQuantize a plain one."""

    name: ClassVar[str] = "settle-training"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CALIBRATED, Stage.CALIBRATED)
    writes: ClassVar[frozenset[str]] = frozenset({"mark", "inputs", "output", "bits", "reason"})

    def run(self, gm: fx.GraphModule) -> int:
        count = 0
        for path, module in list(gm.named_modules()):
            if isinstance(module, TrainedFakeQuantize):
                set_module(gm, path, module.settled())
                count += 1
        for node in gm.graph.nodes:
            _say_spec(gm, node)
        for node in list(gm.graph.nodes):
            settle = _SETTLE.get(type(info(node).mark))
            if settle is not None:
                settle(gm, node, info(node).mark)
                count += 1
        for node in gm.graph.nodes:
            _keep_coarse_bias(gm, node)
        return count + drop_unused(gm)


def _say_spec(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let the node's NodeInfo say the specs that its values are rounded with."""
    known = info(node)
    specs = {n: m.spec for n in tensor_inputs(node) if known.inputs and (m := rounded_by(gm, n)) is not None}
    inputs = tuple(
        specs.get(n, spec) if isinstance(spec, QuantSpec) else spec
        for n, spec in zip(tensor_inputs(node), known.inputs, strict=False)
    )
    made = [m.spec for u in node.users if (m := fake_quant_of(gm, u)) is not None]
    output = max(made, key=lambda spec: spec.bits) if made and known.output is not None else known.output
    if isinstance(known.output, SharedSpec) and output is not known.output:
        output = SharedSpec(known.output.position, output)  # type: ignore[arg-type]
    row = lookup(node)
    weight = inputs[1] if row is not None and row.weight is not None and len(inputs) > 1 else None
    bits = weight.bits if known.bits is not None and weight is not None else known.bits
    if (inputs, output, bits) != (known.inputs, known.output, known.bits):
        update(node, inputs=inputs, output=output, bits=bits)
        _say_bias(node)


def _say_bias(node: fx.Node) -> None:
    """The bias follows the bits that weight and data have in the end."""
    row, known = lookup(node), info(node).inputs
    if row is None or row.bias is None or len(known) != 3 or not isinstance(known[1], QuantSpec):
        return
    data = known[0] if isinstance(known[0], QuantSpec) else None
    update(node, inputs=(*known[:2], bias_spec(data, known[1])))


def _keep_coarse_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """Leave a bias float where its step, ``input_scale * weight_scale``, is wide beside a step of the result.

    Learned scales may be far wider than ranges are. A result that stays float has no step: its bias stays float too.
    """
    if not any(isinstance(spec, DerivedSpec) for spec in info(node).inputs):
        return
    data, weight = (rounded_by(gm, n) for n in tensor_inputs(node)[:2])
    assert data is not None and weight is not None
    widest = float((data.scale.max() * weight.scale.max()).abs())
    result = _rounding_behind(gm, node)
    if result is None or widest > COARSEST_BIAS * float(result.scale.min()):
        update(node, inputs=tuple(None if isinstance(spec, DerivedSpec) else spec for spec in info(node).inputs))


def _rounding_behind(gm: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    """What rounds the result of ``node``, or of the operators that a kernel does behind it; the finest of several."""
    while True:
        rounding = [m for u in node.users if (m := fake_quant_of(gm, u)) is not None]
        if rounding:
            return min(rounding, key=lambda m: float(m.scale.min()))
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))


COARSEST_BIAS = 0.5
"""A bias is off by at most half its step: by a quarter of the result's."""


# --- batch norm -------------------------------------------------------------------------------------------------------


def _batch_norm(gm: fx.GraphModule, node: fx.Node, mark: BatchNormMark) -> None:
    module = gm.get_submodule(mark.path)
    assert isinstance(module, LiveBatchNorm)
    if node.op == "call_module":  # one that nothing could take up
        with gm.graph.inserting_before(node):
            paths = (mark.weight, mark.shift, mark.mean, mark.var)
            tensors = [None if p is None else insert_get(gm, p, like=node) for p in paths]
        node.op, node.target = "call_function", aten.batch_norm.default
        node.args = (node.args[0], *tensors, False, 0.0, mark.eps, False)
        update(node, mark=None)
        return
    (live,) = node.users
    affine_map = _affine_map(module)
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    quantizer = fake_quant_of(gm, weight)
    trained = tensor_inputs(weight)
    if quantizer is not None:
        factor = channel_factor(affine_map.scale, *batch_norm.channels(node))
        plain = _take_up(gm, weight, quantizer, factor)
        node.args = (node.args[0], plain, *node.args[2:])
    batch_norm.fold(gm, node, affine_map)
    product = node.args[1]
    assert isinstance(product, fx.Node)
    update(product, reason="a constant")
    if quantizer is not None:
        weight.args = (product,)
        product.append(weight)
        node.args = (node.args[0], weight, *node.args[2:])
        update(node, inputs=(*info(node).inputs[:2], None))
        _say_bias(node)
        erase_dead(gm, *trained)
    update(node, mark=None)
    live.replace_all_uses_with(node)
    gm.graph.erase_node(live)


def _affine_map(module: LiveBatchNorm) -> batch_norm.AffineMap:
    mean, var = module.running_mean, module.running_var
    assert mean is not None and var is not None
    gamma = None if module.weight is None else module.weight.detach().double()
    beta = None if module.bias is None else module.bias.detach().double()
    return batch_norm.affine_of(mean.double(), var.double(), gamma, beta, module.eps)


def _take_up(gm: fx.GraphModule, weight: fx.Node, quantizer: FakeQuantize, factor: Tensor) -> fx.Node:
    """Free the weight's FakeQuantize of its factor; returns the weight that is multiplied with ``factor`` instead.

    A scale for each channel takes up the factor. The weight is then rounded by the scale of training beforehand: its
    extremes lie halfway between two integers, and would be rounded anew, to other ones.
    """
    node, plain = weight.kwargs["factor"], weight.args[0]
    assert isinstance(node, fx.Node) and isinstance(plain, fx.Node)
    module = gm.get_submodule(str(node.target))
    assert isinstance(module, BatchNormFactor)
    if module.sign_only:
        signs = torch.where(factor < 0, -1.0, 1.0).to(torch.float32)
        layout = (quantizer.axis, quantizer.group_size, quantizer.spec.quant_min, quantizer.spec.quant_max)
        floats = evaluate(gm, plain)
        rounded = fake_quantize(floats * signs.to(floats.dtype), quantizer.scale, quantizer.zero_point, *layout)[0]
        plain = _replaced(gm, weight, plain, rounded * signs.to(floats.dtype))
        channels = factor.abs().flatten()
        shape = [1] * quantizer.scale.ndim
        shape[0 if quantizer.scale.ndim == 1 else module.axis] = -1
        scale = (quantizer.scale * channels.reshape(shape)).float().clamp_min(affine.MIN_SCALE)
        quantizer.scale = affine.representable_scale(scale, quantizer.spec.scale_dtype)
    weight.kwargs = {}
    erase_dead(gm, node)
    return plain


def _replaced(gm: fx.GraphModule, reader: fx.Node, constant: fx.Node, tensor: Tensor) -> fx.Node:
    """``tensor`` in the place of ``constant``: under its name, where ``reader`` is the only one of it."""
    path = str(root_of(constant).target)
    gets = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == path]
    if gets == [constant] and list(constant.users) == [reader]:
        set_buffer(gm, path, tensor)
        return constant
    with gm.graph.inserting_before(reader):
        return insert_buffer(gm, free_path(gm, f"{path}_rounded"), tensor, like=constant)


# --- the rest ---------------------------------------------------------------------------------------------------------


def _identity(gm: fx.GraphModule, node: fx.Node, mark: Any) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)


def _attention(gm: fx.GraphModule, node: fx.Node, mark: AttentionMark) -> None:
    node.op, node.target = "call_function", aten.scaled_dot_product_attention.default
    update(node, mark=None)


def _clamp(gm: fx.GraphModule, node: fx.Node, mark: ClampMark) -> None:
    (quantizer,) = node.users
    node.op, node.target = "call_function", getattr(aten, mark.operator).default
    set_value(node, propagate(node.target, node.args, node.kwargs) if value(node) is None else value(node))
    quantizer.kwargs = {k: v for k, v in quantizer.kwargs.items() if not k.startswith("clamp_")}
    update(node, mark=None)


_SETTLE: dict[type, Callable[[fx.GraphModule, fx.Node, Any], None]] = {
    BatchNormMark: _batch_norm,
    DropoutMark: _identity,
    DropPathMark: _identity,
    DetachMark: _identity,
    AttentionMark: _attention,
    ClampMark: _clamp,
}
