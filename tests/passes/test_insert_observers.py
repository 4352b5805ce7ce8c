"""One FakeQuantize on every annotated edge."""


from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.fake_quant import FakeQuantize
from qfx.meta import info, update
from qfx.passes import Annotate, Canonicalize, FuseEpilogues, InsertObservers, ShareScales
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.spec import UINT8, FixedSpec
from qfx.targets import Reference
from qfx.testing import assert_graph, assert_same_numerics, run_passes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def annotated(model: nn.Module, recipe: Recipe | None = None) -> fx.GraphModule:
    annotate = Annotate(recipe or Recipe.int8(), Reference())
    return run_passes(model, X, Canonicalize(), FuseEpilogues(), annotate, ShareScales())


def prepared(model: nn.Module, recipe: Recipe | None = None) -> fx.GraphModule:
    gm = annotated(model, recipe)
    run_pass(InsertObservers(), gm)
    assert_same_numerics(model, gm, X)
    return gm


def modules(gm: fx.GraphModule) -> dict[str, FakeQuantize]:
    return {path: m for path, m in gm.named_modules() if isinstance(m, FakeQuantize)}


def readers(gm: fx.GraphModule, name: str) -> dict[str, str]:
    """Who reads what in place of the node."""
    node = next(n for n in gm.graph.nodes if n.name == name)
    calls = [n for n in node.users if n.op == "call_module"]
    return {user.name: call.name for call in calls for user in call.users}


def test_golden(net) -> None:
    gm = prepared(net(lambda self, x: self.b(self.a(x).relu()) + x, a=conv(), b=conv()))
    assert_graph(gm, """
        %x: f32[*, 4, 6, 6] = input
        %x_fake_quant: f32[*, 4, 6, 6] = FakeQuantize<fake_quant.x>(%x)
        %a_weight: f32[4, 4, 1, 1] = @a.weight
        %a_weight_fake_quant: f32[4, 4, 1, 1] = FakeQuantize<fake_quant.a_weight>(%a_weight)
        %a_bias: f32[4] = @a.bias
        %conv2d: f32[*, 4, 6, 6] = conv2d(%x_fake_quant, %a_weight_fake_quant, %a_bias)
        %relu: f32[*, 4, 6, 6] = relu(%conv2d)
        %relu_fake_quant: f32[*, 4, 6, 6] = FakeQuantize<fake_quant.relu>(%relu)
        %b_weight: f32[4, 4, 1, 1] = @b.weight
        %b_weight_fake_quant: f32[4, 4, 1, 1] = FakeQuantize<fake_quant.b_weight>(%b_weight)
        %b_bias: f32[4] = @b.bias
        %conv2d_1: f32[*, 4, 6, 6] = conv2d(%relu_fake_quant, %b_weight_fake_quant, %b_bias)
        %add: f32[*, 4, 6, 6] = add.Tensor(%conv2d_1, %x)
        return (%add)
    """, with_info=False)


def test_readers_in_float_of_an_integer_value_read_it_rounded(net) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), y.softmax(1), y

    gm = prepared(net(forward, a=conv(), b=conv()))
    assert set(readers(gm, "conv2d")) == {"conv2d_1", "softmax", "output"}


def test_readers_in_float_of_a_float_value_read_it_as_it_is(net) -> None:
    gm = prepared(net(lambda self, x: self.a(x) + x.sin(), a=conv()))
    assert readers(gm, "x") == {"conv2d": "x_fake_quant"}


def test_one_module_a_group(net) -> None:
    gm = prepared(net(lambda self, x: self.b(F.max_pool2d(torch.cat([self.a(x)] * 2, 1), 2)), a=conv(), b=conv(8)))
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    of_group = [n.args[0].name for n in calls if n.target == "fake_quant.conv2d"]
    assert of_group == ["conv2d", "cat", "max_pool2d"]


def test_two_specs_of_one_value_get_modules_of_their_own(net) -> None:
    def forward(self, x):
        y = self.a(x)
        return self.b(y), self.c(y), y.sin()

    recipe = Recipe.int8().set("b", activation=4)
    gm = prepared(net(forward, a=conv(), b=conv(), c=conv()), recipe)
    nodes = {n.name: n for n in gm.graph.nodes}
    bits = {n: gm.get_submodule(nodes[n].target).spec.bits for n in ("conv2d_fake_quant", "conv2d_fake_quant_1")}
    assert bits == {"conv2d_fake_quant": 8, "conv2d_fake_quant_1": 4}
    assert [nodes[n].args[0].name for n in bits] == ["conv2d", "conv2d_fake_quant"]  # narrow ones of the kernel's own
    rounded = {n: nodes[n].args[0].name for n in ("conv2d_1", "conv2d_2", "sin")}
    wide, narrow = bits
    assert rounded == {"conv2d_1": narrow, "conv2d_2": wide, "sin": wide}


def test_specs_of_one_value_do_not_take_the_name_of_another(net) -> None:
    """``fake_quant.conv2d_1`` is that of %conv2d_1: the second module of %conv2d must find another name."""

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + self.c(self.b(y)) + self.c(y)

    gm = prepared(net(forward, a=conv(), b=conv(), c=conv()), Recipe.int8().set("b", activation=4))
    calls = [(str(n.target), n.args[0].name) for n in gm.graph.nodes if n.op == "call_module"]
    sources = {path: {source for p, source in calls if p == path} for path, _ in calls}
    assert all(len(found) == 1 for found in sources.values())


def test_a_tied_weight_is_observed_once(net) -> None:
    model = net(lambda self, x: F.conv2d(x, self.w) + F.conv2d(x * 2, self.w), w=nn.Parameter(torch.randn(4, 4, 1, 1)))
    gm = prepared(model)
    assert [path for path in modules(gm) if path.endswith(".w")] == ["fake_quant.w"]


def test_a_node_at_two_positions(net) -> None:
    gm = prepared(net(lambda self, x: torch.matmul(x, x)))
    (matmul,) = [n for n in gm.graph.nodes if n.name == "matmul"]
    assert [a.name for a in matmul.args] == ["x_fake_quant", "x_fake_quant"]


def test_fixed_specs(net) -> None:
    """A plug-in may fix a range that it knows; the module has its scale from the start."""
    gm = annotated(net(lambda self, x: self.a(x.sigmoid()), a=conv()))
    (node,) = [n for n in gm.graph.nodes if n.name == "conv2d"]
    update(node, inputs=(FixedSpec(UINT8, 1 / 256, 0), *info(node).inputs[1:]))
    run_pass(InsertObservers(), gm)
    module: Any = modules(gm)["fake_quant.sigmoid"]
    assert module.observer is None and float(module.scale) == 1 / 256


def test_modules_know_their_layer(net) -> None:
    gm = prepared(net(lambda self, x: self.a(x), a=conv()))
    assert {path: m.layer for path, m in modules(gm).items()} == {"fake_quant.x": "x", "fake_quant.a_weight": "a"}
