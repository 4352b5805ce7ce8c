"""What is quantized, how, and why the rest stays float."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qfx
from qfx.errors import ConfigError, UnsupportedError
from qfx.meta import graph_info, info
from qfx.passes import Annotate, Canonicalize, Functionalize, FuseEpilogues
from qfx.recipe import Recipe
from qfx.spec import INT8, DerivedSpec, PerAxis, PerGroup, PerToken, QConfig, QuantSpec, Scheme, SharedSpec
from qfx.targets import Reference
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
INT8_RECIPE = Recipe.int8()
BEFORE = (Functionalize(), Canonicalize(), FuseEpilogues())


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def annotated(model: nn.Module, example: Any = X, recipe: Recipe = INT8_RECIPE) -> fx.GraphModule:
    gm = run_passes(model, example, *BEFORE, Annotate(recipe, Reference()))
    assert_same_numerics(model, gm, example, tolerance=1e-6)
    return gm


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def reason(gm: fx.GraphModule, name: str) -> str:
    return info(node(gm, name)).reason


def quantized(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if info(n).quantized]


# --- what is quantized ------------------------------------------------------------------------------------------------


def test_golden_convolution(net) -> None:
    gm = annotated(net(lambda self, x: self.b(F.max_pool2d(self.a(x).relu(), 2)).softmax(1), a=conv(), b=conv()))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input
        %a_weight: f32[4, 4, 1, 1] = @a.weight  {layer a}
        %a_bias: f32[4] = @a.bias  {layer a}
        %conv2d: f32[*, 4, 6, 6] = conv2d(%x, %a_weight, %a_bias)  {layer a; fused conv2d+relu; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale}
        %relu: f32[*, 4, 6, 6] = relu(%conv2d)  {fused conv2d+relu; out uint8 affine per tensor; runs inside the kernel of conv2d}
        %max_pool2d: f32[*, 4, 3, 3] = max_pool2d(%relu, [2, 2])  {in uint8 affine per tensor; out shares input 0}
        %b_weight: f32[4, 4, 1, 1] = @b.weight  {layer b}
        %b_bias: f32[4] = @b.bias  {layer b}
        %conv2d_1: f32[*, 4, 3, 3] = conv2d(%max_pool2d, %b_weight, %b_bias)  {layer b; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale}
        %softmax: f32[*, 4, 3, 3] = softmax.int(%conv2d_1, 1)  {Softmax stays float: its exponentials span too many magnitudes}
        return (%softmax)
    """)
    assert (graph_info(gm).recipe, graph_info(gm).target) == ("int8", "reference")


def test_golden_matmul_of_two_activations(net) -> None:
    model = net(lambda self, x: torch.matmul(self.q(x), self.k(x).transpose(1, 2)), q=nn.Linear(4, 4), k=nn.Linear(4, 4))
    assert_graph(annotated(model, ROWS), """
        %x: f32[*, 3, 4] = input
        %q_weight: f32[4, 4] = @q.weight  {layer q}
        %q_bias: f32[4] = @q.bias  {layer q}
        %linear: f32[*, 3, 4] = linear(%x, %q_weight, %q_bias)  {layer q; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale; out uint8 affine per tensor}
        %k_weight: f32[4, 4] = @k.weight  {layer k}
        %k_bias: f32[4] = @k.bias  {layer k}
        %linear_1: f32[*, 3, 4] = linear(%x, %k_weight, %k_bias)  {layer k; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale; out uint8 affine per tensor}
        %transpose: f32[*, 4, 3] = transpose.int(%linear_1, 1, 2)  {in uint8 affine per tensor; out shares input 0}
        %matmul: f32[*, 3, 3] = matmul(%linear, %transpose)  {in uint8 affine per tensor, uint8 affine per tensor}
        return (%matmul)
    """)


