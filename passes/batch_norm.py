"""What the three folding passes share: the constants of a batch norm, and the affine map that it is in inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qfx.attributes import free_path
from qfx.meta import value
from qfx.operators import argument, is_constant, lookup
from qfx.patterns import NoMatch
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, root_of
from qfx.training_modules import channel_factor

NAMES = "batch_norm _native_batch_norm_legit_no_training"


@dataclass(frozen=True)
class AffineMap:
    """``y = x * scale + shift`` by channel, both float64 ``[C]``."""

    scale: Tensor
    shift: Tensor


def why_not_affine(node: fx.Node) -> NoMatch | None:
    """A NoMatch where the batch norm is not a constant affine map: live statistics, or computed constants."""
    if argument(node, 5, "training", False) is True:
        return NoMatch("it normalises by the statistics of the batch", node)
    constants = node.args[1:5]
    if constants[2] is None or constants[3] is None:
        return NoMatch("it has no running statistics", node)
    if not all(c is None or (isinstance(c, fx.Node) and is_constant(c)) for c in constants):
        return NoMatch("its constants are computed from inputs", node)
    return None


def affine_map(gm: fx.GraphModule, node: fx.Node) -> AffineMap:
    """Ioffe & Szegedy, 2015: ``(x - mean) / sqrt(var + eps) * gamma + beta`` as one scale and one shift."""
    gamma, beta, mean, var = (evaluate(gm, c).double() if isinstance(c, fx.Node) else None for c in node.args[1:5])
    assert mean is not None and var is not None
    return affine_of(mean, var, gamma, beta, argument(node, 7, "eps", 1e-5))


def affine_of(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> AffineMap:
    """The map of these constants, each float64 ``[C]``."""
    scale = torch.rsqrt(var + eps)
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return AffineMap(scale, shift if beta is None else shift + beta)


def channels(compute: fx.Node) -> tuple[tuple[int, ...], int, int]:
    """The weight's shape, which of its axes is the output channels, and the groups: see ``channel_factor``."""
    row, weight = lookup(compute), compute.args[1]
    assert row is not None and isinstance(weight, fx.Node)
    groups = argument(compute, 6, "groups", 1) if row.channel_axis == 1 else 1
    return tuple(value(weight).shape), row.channel_axis, groups


def fold(gm: fx.GraphModule, compute: fx.Node, affine: AffineMap) -> None:
    """Let ``compute`` do the map behind it too: scale its weight's output channels, move the shift into its bias."""
    bias, shift = argument(compute, 2, "bias"), affine.shift
    if bias is not None:
        shift = shift + evaluate(gm, bias).double() * affine.scale
    absorb(gm, compute, channel_factor(affine.scale, *channels(compute)), shift)


def absorb(gm: fx.GraphModule, compute: fx.Node, factor: Tensor, bias: Tensor) -> None:
    """Scale the weight of ``compute`` by ``factor``, which broadcasts against it, and give it a new ``bias``.

    The product stays in the graph, ``mul(@weight, @weight_factor)``: no second copy of the float weights is held, tied
    readers keep theirs, and ``fold-weights`` evaluates it when the weight becomes integers.
    """
    weight = compute.args[1]
    assert isinstance(weight, fx.Node)
    old_bias = argument(compute, 2, "bias")
    root = root_of(weight)
    dtype = evaluate(gm, root).dtype
    base = str(root.target).rpartition(".")[0]
    prefix = f"{base}." if base else f"{compute.name}_"
    with gm.graph.inserting_before(compute):
        path = free_path(gm, f"{prefix}weight_factor")
        scale = insert_buffer(gm, path, factor.to(dtype), like=compute)
        scaled = insert_call(gm, torch.ops.aten.mul.Tensor, weight, scale, like=weight)
        new_bias = insert_buffer(gm, free_path(gm, f"{prefix}bias_folded"), bias.to(dtype), like=compute)
    compute.args = (compute.args[0], scaled, new_bias, *compute.args[3:])
    if isinstance(old_bias, fx.Node):
        erase_dead(gm, old_bias)
