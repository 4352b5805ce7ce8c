"""Regions between dequantize and quantize become the target's kernels."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx.meta import graph_info, info, value
from qfx.operators import name_of
from qfx.ops import dequantize, quantize
from qfx.passes import CancelPairs, Convert, EliminateDeadCode, FoldWeights, Lower
from qfx.patterns import NoMatch
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.targets import REQUANTIZE, AnchorRegion, Leaf, PointRegion, Reference
from qfx.testing import assert_graph, assert_same_numerics

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Spy(Reference):
    """The reference, which remembers the regions that it is asked for; it declines operators in ``declines``."""

    name: ClassVar[str] = "spy"
    seen: list[Any] = dataclasses.field(default_factory=list)
    declines: tuple[str, ...] = ()

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        self.seen.append(region)
        return NoMatch("too hot") if region.op.name in self.declines else super().lower_anchor(region)

    def lower_point(self, region: PointRegion) -> Leaf | NoMatch:
        self.seen.append(region)
        return NoMatch("too cold") if region.op.name in self.declines else super().lower_point(region)


def conv(inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def lowered(gm: fx.GraphModule, *args: Tensor, target: Any = None, tolerance: float = 1e-6) -> fx.GraphModule:
    """Convert and lower; compares with the portable form, where a rounding may fall to the other side."""
    for p in (Convert(), FoldWeights(), CancelPairs()):
        run_pass(p, gm)
    before = gm(*args)
    run_pass(Lower(target or Reference()), gm)
    run_pass(EliminateDeadCode(), gm)
    assert_same_numerics(lambda *_: before, gm, args, tolerance=tolerance)
    return gm


STEP = 0.02
"""Of the largest output: one step of an 8-bit scale, where the order of float operations decides a tie."""


def calls(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op in ("call_function", "call_module")]


def targets(gm: fx.GraphModule) -> set[Any]:
    return {n.target for n in gm.graph.nodes}


# --- goldens ----------------------------------------------------------------------------------------------------------


def test_golden_chain(net, calibrated) -> None:
    gm = calibrated(net(lambda self, x: self.b(F.max_pool2d(self.a(x).relu(), 2).flip(3)), a=conv(), b=conv()), X)
    assert_graph(lowered(gm, X, tolerance=STEP), """
        %x: f32[*, 4, 6, 6] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %conv2d_leaf: u8[*, 4, 6, 6] = AnchorLeaf<a>(%x_quantize)  {layer a; fused conv2d+relu; group relu}
        %max_pool2d_leaf: u8[*, 4, 3, 3] = PointLeaf<max_pool2d>(%conv2d_leaf)  {fused max_pool2d; group relu}
        %flip_int: u8[*, 4, 3, 3] = flip(%max_pool2d_leaf, [3])  {fused flip; group relu}
        %conv2d_1_leaf: f32[*, 4, 3, 3] = AnchorLeaf<b>(%flip_int)  {layer b; fused conv2d_1}
        return (%conv2d_1_leaf)
    """)


def test_golden_dynamic(net, calibrated) -> None:
    gm = calibrated(net(lambda self, x: self.fc(x).relu(), fc=nn.Linear(4, 5)), ROWS, Recipe.int8_dynamic())
    assert_graph(lowered(gm, ROWS), """
        %x: f32[*, 3, 4] = input
        %linear_leaf: f32[*, 3, 5] = AnchorLeaf<fc>(%x)  {layer fc; fused linear}
        %relu: f32[*, 3, 5] = relu(%linear_leaf)  {int8_dynamic quantizes linear layers only}
        return (%relu)
    """)


def test_golden_weight_only(net, calibrated) -> None:
    gm = calibrated(net(lambda self, x: self.fc(x).relu(), fc=nn.Linear(4, 5)), ROWS, Recipe.w4a16(32))
    assert_graph(lowered(gm, ROWS), """
        %x: f32[*, 3, 4] = input
        %linear_leaf: f32[*, 3, 5] = AnchorLeaf<fc>(%x)  {layer fc; fused linear}
        %relu: f32[*, 3, 5] = relu(%linear_leaf)  {w4a16_g32 quantizes linear layers only}
        return (%relu)
    """)


def test_golden_product_of_two_activations(net, calibrated) -> None:
    def forward(self, x):
        y = self.q(x)
        return self.o(y @ y.transpose(1, 2))

    gm = calibrated(net(forward, q=nn.Linear(4, 4), o=nn.Linear(3, 2)), ROWS)
    assert_graph(lowered(gm, ROWS, tolerance=STEP), """
        %x: f32[*, 3, 4] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 3, 4] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %linear_leaf: u8[*, 3, 4] = AnchorLeaf<q>(%x_quantize)  {layer q; fused linear; group linear}
        %transpose_int: u8[*, 4, 3] = transpose.int(%linear_leaf, 1, 2)  {fused transpose; group linear}
        %matmul_leaf: u8[*, 3, 3] = MatmulLeaf<matmul>(%linear_leaf, %transpose_int)  {fused matmul; group matmul}
        %linear_1_leaf: f32[*, 3, 2] = AnchorLeaf<o>(%matmul_leaf)  {layer o; fused linear_1}
        return (%linear_1_leaf)
    """)


def test_golden_residual(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.c(torch.relu(self.b(y) + y))

    gm = calibrated(net(forward, a=conv(), b=conv(), c=conv()), X)
    assert_graph(lowered(gm, X, tolerance=STEP), """
        %x: f32[*, 4, 6, 6] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %conv2d_leaf: u8[*, 4, 6, 6] = AnchorLeaf<a>(%x_quantize)  {layer a; fused conv2d; group conv2d}
        %conv2d_1_leaf: u8[*, 4, 6, 6] = AnchorLeaf<b>(%conv2d_leaf, %conv2d_leaf)  {layer b; fused conv2d_1+add+relu; group relu}
        %conv2d_2_leaf: f32[*, 4, 6, 6] = AnchorLeaf<c>(%conv2d_1_leaf)  {layer c; fused conv2d_2}
        return (%conv2d_2_leaf)
    """)


def test_golden_requantization(net, calibrated) -> None:
    """One value in 8 bits and, made of these, in 4."""

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y), self.c(y)

    gm = calibrated(net(forward, a=conv(), b=conv(), c=conv()), X, Recipe.int8().set("b", activation=4))
    assert_graph(lowered(gm, X), """
        %x: f32[*, 4, 6, 6] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %conv2d_leaf: u8[*, 4, 6, 6] = AnchorLeaf<a>(%x_quantize)  {layer a; fused conv2d+relu; group relu}
        %relu_requantize: u8[*, 4, 6, 6] = PointLeaf<relu_requantize>(%conv2d_leaf)
        %conv2d_1_leaf: f32[*, 4, 6, 6] = AnchorLeaf<b>(%relu_requantize)  {layer b; fused conv2d_1; the recipe sets it}
        %conv2d_2_leaf: f32[*, 4, 6, 6] = AnchorLeaf<c>(%conv2d_leaf)  {layer c; fused conv2d_2}
        return (%conv2d_1_leaf, %conv2d_2_leaf)
    """)
    assert [text for topic, text in graph_info(gm).notes if topic == "requantized"] == ["relu: 8 to 4 bits for conv2d_1"]


def test_golden_parts_in_two_widths(net, calibrated) -> None:
    """The integers are split as they are; the part that is read in 4 bits then becomes 4 bits."""

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        return self.b(left), self.c(right)

    gm = calibrated(net(forward, a=conv(), b=conv(2), c=conv(2)), X, Recipe.int8().set("c", activation=4))
    assert_graph(lowered(gm, X), """
        %x: f32[*, 4, 6, 6] = input  {group x}
        %x_scale: f32[] = @x_scale
        %x_zero_point: i32[] = @x_zero_point
        %x_quantize: u8[*, 4, 6, 6] = qfx.quantize(%x, %x_scale, %x_zero_point, None, None, 0, 255, u8)
        %conv2d_leaf: u8[*, 4, 6, 6] = AnchorLeaf<a>(%x_quantize)  {layer a; fused conv2d; group conv2d}
        %chunk_int: (u8[*, 2, 6, 6], u8[*, 2, 6, 6]) = chunk(%conv2d_leaf, 2, 1)  {fused chunk; group conv2d}
        %getitem_int: u8[*, 2, 6, 6] = getitem(%chunk_int, 0)  {fused getitem; group conv2d}
        %getitem_1_int: u8[*, 2, 6, 6] = getitem(%chunk_int, 1)  {fused getitem_1; group conv2d}
        %getitem_1_requantize: u8[*, 2, 6, 6] = PointLeaf<getitem_1_requantize>(%getitem_1_int)
        %conv2d_1_leaf: f32[*, 4, 6, 6] = AnchorLeaf<b>(%getitem_int)  {layer b; fused conv2d_1}
        %conv2d_2_leaf: f32[*, 4, 6, 6] = AnchorLeaf<c>(%getitem_1_requantize)  {layer c; fused conv2d_2; the recipe sets it}
        return (%conv2d_1_leaf, %conv2d_2_leaf)
    """)


# --- movers -----------------------------------------------------------------------------------------------------------


def split_and_cat(self, x):
    left, right = self.a(x).split(2, 1)
    return self.b(torch.cat([right, left], 1))


def unbind_and_stack(self, x):
    return self.b(torch.stack(self.a(x).unbind(1)[::-1], 1))


def shapes(self, x):
    y = self.a(x).permute(0, 1, 3, 2)[:, :, 1:].narrow(3, 0, 4).unsqueeze(1).squeeze(1)
    return self.b(y.reshape(y.shape[0], 4, 2, -1).expand(-1, -1, -1, -1).repeat(1, 1, 2, 1))


def shuffles(self, x):
    y = F.pixel_unshuffle(F.pixel_shuffle(self.a(x), 2), 2)
    return self.b(torch.roll(F.channel_shuffle(y, 2), 1, 2).flip(3))


def parts(self, x):
    first, second = self.a(x).chunk(2, 1)
    return self.b(torch.cat([second, first.transpose(2, 3).contiguous()], 1))


@pytest.mark.parametrize("forward", [split_and_cat, unbind_and_stack, shapes, shuffles, parts])
def test_movers_run_on_integers(net, calibrated, forward: Any) -> None:
    gm = lowered(calibrated(net(forward, a=conv(), b=conv()), X), X)
    assert dequantize not in targets(gm)
    moved = [n for n in gm.graph.nodes if n.op == "call_function" and n.name.endswith("_int")]
    assert moved
    for n in moved:
        tensors = value(n) if isinstance(value(n), tuple | list) else [value(n)]
        assert {t.dtype for t in tensors} == {torch.uint8}, n.name


def test_a_float_reader_of_a_moved_value(net, calibrated) -> None:
    """It costs one dequantize of integers; verify looks at their dtype behind split and getitem too."""

    def forward(self, x):
        left, right = self.a(x).split(2, 1)
        return self.b(left), self.b(right), left.softmax(1)

    gm = lowered(calibrated(net(forward, a=conv(), b=conv(2)), X), X)
    (back,) = [n for n in gm.graph.nodes if n.target is dequantize]
    assert back.args[0].name == "getitem_int"


def test_cat_of_a_part_that_another_layer_reads_in_4_bits(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, self.c(x)], 1)), self.c(y)

    recipe = Recipe.int8().set("c", activation=4)
    gm = lowered(calibrated(net(forward, a=conv(), b=conv(8), c=conv()), X, recipe), X, tolerance=STEP)
    assert dequantize not in targets(gm)


# --- who reads what ---------------------------------------------------------------------------------------------------


def test_an_output_with_integer_and_float_readers(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), y.softmax(1)

    gm = lowered(calibrated(net(forward, a=conv(), b=conv()), X), X)
    assert calls(gm) == ["x_quantize", "conv2d_leaf", "conv2d_dequantize", "conv2d_1_leaf", "softmax"]


def test_an_epilogue_with_a_second_reader_is_a_kernel_of_its_own(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(F.hardswish(y)), y.softmax(1)

    gm = lowered(calibrated(net(forward, a=conv(), b=conv()), X), X)
    fused = {n.name: info(n).fused for n in gm.graph.nodes if n.op == "call_module"}
    assert fused == {"conv2d_leaf": ("conv2d",), "hardswish_leaf": ("hardswish",), "conv2d_1_leaf": ("conv2d_1",)}


def test_a_residual_that_comes_later_than_the_convolution(net, calibrated) -> None:
    """The kernel stands where its last operand is known."""

    def forward(self, x):
        y = self.a(x)
        return self.c(y + F.max_pool2d(self.b(x), 1))

    lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv()), X), X, tolerance=STEP)


def test_two_readers_at_two_widths(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y)

    target = Spy()
    recipe = Recipe.int8().set("b", activation=4)
    lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv()), X, recipe), X, target=target)
    between = next(region for region in target.seen if isinstance(region, PointRegion))
    assert between.op is REQUANTIZE and not between.same_scale
    assert [q.quant_max for q in (*between.inputs, between.output)] == [255, 15]  # int4 made of %a's own int8


def test_a_float_reader_beside_two_widths(net, calibrated) -> None:
    """It reads the widest, dequantized; the narrow integers are made of integers all the same."""

    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y), y.softmax(1)

    gm = lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv()), X, Recipe.int8().set("b", activation=4)), X)
    assert [n.args[0].name for n in gm.graph.nodes if n.target is dequantize] == ["conv2d_leaf"]
    assert [n.name for n in gm.graph.nodes if n.target is quantize] == ["x_quantize"]


def test_a_width_that_two_layers_read_is_made_once(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y), self.d(y)

    recipe = Recipe.int8().set("b", activation=4).set("c", activation=4)
    gm = lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv(), d=conv()), X, recipe), X)
    (made,) = [n for n in gm.graph.nodes if n.name.endswith("_requantize")]
    assert {n.name for n in made.users} == {"conv2d_1_leaf", "conv2d_2_leaf"}


@pytest.mark.parametrize(
    "activation",
    [F.relu, F.relu6, F.hardswish, F.silu, lambda x: F.gelu(x, approximate="tanh"), F.leaky_relu, lambda x: x.clamp(-0.5, 0.5)],
)
def test_activations_keep_their_arguments(net, calibrated, activation: Any) -> None:
    gm = lowered(calibrated(net(lambda self, x: self.b(activation(self.a(x))), a=conv(), b=conv()), X), X, tolerance=STEP)
    assert len([n for n in gm.graph.nodes if n.op == "call_module"]) == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Conv3d(4, 6, 2, stride=(1, 2, 1)),
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2),
        nn.ConvTranspose3d(4, 2, 2),
    ],
)
def test_layers_keep_their_arguments(net, calibrated, layer: nn.Module) -> None:
    x = torch.randn(2, 4, *[7] * (layer.weight.ndim - 2))
    gm = lowered(calibrated(net(lambda self, x: self.a(x), a=layer), x), x, tolerance=1e-5)
    assert calls(gm)[-1].endswith("_leaf") and len(calls(gm)) == 2


def test_operators_with_scales_of_their_own(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        z = F.pad(F.interpolate(F.avg_pool2d(y * self.b(x), 2), scale_factor=2), (1, 1), value=0.5)
        return self.c(z + z.mean((2, 3), keepdim=True))

    gm = lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv()), X), X, tolerance=STEP)
    assert {name_of(n) for n in gm.graph.nodes if n.op == "call_function"} == {""}  # quantize of the input alone


# --- what a target is told --------------------------------------------------------------------------------------------


def test_ranges_narrower_than_the_type_reach_the_target(net, calibrated) -> None:
    """Integers that a kernel makes keep their range of 7 bits: saturation is bounded by it."""
    target = Spy()
    recipe = dataclasses.replace(Recipe.int8(), reduce_range=True)
    gm = calibrated(net(lambda self, x: self.b(F.max_pool2d(self.a(x), 2).flip(2)), a=conv(), b=conv()), X, recipe)
    lowered(gm, X, target=target, tolerance=STEP)
    first, pool, second = target.seen
    assert (first.data.quant_max, first.output.quant_max) == (127, 127)
    assert (pool.inputs[0].quant_max, pool.output.quant_max, second.data.quant_max) == (127, 127, 127)


def test_a_region_in_full(net, calibrated) -> None:
    target = Spy()
    model = net(lambda self, x: self.b(F.leaky_relu(self.a(x), 0.2)), a=conv(4, 6, stride=2), b=conv(6))
    lowered(calibrated(model, X), X, target=target, tolerance=STEP)
    region = target.seen[0]
    assert region.op.name == "conv2d" and region.args == ([2, 2], [0, 0], [1, 1], 1)
    assert region.weight.dtype == torch.int8 and tuple(region.weight.shape) == (6, 4, 1, 1) and region.weight_bits == 8
    assert region.bias.dtype == torch.int32 and tuple(region.bias_scale.shape) == (6,)
    (step,) = region.steps
    assert (step.name, step.args, step.other) == ("leaky_relu", (0.2,), None)


def test_packed_weights_tell_their_bits(net, calibrated) -> None:
    target = Spy()
    gm = calibrated(net(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), ROWS, Recipe.w8a16().set("fc", weight=3))
    lowered(gm, ROWS, target=target)
    assert target.seen[0].weight_bits == 3 and tuple(target.seen[0].weight.shape) == (5, 4)


# --- names ------------------------------------------------------------------------------------------------------------


def test_leaves_bear_the_layers_path(net, calibrated) -> None:
    gm = lowered(calibrated(net(lambda self, x: self.a(self.a(x)), a=conv()), X), X, tolerance=STEP)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["a", "a_conv2d_1"]


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output(x @ x.transpose(1, 2))
        return result


def test_no_leaf_holds_another(net, calibrated) -> None:
    """The product in ``scores`` stands beside the layer ``scores.output``: its leaf has an ``output`` of its own."""
    model = net(lambda self, x: self.o(self.scores(self.q(x))), q=nn.Linear(4, 4), scores=Scores(), o=nn.Linear(3, 2))
    gm = lowered(calibrated(model, ROWS), ROWS, tolerance=STEP)
    assert {n.target for n in gm.graph.nodes if n.op == "call_module"} >= {"q", "scores_matmul", "scores.output"}
    assert not any(isinstance(m, Leaf) for n in gm.graph.nodes if n.op == "call_module"
                   for m in list(gm.get_submodule(n.target).modules())[1:])  # fmt: skip


# --- what stays -------------------------------------------------------------------------------------------------------


def test_declined_regions_stay_float_with_the_targets_reason(net, calibrated) -> None:
    target = Spy(declines=("conv2d", "avg_pool2d"))
    model = net(lambda self, x: self.fc(F.avg_pool2d(self.a(x), 6).flatten(1)), a=conv(), fc=nn.Linear(4, 2))
    gm = lowered(calibrated(model, X), X, target=target, tolerance=STEP)
    notes = [text for topic, text in graph_info(gm).notes if topic == "not lowered"]
    assert notes == ["conv2d: too hot", "avg_pool2d: too cold"]
    reasons = {n.name: info(n).reason for n in gm.graph.nodes}
    assert (reasons["conv2d"], reasons["avg_pool2d"]) == ("float: too hot", "float: too cold")
    assert [n.name for n in gm.graph.nodes if n.op == "call_module"] == ["linear_leaf"]


def test_a_declined_requantization_stays_float(net, calibrated) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y)

    target = Spy(declines=("requantize",))
    recipe = Recipe.int8().set("b", activation=4)
    gm = lowered(calibrated(net(forward, a=conv(), b=conv(), c=conv()), X, recipe), X, target=target)
    assert graph_info(gm).notes[-1] == ("not lowered", "conv2d_dequantize_quantize: too cold")
    assert sorted(n.args[6] for n in gm.graph.nodes if n.target is quantize) == [15, 255]
    assert not any(topic == "requantized" for topic, _ in graph_info(gm).notes)


def pair(*, first: int | None = None, second: int | None = None, constant: bool = True, mover: bool = False) -> Any:
    """``quantize(dequantize(quantize(x)))`` to 4 bits, with scales per tensor or along the axes ``first``, ``second``."""
    graph, root = fx.Graph(), nn.Module()
    x = graph.placeholder("x")
    given = graph.placeholder("scale")
    ends = []
    for name, axis in (("first", first), ("second", second)):
        size = () if axis is None else (4,)
        root.register_buffer(f"{name}_scale", torch.full(size, 0.02 if name == "first" else 0.3))
        root.register_buffer(f"{name}_zero_point", torch.zeros(size, dtype=torch.int32))
        ends.append((graph.get_attr(f"{name}_scale"), graph.get_attr(f"{name}_zero_point"), axis, None))
    if not constant:
        ends[1] = (given, *ends[1][1:])
    wide = graph.call_function(quantize, (x, *ends[0], 0, 255, torch.uint8))
    back = graph.call_function(dequantize, (wide, *ends[0], torch.float32))
    for node in (wide, back):
        node.meta["val"] = torch.empty(4, 4, dtype=torch.uint8 if node is wide else torch.float32)
    moved = graph.call_function(torch.ops.aten.flip.default, (back, [0])) if mover else back
    graph.output(graph.call_function(quantize, (moved, *ends[1], 0, 15, torch.uint8)))
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize("mover", [False, True])
@pytest.mark.parametrize("scales", [{"first": 0}, {"second": 0}, {"first": 0, "second": 0}, {"constant": False}])
def test_scales_that_a_table_cannot_have(scales: dict[str, Any], mover: bool) -> None:
    """Per axis, or chosen at run time: quantize and dequantize stay, and give what they gave."""
    gm = pair(**scales, mover=mover)
    x, scale = torch.rand(4, 4), torch.tensor(0.25)
    before, text = gm(x, scale), str(gm.graph)
    assert Lower(Reference()).run(gm) == 0 and str(gm.graph) == text
    gm.recompile()
    assert torch.equal(gm(x, scale), before)


def test_one_constant_scale_each_is_a_table() -> None:
    gm = pair()
    x, scale = torch.rand(4, 4), torch.tensor(0.25)
    before = gm(x, scale)
    assert Lower(Reference()).run(gm) == 1
    gm.recompile()
    assert torch.equal(gm(x, scale), before) and dequantize not in targets(gm)


def test_unfolded_weights_lower_too(net, calibrated) -> None:
    """``pipeline.without("fold-weights")`` is slower to lower, and no less right."""
    gm = calibrated(net(lambda self, x: self.a(x), a=conv()), X)
    run_pass(Convert(), gm)
    before = gm(X)
    run_pass(Lower(Reference()), gm)
    assert_same_numerics(lambda x: before, gm, X, tolerance=1e-6)
    assert calls(gm) == ["x_quantize", "conv2d_leaf"]
