"""A batch norm disappears into the convolution before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.meta import graph_info
from qfx.operators import name_of
from qfx.passes import Canonicalize, Functionalize, FuseConvBn
from qfx.testing import assert_graph, assert_same_numerics, run_passes

PASSES = (Functionalize(), Canonicalize(), FuseConvBn())
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def settled(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics and parameters as after training, one gamma zero and one negative."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight[0] = 0.0
            norm.weight[-1] = -1.5
    return norm


def example(dims: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *[5] * dims)


def names(gm: Any) -> list[str]:
    return [name_of(n) for n in gm.graph.nodes if n.op == "call_function"]


def test_golden(net) -> None:
    model = net(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    gm = run_passes(model, example(2), *PASSES)
    assert_graph(gm, """
        %x: f32[*, 4, 5, 5] = input
        %conv_weight: f32[6, 4, 3, 3] = @conv.weight  {layer conv}
        %conv_weight_factor: f32[6, 1, 1, 1] = @conv.weight_factor  {layer conv}
        %mul_tensor: f32[6, 4, 3, 3] = mul.Tensor(%conv_weight, %conv_weight_factor)  {layer conv}
        %conv_bias_folded: f32[6] = @conv.bias_folded  {layer conv}
        %conv2d: f32[*, 6, 3, 3] = conv2d(%x, %mul_tensor, %conv_bias_folded)  {layer conv}
        return (%conv2d)
    """)
    assert graph_info(gm).notes == ()


CASES = [
    pytest.param(kind, dims, groups, bias, affine, id=f"{kind[1].__name__} groups {groups} bias {bias} affine {affine}")
    for kind in (CONV, TRANSPOSED)
    for dims, groups, bias, affine in (
        (1, 1, True, True),
        (1, 2, False, True),
        (2, 1, False, False),
        (2, 2, True, True),
        (2, 4, False, True),  # depthwise
        (3, 1, True, False),
        (3, 2, False, True),
    )
]


@pytest.mark.parametrize(("kind", "dims", "groups", "bias", "affine"), CASES)
def test_numerics(net, kind: Any, dims: int, groups: int, bias: bool, affine: bool) -> None:
    model = net(
        lambda self, x: self.bn(self.conv(x)),
        conv=kind[dims](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias),
        bn=settled(NORM[dims](8, eps=0.1, affine=affine)),
    )
    gm = run_passes(model, example(dims), *PASSES)
    assert "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, example(dims), tolerance=1e-5)


def test_two_batch_norms_and_one_weight(net) -> None:
    """Tied readers of the weight keep theirs: each convolution gets a factor of its own."""

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn2(F.conv2d(x, self.conv.weight)) + self.conv(x * 2)

    parts = {"conv": nn.Conv2d(4, 6, 3), "bn": settled(nn.BatchNorm2d(6)), "bn2": settled(nn.BatchNorm2d(6))}
    model = net(forward, **parts)
    before = model.conv.weight.detach().clone()
    gm = run_passes(model, example(2), *PASSES)
    assert names(gm).count("mul") == 3 and "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, example(2), tolerance=1e-5)
    assert torch.equal(model.conv.weight, before)


def test_a_shared_batch_norm(net) -> None:
    parts = {"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(4, 6, 3), "bn": settled(nn.BatchNorm2d(6))}
    model = net(lambda self, x: self.bn(self.a(x)) * self.bn(self.b(x)), **parts)
    gm = run_passes(model, example(2), *PASSES)
    assert "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, example(2), tolerance=1e-5)


def test_two_batch_norms_in_a_row(net) -> None:
    parts = {"conv": nn.Conv2d(4, 6, 3), "bn": settled(nn.BatchNorm2d(6)), "bn2": settled(nn.BatchNorm2d(6))}
    model = net(lambda self, x: self.bn2(self.bn(self.conv(x))), **parts)
    gm = run_passes(model, example(2), *PASSES)
    assert "batch_norm" not in names(gm)
    assert_same_numerics(model, gm, example(2), tolerance=1e-5)


def test_keeps_the_dtype(net) -> None:
    model = net(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=settled(nn.BatchNorm2d(6)))
    model = model.to(torch.bfloat16)
    gm = run_passes(model, example(2).bfloat16(), *PASSES)
    assert_same_numerics(model, gm, example(2).bfloat16(), tolerance=0.02)


def second_reader(self, x):
    y = self.conv(x)
    return self.bn(y) + y


def output_reader(self, x):
    y = self.conv(x)
    return self.bn(y), y


def computed_weight(self, x):
    return self.bn(F.conv2d(x, self.conv.weight * x.mean()))


def computed_bias(self, x):
    return self.bn(F.conv2d(x, self.conv.weight, x.mean((0, 2, 3)).repeat(2)[:6]))


def batch_statistics(self, x):
    return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, training=True)


def no_statistics(self, x):
    return F.batch_norm(self.conv(x), None, None, training=True)


def computed_statistics(self, x):
    return F.batch_norm(self.conv(x), x.mean((0, 2, 3)).repeat(2)[:6], self.bn.running_var)


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (second_reader, "conv-bn: conv2d: it has a second user, add"),
        (output_reader, "conv-bn: conv2d: it has a second user, the model's output"),
        (computed_weight, "conv-bn: conv2d: its weight is computed from inputs"),
        (computed_bias, "conv-bn: conv2d: its bias is computed from inputs"),
        (batch_statistics, "conv-bn: batch_norm: it normalises by the statistics of the batch"),
        (no_statistics, "conv-bn: batch_norm: it normalises by the statistics of the batch"),
        (computed_statistics, "conv-bn: batch_norm: its constants are computed from inputs"),
    ],
)
def test_declines(net, forward: Any, note: str) -> None:
    gm = run_passes(net(forward, conv=nn.Conv2d(4, 6, 3), bn=settled(nn.BatchNorm2d(6))), example(2), *PASSES)
    assert ("not fused", note) in graph_info(gm).notes
    assert "batch_norm" in names(gm)
