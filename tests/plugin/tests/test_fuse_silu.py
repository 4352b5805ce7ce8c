"""What fuse-silu rewrites, and what it declines: tests with nothing but ``qfx.testing``."""

from __future__ import annotations

from typing import Any

import torch
from qfx_plugin_example.fuse_silu import FuseSilu
from torch import Tensor, fx, nn

from qfx.meta import graph_info
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(4, 3)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x


class Gate(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return gate * x, gate


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x + 1) * x


def run(model: nn.Module, *passes: Any) -> fx.GraphModule:
    return run_passes(model.eval(), X, "functionalize", "canonicalize", *passes)


def test_a_product_with_the_own_sigmoid() -> None:
    model = nn.Sequential(nn.Linear(3, 2), Swish())
    gm = run(model, FuseSilu())
    assert_graph(gm, """
        %input_1: f32[*, 3] = input
        %_0_weight: f32[2, 3] = @0.weight  {layer 0}
        %_0_bias: f32[2] = @0.bias  {layer 0}
        %linear: f32[*, 2] = linear(%input_1, %_0_weight, %_0_bias)  {layer 0}
        %silu: f32[*, 2] = silu(%linear)  {layer 1}
        return (%silu)
    """)
    assert_same_numerics(model.eval(), gm, X, tolerance=1e-6)
    assert graph_info(gm).notes == (("fuse-silu", "silu of 1 was a sigmoid and a product"),)


def test_a_second_reader_is_declined() -> None:
    gm = run(Gate(), FuseSilu())
    assert_graph(gm, """
        %x: f32[*, 3] = input
        %sigmoid: f32[*, 3] = sigmoid(%x)
        %mul: f32[*, 3] = mul.Tensor(%sigmoid, %x)
        return (%mul, %sigmoid)
    """)
    assert graph_info(gm).notes == (("fuse-silu", "sigmoid-x: sigmoid: it has a second user, the model's output"),)


def test_anothers_sigmoid_is_no_near_miss() -> None:
    gm = run(Other(), FuseSilu())
    assert "silu" not in str(gm.graph) and graph_info(gm).notes == ()