def test_golden_residual(net) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.c(torch.relu(self.b(y) + y))

    assert_graph(annotated(net(forward, a=conv(), b=conv(), c=conv())), """
        %x: f32[*, 4, 6, 6] = input
        %a_weight: f32[4, 4, 1, 1] = @a.weight  {layer a}
        %a_bias: f32[4] = @a.bias  {layer a}
        %conv2d: f32[*, 4, 6, 6] = conv2d(%x, %a_weight, %a_bias)  {layer a; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale; out uint8 affine per tensor}
        %b_weight: f32[4, 4, 1, 1] = @b.weight  {layer b}
        %b_bias: f32[4] = @b.bias  {layer b}
        %conv2d_1: f32[*, 4, 6, 6] = conv2d(%conv2d, %b_weight, %b_bias)  {layer b; fused conv2d_1+add+relu; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale}
        %add: f32[*, 4, 6, 6] = add.Tensor(%conv2d_1, %conv2d)  {fused conv2d_1+add+relu; in float, uint8 affine per tensor; runs inside the kernel of conv2d_1}
        %relu: f32[*, 4, 6, 6] = relu(%add)  {fused conv2d_1+add+relu; out uint8 affine per tensor; runs inside the kernel of conv2d_1}
        %c_weight: f32[4, 4, 1, 1] = @c.weight  {layer c}
        %c_bias: f32[4] = @c.bias  {layer c}
        %conv2d_2: f32[*, 4, 6, 6] = conv2d(%relu, %c_weight, %c_bias)  {layer c; in uint8 affine per tensor, int8 symmetric per axis 0, int32 at input_scale * weight_scale}
        return (%conv2d_2)
    """)


def test_dynamic_linear(net) -> None:
    model = net(lambda self, x: self.a(x).relu() @ x.transpose(1, 2), a=nn.Linear(4, 4))
    gm = annotated(model, ROWS, Recipe.int8_dynamic())
    data, weight, bias = info(node(gm, "linear")).inputs
    assert data.dynamic and data.granularity == PerToken() and weight.granularity == PerAxis(0) and bias is None
    assert info(node(gm, "linear")).output is None and quantized(gm) == ["linear"]
    assert reason(gm, "relu") == "int8_dynamic quantizes linear layers only"


def test_weight_only(net) -> None:
    gm = annotated(net(lambda self, x: self.a(x), a=nn.Linear(4, 4)), ROWS, Recipe.w4a16(32))
    assert [spec and str(spec) for spec in info(node(gm, "linear")).inputs] == [
        None,
        "int4 symmetric per group of 32",
        None,
    ]
    assert info(node(gm, "linear")).bits == 4


def test_a_weight_only_recipe_of_ones_own_explains_products(net) -> None:
    weight = QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0))
    model = net(lambda self, x: self.a(x) @ x.transpose(1, 2), a=nn.Linear(4, 4))
    gm = annotated(model, ROWS, Recipe("mine", QConfig(None, weight)))
    assert quantized(gm) == ["linear"]
    assert reason(gm, "matmul") == "this recipe keeps what lies between layers float"


def test_transposed_convolutions_have_their_output_channels_on_axis_1(net) -> None:
    gm = annotated(net(lambda self, x: self.a(x), a=nn.ConvTranspose2d(4, 6, 2, groups=2)))
    assert info(node(gm, "conv_transpose2d")).inputs[1].granularity == PerAxis(1)


def test_a_layer_of_other_bits_between_int8_layers(net) -> None:
    """Its input is rounded to 4 bits only for it: the other reader of the same value keeps 8."""

    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y)

    gm = annotated(net(forward, a=conv(), b=conv(), c=conv()), X, INT8_RECIPE.set("b", weight=4, activation=4))
    assert info(node(gm, "conv2d")).output.bits == 8
    assert [spec and spec.bits for spec in info(node(gm, "conv2d_1")).inputs] == [4, 4, None]  # the bias stays float
    assert [spec.bits for spec in info(node(gm, "conv2d_2")).inputs] == [8, 8, 32]
    assert [info(node(gm, n)).bits for n in ("conv2d", "conv2d_1", "conv2d_2")] == [8, 4, 8]


def test_only_the_narrow_reader_makes_a_narrow_output(net) -> None:
    recipe = INT8_RECIPE.set("b", activation=4)
    gm = annotated(net(lambda self, x: self.b(F.max_pool2d(self.a(x), 2)), a=conv(), b=conv()), X, recipe)
    assert info(node(gm, "conv2d")).output.bits == 4
    assert info(node(gm, "max_pool2d")).output == SharedSpec(0, info(node(gm, "conv2d")).output)


