"""A batch norm disappears into the linear layer before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qfx.meta import graph_info
from qfx.operators import name_of
from qfx.passes import Canonicalize, FuseLinearBn
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def settled(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def layers(self, x):
    return self.bn(self.fc(x))


def test_golden(net) -> None:
    gm = run_passes(net(layers, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)), X, Canonicalize(), FuseLinearBn())
    assert_graph(gm, """
        %x: f32[*, 4] = input
        %fc_weight: f32[6, 4] = @fc.weight  {layer fc}
        %fc_weight_factor: f32[6, 1] = @fc.weight_factor  {layer fc}
        %mul_tensor: f32[6, 4] = mul.Tensor(%fc_weight, %fc_weight_factor)  {layer fc}
        %fc_bias_folded: f32[6] = @fc.bias_folded  {layer fc}
        %linear: f32[*, 6] = linear(%x, %mul_tensor, %fc_bias_folded)  {layer fc}
        return (%linear)
    """)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_numerics(net, bias: bool, affine: bool) -> None:
    model = net(layers, fc=nn.Linear(4, 6, bias=bias), bn=settled(nn.BatchNorm1d(6, affine=affine)))
    gm = run_passes(model, X, Canonicalize(), FuseLinearBn())
    assert "batch_norm" not in [name_of(n) for n in gm.graph.nodes]
    assert_same_numerics(model, gm, X, tolerance=1e-5)


def test_folds_into_a_product_with_a_parameter(net) -> None:
    model = net(lambda self, x: self.bn(x @ self.w), w=nn.Parameter(torch.randn(4, 6)), bn=settled(nn.BatchNorm1d(6)))
    gm = run_passes(model, X, Canonicalize(), FuseLinearBn())
    assert "batch_norm" not in [name_of(n) for n in gm.graph.nodes]
    assert_same_numerics(model, gm, X, tolerance=1e-5)


def test_declines_more_than_two_dimensions(net) -> None:
    x = torch.randn(2, 5, 4)
    model = net(layers, fc=nn.Linear(4, 6), bn=settled(nn.BatchNorm1d(5)))
    gm = run_passes(model, x, Canonicalize(), FuseLinearBn())
    note = "linear-bn: batch_norm: batch norm's channels are not the linear layer's features"
    assert graph_info(gm).notes == (("not fused", note),)
    assert_same_numerics(model, gm, x)


def test_declines_a_second_reader(net) -> None:
    def forward(self, x):
        y = self.fc(x)
        return self.bn(y) + y

    gm = run_passes(net(forward, fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)), X, Canonicalize(), FuseLinearBn())
    assert graph_info(gm).notes == (("not fused", "linear-bn: linear: it has a second user, add"),)
