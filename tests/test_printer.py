"""The text format of graphs."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from qfx.capture import capture
from qfx.meta import set_value, update
from qfx.printer import show, show_node, show_value
from qfx.spec import INT8, UINT8, DerivedSpec, FixedSpec, PerAxis, QuantSpec, Scheme, SharedSpec
from qfx.testing import assert_graph

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        left, right = self.conv(x).split(2, 1)
        return left.flatten(1), {"right": right.to(torch.float64)}


@pytest.fixture(scope="module")
def captured() -> fx.GraphModule:
    return capture(Small().eval(), torch.randn(2, 2, 5))


def test_golden(captured: fx.GraphModule) -> None:
    assert_graph(captured, """
        %x: f32[*, 2, 5] = input
        %conv_weight: f32[4, 2, 3] = @conv.weight
        %conv_bias: f32[4] = @conv.bias
        %conv1d: f32[*, 4, 3] = conv1d(%x, %conv_weight, %conv_bias)
        %split: (f32[*, 2, 3], f32[*, 2, 3]) = split.Tensor(%conv1d, 2, 1)
        %getitem: f32[*, 2, 3] = getitem(%split, 0)
        %getitem_1: f32[*, 2, 3] = getitem(%split, 1)
        %flatten: f32[*, 6] = flatten.using_ints(%getitem, 1)
        %to: f64[*, 2, 3] = to.dtype(%getitem_1, f64)
        return (%flatten, %to)
    """)


def test_the_same_on_every_run(captured: fx.GraphModule) -> None:
    assert show(captured) == show(capture(Small().eval(), torch.randn(2, 2, 5))) and show(captured).endswith(")\n")


ACTIVATION, WEIGHT = QuantSpec(UINT8), QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), narrow_range=True)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({}, "%relu = relu(%x)"),
        ({"origin": "a.b"}, "%relu = relu(%x)  {layer a.b}"),
        ({"fused": ("conv", "relu")}, "%relu = relu(%x)  {fused conv+relu}"),
        (
            {"inputs": (ACTIVATION, None, DerivedSpec())},
            "{in uint8 affine per tensor, float, int32 at input_scale * weight_scale}",
        ),
        ({"inputs": (WEIGHT,)}, "{in int8 symmetric per axis 0 narrow range}"),
        ({"inputs": (None, None)}, "%relu = relu(%x)"),
        ({"output": SharedSpec(0, ACTIVATION), "group": "x"}, "{out shares input 0; group x}"),
        ({"output": FixedSpec(UINT8, 0.5, 3)}, "{out uint8 fixed scale 0.5 zero point 3}"),
        ({"reason": "it is small"}, "{it is small}"),
    ],
)
def test_facts(facts: dict[str, object], text: str) -> None:
    g = fx.Graph()
    relu = g.create_node("call_function", aten.relu.default, (g.placeholder("x"),), name="relu")
    update(relu, **facts)
    assert show_node(relu).endswith(text)
    assert show_node(relu, with_info=False) == "%relu = relu(%x)"


def test_values() -> None:
    assert show_value(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert show_value(torch.zeros((), dtype=torch.complex64)) == "complex64[]"
    assert show_value((torch.zeros(1), [torch.zeros(2, dtype=torch.bool)])) == "(f32[1], (bool[2]))"
    assert (show_value(3), show_value(None), show_value(1.5)) == ("int", "", "float")


def test_arguments() -> None:
    g = fx.Graph()
    x = g.placeholder("x")
    cat = g.create_node("call_function", aten.cat.default, ([x, x], 1), name="cat")
    to = g.create_node("call_function", aten.to.dtype, (cat, torch.float16), {"non_blocking": False}, name="to")
    item = g.call_function(operator.getitem, (to, (slice(None), 0)))
    method = g.call_method("tanh", (item,))
    set_value(x, torch.zeros(2))
    assert [show_node(n) for n in (x, cat, to, item, method)] == [
        "%x: f32[2] = input",
        "%cat = cat([%x, %x], 1)",
        "%to = to.dtype(%cat, f16, non_blocking=False)",
        "%getitem = getitem(%to, (slice(None, None, None), 0))",
        "%tanh = tanh(%getitem)",
    ]


def test_modules_and_operators_of_others() -> None:
    g = fx.Graph()
    x = g.placeholder("x")
    called = g.call_module("leaf", (x,))
    quantized = g.call_function(torch.ops.qfx.unpack.default, (called, 4, True, 8))
    g.output(quantized)
    root = nn.Module()
    root.leaf = nn.ReLU()
    gm = fx.GraphModule(root, g)
    assert show(gm).splitlines() == [
        "%x = input",
        "%leaf = ReLU<leaf>(%x)",
        "%unpack_default = qfx.unpack(%leaf, 4, True, 8)",
        "return %unpack_default",
    ]
