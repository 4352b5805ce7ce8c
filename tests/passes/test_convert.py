"""FakeQuantize becomes quantize and dequantize."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.attributes import get_tensor
from qfx.errors import CalibrationError
from qfx.fake_quant import FakeQuantize
from qfx.meta import info, update, update_graph
from qfx.ops import dequantize, quantize
from qfx.passes import Annotate, Canonicalize, Convert, InsertObservers
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.spec import UINT8, FixedSpec
from qfx.targets import Reference
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def converted(gm: fx.GraphModule) -> fx.GraphModule:
    run_pass(Convert(), gm)
    return gm


def of_target(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def test_golden_static(net, calibrated) -> None:
    gm = converted(calibrated(net(lambda self, x: self.a(x).relu().sin(), a=conv()), X))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %x_dequantize: f32[*, 4, 6, 6] = qfx.dequantize(%x_quantize, %x_scale, %x_zero_point, None, None, f32)
        %a_weight: f32[4, 4, 1, 1] = @a.weight  {layer a}
        %a_weight_scale: f32[4] = @a_weight_scale  {layer a}
        %a_weight_zero_point: i32[4] = @a_weight_zero_point  {layer a}
        %a_weight_quantize: i8[4, 4, 1, 1] = qfx.quantize(%a_weight, %a_weight_scale, %a_weight_zero_point, 0, None, -128, 127, i8)  {layer a}
        %a_weight_dequantize: f32[4, 4, 1, 1] = qfx.dequantize(%a_weight_quantize, %a_weight_scale, %a_weight_zero_point, 0, None, f32)  {layer a}
        %conv2d_bias_int32: i32[4] = @conv2d_bias_int32  {layer a}
        %conv2d_bias_scale: f32[4] = @conv2d_bias_scale  {layer a}
        %conv2d_bias_zero_point: i32[4] = @conv2d_bias_zero_point  {layer a}
        %dequantize_default: f32[4] = qfx.dequantize(%conv2d_bias_int32, %conv2d_bias_scale, %conv2d_bias_zero_point, 0, None, f32)  {layer a}
        %conv2d: f32[*, 4, 6, 6] = conv2d(%x_dequantize, %a_weight_dequantize, %dequantize_default)  {layer a; fused conv2d+relu; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale}
        %relu: f32[*, 4, 6, 6] = relu(%conv2d)  {fused conv2d+relu; runs inside the kernel of conv2d}
        %sin: f32[*, 4, 6, 6] = sin(%relu)  {no integer kernel: this arithmetic needs float's range}
        return (%sin)
    """)


def test_golden_dynamic(net, calibrated) -> None:
    gm = converted(calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.int8_dynamic()))
    assert_graph(gm, """
        %x: f32[*, 3, 4] = input
        %choose_qparams_default: (f32[*, 3, 1], i32[*, 3, 1]) = qfx.choose_qparams(%x, -1, -1, True, -128, 127)
        %getitem: f32[*, 3, 1] = getitem(%choose_qparams_default, 0)
        %getitem_1: i32[*, 3, 1] = getitem(%choose_qparams_default, 1)
        %x_quantize: i8[*, 3, 4] = qfx.quantize(%x, %getitem, %getitem_1, -1, -1, -128, 127, i8)
        %x_dequantize: f32[*, 3, 4] = qfx.dequantize(%x_quantize, %getitem, %getitem_1, -1, -1, f32)
        %fc_weight: f32[5, 4] = @fc.weight  {layer fc}
        %fc_weight_scale: f32[5] = @fc_weight_scale  {layer fc}
        %fc_weight_zero_point: i32[5] = @fc_weight_zero_point  {layer fc}
        %fc_weight_quantize: i8[5, 4] = qfx.quantize(%fc_weight, %fc_weight_scale, %fc_weight_zero_point, 0, None, -128, 127, i8)  {layer fc}
        %fc_weight_dequantize: f32[5, 4] = qfx.dequantize(%fc_weight_quantize, %fc_weight_scale, %fc_weight_zero_point, 0, None, f32)  {layer fc}
        %fc_bias: f32[5] = @fc.bias  {layer fc}
        %linear: f32[*, 3, 5] = linear(%x_dequantize, %fc_weight_dequantize, %fc_bias)  {layer fc; in int8 symmetric per token dynamic, int8 symmetric per axis 0, float}
        return (%linear)
    """)