def test_reduced_range(net) -> None:
    recipe = dataclasses.replace(INT8_RECIPE, reduce_range=True)
    gm = annotated(net(lambda self, x: self.a(x), a=conv()), X, recipe)
    data, weight, bias = info(node(gm, "conv2d")).inputs
    assert (data.bits, weight.bits, bias) == (7, 8, DerivedSpec())


@pytest.mark.parametrize(
    "move",
    [
        lambda y: torch.cat([y, y], 1),
        lambda y: torch.cat(y.split(2, 1)[::-1], 1),
        lambda y: torch.stack(y.unbind(1), 1),
        lambda y: torch.cat([part.flip(2) for part in y.chunk(2, 1)], 1),
        lambda y: F.pad(y.permute(0, 1, 3, 2)[:, :, 1:], (1, 1)),
        lambda y: F.interpolate(y, scale_factor=2, mode="nearest"),
    ],
)
def test_movers_share_their_inputs_scale(net, move: Any) -> None:
    channels = move(torch.zeros(2, 4, 6, 6)).shape[1]
    gm = annotated(net(lambda self, x: self.b(move(self.a(x))), a=conv(), b=conv(channels)))
    movers = [n for n in gm.graph.nodes if n.op == "call_function" and not n.name.startswith("conv2d")]
    assert all(isinstance(info(n).output, SharedSpec) for n in movers), [n.name for n in movers]


def test_parts_of_a_split_that_float_operators_read_stay(net) -> None:
    def forward(self, x):
        left, right = self.a(x).split(2, 1)
        return self.b(left), right.softmax(1)

    gm = annotated(net(forward, a=conv(), b=conv(2)))
    assert info(node(gm, "getitem")).quantized and not info(node(gm, "getitem_1")).quantized
    assert reason(gm, "getitem_1") == "nobody behind it computes in integers"


def test_a_constant_operand_of_a_product_is_quantized(net) -> None:
    model = net(lambda self, x: torch.matmul(self.a(x), self.w), a=nn.Linear(4, 4), w=nn.Parameter(torch.randn(2, 4, 5)))
    gm = annotated(model, ROWS)
    assert all(spec.bits == 8 for spec in info(node(gm, "matmul")).inputs)


# --- what stays float, and why ----------------------------------------------------------------------------------------


def group_reasons(self, x):
    return torch.relu(self.a(x) + self.b(x))


def test_an_add_behind_the_last_convolution_stays_float_and_says_so(net) -> None:
    """Nobody wants its other operand as integers, so the kernel cannot take it."""
    gm = annotated(net(group_reasons, a=conv(), b=conv()))
    assert quantized(gm) == ["conv2d", "conv2d_1"]
    assert (reason(gm, "add"), reason(gm, "relu")) == ("its input conv2d is float", "its input add is float")
    assert not any(info(n).fused for n in gm.graph.nodes)


def in_place_later(self, x):
    y = self.a(x)
    z = self.b(y)
    y.view(-1).relu_()
    return z + y


def in_place_on_weight(self, x):
    self.state.fill_(0.5)
    return F.conv2d(x, self.state)


