"""Weights become integers at compile time."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.attributes import exists, get_tensor
from qfx.ops import quantize
from qfx.passes import Convert, FoldWeights
from qfx.passes.fold_weights import ZeroFilterWarning
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.testing import assert_graph, assert_same_numerics

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def folded(gm: fx.GraphModule, x: torch.Tensor = X) -> fx.GraphModule:
    """Convert, then fold; the second changes no number."""
    run_pass(Convert(), gm)
    before = gm(x)
    run_pass(FoldWeights(), gm)
    assert_same_numerics(lambda x: before, gm, x, tolerance=1e-6)
    return gm


def test_golden_8_bits(net, calibrated) -> None:
    gm = folded(calibrated(net(lambda self, x: self.a(x), a=nn.Conv2d(4, 5, 1, bias=False)), X, Recipe.int8()))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %x_dequantize: f32[*, 4, 6, 6] = qfx.dequantize(%x_quantize, %x_scale, %x_zero_point, None, None, f32)
        %a_weight_scale: f32[5] = @a_weight_scale
        %a_weight_zero_point: i32[5] = @a_weight_zero_point
        %a_weight_1: i8[5, 4, 1, 1] = @a.weight
        %a_weight_dequantize: f32[5, 4, 1, 1] = qfx.dequantize(%a_weight_1, %a_weight_scale, %a_weight_zero_point, 0, None, f32)
        %conv2d: f32[*, 5, 6, 6] = conv2d(%x_dequantize, %a_weight_dequantize)
        return (%conv2d)
    """, with_info=False)
    assert gm.get_buffer("a.weight").dtype == torch.int8


def test_golden_4_bits(net, calibrated) -> None:
    gm = folded(calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.w4a16(32)), ROWS)
    assert_graph(gm, """
        %x: f32[*, 3, 4] = input
        %fc_weight_scale: f32[5, 1] = @fc_weight_scale
        %fc_weight_zero_point: i32[5, 1] = @fc_weight_zero_point
        %fc_weight_packed: u8[5, 2] = @fc.weight_packed
        %unpack_default: i8[5, 4] = qfx.unpack(%fc_weight_packed, 4, True, 4)
        %fc_weight_dequantize: f32[5, 4] = qfx.dequantize(%unpack_default, %fc_weight_scale, %fc_weight_zero_point, -1, 32, f32)
        %fc_bias: f32[5] = @fc.bias
        %linear: f32[*, 3, 5] = linear(%x, %fc_weight_dequantize, %fc_bias)
        return (%linear)
    """, with_info=False)
    assert not exists(gm, "fc.weight") and exists(gm, "fc.bias")


def test_golden_narrow_convolution(net, calibrated) -> None:
    recipe = Recipe.int8().set("a", weight=3)
    gm = folded(calibrated(net(lambda self, x: self.a(x), a=nn.Conv2d(4, 5, 3, bias=False)), X, recipe))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %x_dequantize: f32[*, 4, 6, 6] = qfx.dequantize(%x_quantize, %x_scale, %x_zero_point, None, None, f32)
        %a_weight_scale: f32[5] = @a_weight_scale
        %a_weight_zero_point: i32[5] = @a_weight_zero_point
        %a_weight_packed: u8[5, 14] = @a.weight_packed
        %unpack_default: i8[5, 36] = qfx.unpack(%a_weight_packed, 3, True, 36)
        %view_default: i8[5, 4, 3, 3] = view(%unpack_default, [5, 4, 3, 3])
        %a_weight_dequantize: f32[5, 4, 3, 3] = qfx.dequantize(%view_default, %a_weight_scale, %a_weight_zero_point, 0, None, f32)
        %conv2d: f32[*, 5, 4, 4] = conv2d(%x_dequantize, %a_weight_dequantize)
        return (%conv2d)
    """, with_info=False)


@pytest.mark.parametrize(("bits", "width"), [(2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4)])
def test_storage(net, calibrated, bits: int, width: int) -> None:
    """Bytes in a row of 4 weights."""
    gm = calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.w8a16().set("fc", weight=bits))
    folded(gm, ROWS)
    stored = get_tensor(gm, "fc.weight" if bits == 8 else "fc.weight_packed")
    assert tuple(stored.shape) == (5, width)


def test_a_folded_batch_norm_goes_into_the_integers(net, calibrated) -> None:
    model = net(lambda self, x: self.bn(self.a(x)), a=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))
    model.bn.running_var.uniform_(0.5, 2.0)
    gm = folded(calibrated(model, X))
    assert not any(n.target is torch.ops.aten.mul.Tensor for n in gm.graph.nodes)
    assert gm.get_buffer("a.weight").dtype == torch.int8


def test_a_folded_batch_norm_is_multiplied_out_where_the_layer_stays_float(net, calibrated) -> None:
    model = net(lambda self, x: self.bn(self.a(x)), a=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))
    model.bn.running_var.uniform_(0.5, 2.0)
    gm = folded(calibrated(model, X, Recipe.int8().skip("a")))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input
        %a_weight_folded: f32[5, 4, 1, 1] = @a.weight_folded
        %a_bias_folded: f32[5] = @a.bias_folded
        %conv2d: f32[*, 5, 6, 6] = conv2d(%x, %a_weight_folded, %a_bias_folded)
        return (%conv2d)
    """, with_info=False)
    assert_same_numerics(model, gm, X, tolerance=1e-5)