def test_golden_weight_only_keeps_a_float_bias(net, calibrated) -> None:
    gm = converted(calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.w4a16(32)))
    assert_graph(gm, """
        %x: f32[*, 3, 4] = input
        %fc_weight: f32[5, 4] = @fc.weight  {layer fc}
        %fc_weight_scale: f32[5, 1] = @fc_weight_scale  {layer fc}
        %fc_weight_zero_point: i32[5, 1] = @fc_weight_zero_point  {layer fc}
        %fc_weight_quantize: i8[5, 4] = qfx.quantize(%fc_weight, %fc_weight_scale, %fc_weight_zero_point, -1, 32, -8, 7, i8)  {layer fc}
        %fc_weight_dequantize: f32[5, 4] = qfx.dequantize(%fc_weight_quantize, %fc_weight_scale, %fc_weight_zero_point, -1, 32, f32)  {layer fc}
        %fc_bias: f32[5] = @fc.bias  {layer fc}
        %linear: f32[*, 3, 5] = linear(%x, %fc_weight_dequantize, %fc_bias)  {layer fc; in float, int4 symmetric per group of 32, float}
        return (%linear)
    """)


RECIPES = {
    "int8": Recipe.int8(),
    "int8_dynamic": Recipe.int8_dynamic(),
    "w8a16": Recipe.w8a16(),
    "w4a16": Recipe.w4a16(32),
    "3 bits": Recipe.int8().set(op="linear", weight=3, activation=5),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_fake_quantization(net, calibrated, fake_quantized, recipe: str) -> None:
    model = net(lambda self, x: self.b(self.a(x).relu()) + x, a=nn.Linear(4, 6, bias=False), b=nn.Linear(6, 4, bias=False))
    gm = calibrated(model, ROWS, RECIPES[recipe])
    rounded = fake_quantized(gm, ROWS)
    assert not torch.equal(rounded, model(ROWS))
    assert_same_numerics(lambda x: rounded, converted(gm), ROWS, tolerance=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        conv(),
        conv(groups=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
    ],
)
def test_bias_is_int32_at_the_product_of_scales(net, calibrated, fake_quantized, layer: nn.Module) -> None:
    gm = calibrated(net(lambda self, x: self.a(x), a=layer), X)
    data, weight = gm.get_submodule("fake_quant.x"), gm.get_submodule("fake_quant.a_weight")
    expected, rounded = data.scale * weight.scale, fake_quantized(gm, X)
    converted(gm)
    (back,) = [n for n in of_target(gm, dequantize) if "bias" in n.args[0].name]
    integers, scale, zero_point = (get_tensor(gm, str(a.target)) for a in back.args[:3])
    assert integers.dtype == torch.int32 and not zero_point.any()
    assert torch.allclose(scale, expected.repeat(getattr(layer, "groups", 1) if layer.transposed else 1))
    assert (integers * scale - layer.bias).abs().max() <= scale.max() / 2 * 1.001
    assert_same_numerics(lambda x: rounded, gm, X, tolerance=1e-4)


@pytest.mark.parametrize("bias", [5.0, 1e6, 1e20])
def test_a_bias_beyond_int32_widens_the_scale_of_its_channel(net, calibrated, bias: float) -> None:
    """A dead channel with a bias: its weights round to nothing at a scale at which the bias fits."""
    layer = conv()
    with torch.no_grad():
        layer.weight[1] = 1e-25
        layer.bias[1] = bias
    model = net(lambda self, x: self.a(x), a=layer)
    gm = calibrated(model, X)
    before = gm.get_submodule("fake_quant.a_weight").scale.clone()
    converted(gm)
    expected, actual = model(X), gm(X)
    after = get_tensor(gm, "a_weight_scale")
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and after[1] > before[1]
    assert torch.allclose(actual[:, 1], expected[:, 1], rtol=1e-6)
    assert (actual - expected)[:, [0, 2, 3]].abs().max() < 0.05


HALF = Recipe.int8().set("a", weight=replace(Recipe.int8().default.weight, scale_dtype=torch.float16))


@pytest.mark.parametrize("bias", [1.0, 50.0])
def test_a_bias_widens_a_float16_scale_to_one_of_float16(net, calibrated, bias: float) -> None:
    layer = conv()
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.bias[1] = bias
    model, x = net(lambda self, x: self.a(x), a=layer), X * 1e-3
    gm = calibrated(model, x, HALF)
    before = gm.get_submodule("fake_quant.a_weight").scale.clone()
    converted(gm)
    after = get_tensor(gm, "a_weight_scale")
    assert torch.equal(after.half().float(), after) and after.dtype is torch.float32
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and after[1] > before[1]
    assert torch.allclose(gm(x)[:, 1], torch.tensor(bias))


def test_a_bias_that_no_float16_scale_fits_stays_float(net, calibrated) -> None:
    """All-zero data have the smallest of scales, so that the weight's would have to be huge."""
    model, x = net(lambda self, x: self.a(x), a=conv()), torch.zeros_like(X)
    gm = converted(calibrated(model, x, HALF))
    (node,) = of_target(gm, torch.ops.aten.conv2d.default)
    assert node.args[2].op == "get_attr" and node.args[2].target == "a.bias"
    assert float(get_tensor(gm, "a_weight_scale").max()) < 1.0
    assert torch.equal(gm(x), model(x))


def test_one_weight_read_at_two_scales_keeps_both_biases(net, calibrated) -> None:
    """The second call needs a wider scale than the first; the first bias is rounded at the final scale too."""
    layer = conv()
    with torch.no_grad():
        layer.weight[1] = 0.0
        layer.bias[1] = 50.0
    gm = calibrated(net(lambda self, x: (self.a(x), self.a(x * 1e-3)), a=layer), X)
    converted(gm)
    biases = [n for n in of_target(gm, dequantize) if "bias" in n.args[0].name]
    weight_scale = get_tensor(gm, "a_weight_scale")
    for back, data in zip(biases, ("x_scale", "mul_scale"), strict=True):
        assert torch.equal(get_tensor(gm, str(back.args[1].target)), get_tensor(gm, data) * weight_scale)
        assert get_tensor(gm, str(back.args[0].target)).abs().max() <= 2**30
    for got in gm(X):
        assert torch.allclose(got[:, 1], torch.tensor(50.0))


def test_layers_on_all_zero_data(net, calibrated) -> None:
    model = net(lambda self, x: self.a(x), a=conv())
    gm = converted(calibrated(model, torch.zeros_like(X)))
    assert_same_numerics(model, gm, torch.zeros_like(X), tolerance=1e-6)


def test_a_weight_with_scales_by_group_keeps_a_float_bias(net, calibrated) -> None:
    weight = Recipe.w4a16(2).default.weight
    gm = calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.int8().set("fc", weight=weight))
    converted(gm)
    (linear,) = of_target(gm, torch.ops.aten.linear.default)
    assert linear.args[2].op == "get_attr" and linear.args[2].target == "fc.bias"