@pytest.mark.parametrize(
    ("forward", "name", "why"),
    [
        (lambda self, x: F.layer_norm(self.a(x), (6,)), "layer_norm", "LayerNorm stays float: its statistics need more than 8 bits"),
        (lambda self, x: self.a(x).softmax(1), "softmax", "Softmax stays float: its exponentials span too many magnitudes"),
        (lambda self, x: F.group_norm(x, 2), "group_norm", "GroupNorm stays float: its statistics need more than 8 bits"),
        (lambda self, x: F.rms_norm(x, (6,)), "rms_norm", "RMSNorm stays float: its statistics need more than 8 bits"),
        (lambda self, x: torch.erfinv(self.a(x)), "erfinv", "unknown operator erfinv: it stays float"),
        (lambda self, x: x.to(torch.float64), "to", "a change of dtype or device stays float"),
        (lambda self, x: self.a(x).argmax(1) + 1, "add", "integer or boolean arithmetic"),
        (lambda self, x: self.a(x).view(x.shape[0] * 2, -1), "mul", "size arithmetic"),
        (lambda self, x: x + self.state[0].mul(2), "mul", "a constant"),
        (lambda self, x: self.a(x.sin().relu()), "relu", "its input sin is float"),
        (lambda self, x: self.a(x).relu(), "relu", "runs inside the kernel of conv2d"),
        (lambda self, x: F.max_pool2d(self.a(x), 2), "max_pool2d", "nobody behind it computes in integers"),
        (lambda self, x: F.conv2d(x, self.a.weight * x.mean()), "conv2d", "its weight is computed from inputs"),
        (lambda self, x: F.conv2d(x, self.a.weight, x.mean((0, 2, 3))), "conv2d", "its bias is computed from inputs"),
        (in_place_later, "conv2d", "an in-place operator changes its tensor later on"),
        (in_place_later, "conv2d_1", "an in-place operator changes its tensor later on"),
        (in_place_later, "relu_", "it writes to a tensor in place, where others read it"),
        (in_place_on_weight, "conv2d", "an in-place operator changes its tensor later on"),
    ],
)
def test_declines(net, forward: Any, name: str, why: str) -> None:
    gm = annotated(net(forward, a=conv(), b=conv(), state=nn.Parameter(torch.ones(4, 4, 1, 1), requires_grad=False)))
    assert reason(gm, name) == why
    assert name == "relu" or not info(node(gm, name)).quantized


def test_skipped_layers_say_who_skipped_them(net) -> None:
    recipe = INT8_RECIPE.skip("a", why="it hurts").skip(op="max_pool2d")
    gm = annotated(net(lambda self, x: self.b(F.max_pool2d(self.a(x), 2)), a=conv(), b=conv()), X, recipe)
    assert (reason(gm, "conv2d"), reason(gm, "max_pool2d")) == ("it hurts", "the recipe skips it")
    assert quantized(gm) == ["conv2d_1"]


def test_a_weight_that_the_recipe_leaves_float(net) -> None:
    gm = annotated(net(lambda self, x: self.a(x), a=conv()), X, INT8_RECIPE.set("a", weight=None))
    assert reason(gm, "conv2d") == "the recipe leaves its weight float"


def test_a_group_ends_where_the_recipe_skips(net) -> None:
    model = net(lambda self, x: self.b(self.r(self.a(x))), a=conv(), r=nn.ReLU(), b=conv())
    gm = annotated(model, X, INT8_RECIPE.skip(nn.ReLU))
    assert info(node(gm, "conv2d")).output is None and reason(gm, "relu") == "the recipe skips it"


# --- recipes that cannot be meant -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"op": "layer_norm"}, {"layer": nn.LayerNorm}, {"layer": "norm"}])
def test_layer_norm_forced_into_integers(net, how: Any) -> None:
    def forward(self, x):  # a frame of a lambda is no user's line to torch
        return self.norm(self.a(x))

    model = net(forward, a=conv(), norm=nn.LayerNorm(6))
    with pytest.raises(ConfigError, match="asks for integers where there are none: LayerNorm stays float") as raised:
        annotated(model, X, INT8_RECIPE.set(**how, weight=8))
    assert raised.value.where == "norm" and "test_annotate.py" in raised.value.source


def test_softmax_forced_into_integers(net) -> None:
    with pytest.raises(ConfigError, match="Softmax stays float"):
        annotated(net(lambda self, x: self.a(x).softmax(1), a=conv()), X, INT8_RECIPE.set(op="softmax", activation=8))


