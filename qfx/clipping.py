"""The share of weights that lie outside the range of their integers, layer by layer: something to log in training."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.ops import fake_quantize
from qfx.roundings import fake_quants
from qfx.trained_fake_quant import TrainedFakeQuantize


def clipped_weights(gm: fx.GraphModule) -> dict[str, float]:
    """Layer → share in [0, 1] of its weights that are clipped, for layers whose range is known."""
    shares: dict[str, float] = {}
    for node, module in fake_quants(gm):
        source = node.args[0]
        if not isinstance(module, TrainedFakeQuantize) or not module.constant or not module.ready or module.dynamic:
            continue
        with torch.no_grad():
            weight, factor = _constant(gm, source), node.kwargs.get("factor")
            plain = module.settled()
            inside = fake_quantize(
                weight if factor is None else weight * _constant(gm, factor),
                plain.scale,
                plain.zero_point,
                plain.axis,
                plain.group_size,
                plain.spec.quant_min,
                plain.spec.quant_max,
            )[1]
        shares[module.layer] = 1.0 - float(inside.double().mean())
    return shares


def _constant(gm: fx.GraphModule, node: object) -> Tensor:
    """The value of a weight or of a batch norm's factor, which inputs do not change."""
    assert isinstance(node, fx.Node)
    if node.op == "get_attr":
        return get_tensor(gm, str(node.target))
    args = [_constant(gm, a) if isinstance(a, fx.Node) else a for a in node.args]
    call = gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    assert callable(call)
    result: Tensor = call(*args, **node.kwargs)
    return result