def test_a_group_has_one_scale(net, calibrated) -> None:
    gm = converted(calibrated(net(lambda self, x: self.b(F.max_pool2d(self.a(x), 2)), a=conv(), b=conv()), X))
    scales = [n.args[1].target for n in of_target(gm, quantize)]
    assert scales.count("conv2d_scale") == 2


def test_fixed_specs(net) -> None:
    gm = run_passes(net(lambda self, x: self.a(x.sigmoid()), a=conv(bias=False)), X, Canonicalize())
    update_graph(gm, stage="FUSED")
    run_pass(Annotate(Recipe.int8(), Reference()), gm)
    (node,) = of_target(gm, torch.ops.aten.conv2d.default)
    update(node, inputs=(FixedSpec(UINT8, 1 / 256, 3), *info(node).inputs[1:]))
    run_pass(InsertObservers(), gm)
    gm.get_submodule("fake_quant.a_weight").observer(gm.a.weight)
    gm.get_submodule("fake_quant.a_weight").calculate()
    update_graph(gm, stage="CALIBRATED")
    converted(gm)
    assert float(get_tensor(gm, "sigmoid_scale")) == 1 / 256 and int(get_tensor(gm, "sigmoid_zero_point")) == 3


def test_declines_an_observer_that_saw_nothing(net, calibrated) -> None:
    gm = calibrated(net(lambda self, x: self.a(x), a=conv()), X)
    module = gm.get_submodule("fake_quant.a_weight")
    gm.set_submodule("fake_quant.a_weight", FakeQuantize(module.spec, layer="a"))
    with pytest.raises(CalibrationError, match="never calibrated") as raised:
        Convert().run(gm)
    assert raised.value.where == "a"