@pytest.mark.parametrize(
    ("how", "nearest"),
    [
        ({"layer": "encodr.*"}, "'encoder'"),
        ({"op": "con2d"}, "'conv2d'"),
        ({"module": "Conv2D"}, "'Conv2d'"),
        ({"layer": nn.Linear}, "'Conv2d', 'Net'"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(net, how: Any, nearest: str) -> None:
    with pytest.raises(ConfigError, match="matches nothing in this model") as raised:
        annotated(net(lambda self, x: self.encoder(x), encoder=conv()), X, INT8_RECIPE.skip(**how))
    assert nearest in raised.value.hint


def test_a_spec_that_no_target_runs(net) -> None:
    grouped = QuantSpec(INT8, Scheme.SYMMETRIC, PerGroup(2))
    with pytest.raises(UnsupportedError, match="no target can run conv2d") as raised:
        annotated(net(lambda self, x: self.a(x), a=conv()), X, INT8_RECIPE.set("a", weight=grouped))
    assert raised.value.where == "a" and "takes no weights per group of 2" in str(raised.value)


def test_dynamic_layers_around_a_product_do_not_raise(net) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) @ x.transpose(1, 2)

    model = net(lambda self, x: self.attn(x), attn=Attention())
    gm = annotated(model, ROWS, Recipe.int8_dynamic().set("attn", weight=4))
    assert quantized(gm) == ["linear"] and info(node(gm, "linear")).bits == 4


# --- products of positions --------------------------------------------------------------------------------------------

POSITIONS = "it is computed from positions alone, whose every digit counts"


class Rotary(nn.Module):
    """Turns features by angles that are products of positions and frequencies; then attends with its steps written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.01]))

    def forward(self, x, places):
        angles = (self.frequencies[None, :, None] @ places[:, None, :].float()).transpose(1, 2).repeat(1, 1, 2)
        q, k = (layer(x) * angles.cos() + layer(x).flip(-1) * angles.sin() for layer in (self.q, self.k))
        return q @ k.transpose(1, 2)


@pytest.mark.parametrize("target", ["reference", "native"])
def test_angles_stay_float_and_scores_do_not(target: str) -> None:
    places = torch.arange(3).repeat(2, 1) * 1000
    gm = annotated(Rotary(), (ROWS, places))
    assert reason(gm, "matmul") == POSITIONS
    assert "matmul" not in quantized(gm) and "matmul_1" in quantized(gm)
    made = qfx.quantize(Rotary(), (ROWS, places), target=target, verbose=False)
    products = [row for row in qfx.report(made).rows if row.operator == "matmul"]
    assert sorted(row.integer for row in products) == [False, True]


def test_positions_that_are_made_of_sizes_stay_float(net) -> None:
    def forward(self, x):
        places = torch.arange(x.shape[1]).float()
        return self.a(x) * (self.a.bias[:, None] @ places[None, :]).transpose(0, 1).cos()

    gm = annotated(net(forward, a=nn.Linear(4, 4)), ROWS)
    assert quantized(gm) == ["linear"] and reason(gm, "matmul") == POSITIONS


def test_angles_with_the_frequencies_on_the_right_stay_float(net) -> None:
    """The product is a linear layer of one feature by then."""
    model = net(lambda self, x, i: self.a(x) * (i[:, :, None].float() @ self.b.weight.t()).cos(), a=nn.Linear(4, 4),
                b=nn.Linear(1, 4, bias=False))  # fmt: skip
    gm = annotated(model, (ROWS, torch.arange(3).repeat(2, 1)))
    assert quantized(gm) == ["linear"] and [r for n in gm.graph.nodes if (r := info(n).reason) == POSITIONS]


def test_layers_on_images_of_bytes_are_content(net) -> None:
    model = net(lambda self, x: (y := self.a(x.float() / 255).flatten(2)) @ y.transpose(1, 2), a=nn.Conv2d(3, 4, 3))
    gm = annotated(model, torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8))
    assert {"conv2d", "matmul"} <= set(quantized(gm))


def test_what_an_embedding_looks_up_is_content(net) -> None:
    model = net(lambda self, i: (y := self.table(i)) @ y.transpose(1, 2), table=nn.Embedding(9, 4))
    assert "matmul" in quantized(annotated(model, torch.randint(0, 9, (2, 3))))


def test_an_input_times_itself_is_content(net) -> None:
    assert quantized(annotated(net(lambda self, x: x @ x.transpose(1, 2)), ROWS)) == ["matmul"]
