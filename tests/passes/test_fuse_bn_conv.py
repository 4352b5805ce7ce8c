"""A batch norm disappears into the convolution or linear layer behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.meta import graph_info
from qfx.operators import name_of
from qfx.passes import Canonicalize, FuseBnConv
from qfx.testing import assert_graph, assert_same_numerics, run_passes

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PASSES = (Canonicalize(), FuseBnConv())


def settled(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def layers(self, x):
    return self.layer(self.bn(x))


def names(gm: Any) -> list[str]:
    return [name_of(n) for n in gm.graph.nodes]


def test_golden(net) -> None:
    gm = run_passes(net(layers, layer=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(4)), torch.randn(2, 4, 5, 5), *PASSES)
    assert_graph(gm, """
        %x: f32[*, 4, 5, 5] = input
        %layer_weight: f32[6, 4, 3, 3] = @layer.weight  {layer layer}
        %layer_weight_factor: f32[1, 4, 1, 1] = @layer.weight_factor  {layer layer}
        %mul_tensor: f32[6, 4, 3, 3] = mul.Tensor(%layer_weight, %layer_weight_factor)  {layer layer}
        %layer_bias_folded: f32[6] = @layer.bias_folded  {layer layer}
        %conv2d: f32[*, 6, 3, 3] = conv2d(%x, %mul_tensor, %layer_bias_folded)  {layer layer}
        return (%conv2d)
    """)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("groups", "bias", "affine"), [(1, True, True), (2, False, True), (4, True, False)])
def test_numerics(net, dims: int, groups: int, bias: bool, affine: bool) -> None:
    conv = CONV[dims](4, 8, 3, stride=2, groups=groups, bias=bias)
    model = net(layers, layer=conv, bn=settled(NORM[dims](4, affine=affine)))
    x = torch.randn(2, 4, *[5] * dims)
    gm = run_passes(model, x, *PASSES)
    assert "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, x, tolerance=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_numerics_of_linear(net, bias: bool) -> None:
    model = net(layers, layer=nn.Linear(4, 6, bias=bias), bn=settled(nn.BatchNorm1d(4)))
    x = torch.randn(3, 4)
    gm = run_passes(model, x, *PASSES)
    assert "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, x, tolerance=1e-5)


def padded(self, x):
    return F.conv2d(self.bn(x), self.weight, padding=1)


def two_readers(self, x):
    y = self.bn(x)
    return F.conv2d(y, self.weight) + y.mean()


def computed(self, x):
    return F.conv2d(self.bn(x), self.weight * x.mean())


def by_batch(self, x):
    return F.conv2d(F.batch_norm(x, None, None, training=True), self.weight)


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (padded, "bn-conv: conv2d: its zero padding comes behind the batch norm's shift"),
        (two_readers, "bn-conv: batch_norm: it has a second user, mean"),
        (computed, "bn-conv: conv2d: its weight or bias is computed from inputs"),
        (by_batch, "bn-conv: batch_norm: it normalises by the statistics of the batch"),
    ],
)
def test_declines(net, forward: Any, note: str) -> None:
    model = net(forward, bn=settled(nn.BatchNorm2d(4)), weight=nn.Parameter(torch.randn(6, 4, 3, 3)))
    gm = run_passes(model, torch.randn(2, 4, 5, 5), *PASSES)
    assert ("not fused", note) in graph_info(gm).notes
    assert "batch_norm" in names(gm)


def test_declines_linear_layers_on_more_than_two_dimensions(net) -> None:
    model, x = net(layers, layer=nn.Linear(4, 6), bn=settled(nn.BatchNorm1d(5))), torch.randn(2, 5, 4)
    gm = run_passes(model, x, *PASSES)
    note = "bn-conv: linear: batch norm's channels are not the linear layer's features"
    assert graph_info(gm).notes == (("not fused", note),)
    assert_same_numerics(model, gm, x)