def test_a_weight_with_a_float_reader_keeps_its_name_for_it(net, calibrated) -> None:
    gm = folded(calibrated(net(lambda self, x: self.a(x) + self.a.weight.sum(), a=nn.Conv2d(4, 5, 1)), X))
    assert get_tensor(gm, "a.weight").dtype == torch.float32 and get_tensor(gm, "a.weight_1").dtype == torch.int8


def test_a_tied_weight_is_stored_once_for_each_scale(net, calibrated) -> None:
    model = net(lambda self, x: F.linear(self.fc(x), self.fc.weight), fc=nn.Linear(4, 4))
    gm = folded(calibrated(model, ROWS), ROWS)
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr" and n.meta["val"].dtype == torch.int8] == ["fc.weight"]


def test_one_weight_at_two_specs(net, calibrated) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    gm = folded(calibrated(Two().eval(), ROWS, Recipe.w8a16().set("b", weight=4)), ROWS)
    assert get_tensor(gm, "a.weight").dtype == torch.int8 and get_tensor(gm, "b.weight_packed").dtype == torch.uint8


def test_leaves_the_users_weight_alone(net, calibrated) -> None:
    model = net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5))
    before = model.fc.weight.detach().clone()
    folded(calibrated(model, ROWS, Recipe.w8a16()), ROWS)
    assert torch.equal(model.fc.weight, before)


def test_declines_what_depends_on_an_input(net, calibrated) -> None:
    gm = folded(calibrated(net(lambda self, x: self.a(x), a=nn.Conv2d(4, 5, 1)), X))
    assert [n.name for n in gm.graph.nodes if n.target is quantize] == ["x_quantize"]


def state_times_two(self, x):
    self.state.fill_(0.5)
    return x * (self.state * 2)


def random_factor(self, x):
    return x * (self.state * torch.rand_like(self.state))


@pytest.mark.parametrize("forward", [state_times_two, random_factor])
def test_declines_what_a_write_or_chance_changes(net, calibrated, forward: Any) -> None:
    """Such products stay in the graph, and the write too."""
    gm = calibrated(net(forward, state=nn.Parameter(torch.ones(6), requires_grad=False)), X)
    before = [n.name for n in gm.graph.nodes]
    run_pass(Convert(), gm)
    run_pass(FoldWeights(), gm)
    assert [n.name for n in gm.graph.nodes] == before


def test_warns_of_filters_that_became_zero(net, calibrated) -> None:
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight[2] *= 1e-6
    gm = calibrated(net(lambda self, x: self.fc(x), fc=layer), ROWS, Recipe.w8a16().set("fc", weight=_per_tensor()))
    run_pass(Convert(), gm)
    with pytest.warns(ZeroFilterWarning, match=r"fc\.weight: 1 of 5 filters became 0"):
        run_pass(FoldWeights(), gm)


def _per_tensor() -> Any:
    from qfx.spec import INT8, PerTensor, QuantSpec, Scheme

    return QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor())
