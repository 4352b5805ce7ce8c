"""What goes into a region, what stays outside, and that calling it in place of its nodes changes nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import jit
from qfx.meta import graph_info, info, value
from qfx.passes.compile_regions import CompileRegions
from qfx.stage import Stage
from qfx.targets import Leaf
from qfx.targets.native.declined import Declined
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.region import NativeRegion
from qfx.verify import verify

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

Net = Callable[..., nn.Module]
AUTO = torch.export.Dim.AUTO
ROWS, IMAGES = torch.randn(4, 5, 6), torch.randn(4, 3, 8, 8)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions run as their graphs do: the numbers are then to be those of x86 exactly, and no test waits for g++."""
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))


def lowered(model: nn.Module, *example: Tensor, target: str = "native", recipe: Any = "int8") -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = qfx.quantize(model.eval(), example, target=target, recipe=recipe, verbose=False)
    assert isinstance(made, fx.GraphModule)
    return made


def insides(gm: fx.GraphModule) -> list[list[str]]:
    """The nodes of every region but its ends."""
    ends = ("placeholder", "output", "get_attr")
    return [[n.name for n in r.graph.graph.nodes if n.op not in ends] for r in regions_of(gm).values()]


def outside(gm: fx.GraphModule) -> list[str]:
    """The calls that are no region and belong to none."""
    regions = {gm.get_submodule(path) for path in regions_of(gm)}
    calls = [n for n in gm.graph.nodes if n.op.startswith("call")]
    return [n.name for n in calls if n.op != "call_module" or gm.get_submodule(str(n.target)) not in regions]


def same_nodes(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """Node for node, in any order that the data allow: operators, and the operands of each.

    Sizes do not count: a region finds out its own. Nor does whether elements may be copied for another shape.
    """

    def expressions(gm: fx.GraphModule) -> list[str]:
        said: dict[fx.Node, str] = {}
        for node in gm.graph.nodes:
            target = node.target
            if node.op == "call_module":
                target = type(gm.get_submodule(str(target))).__name__
            if node.op == "get_attr":
                target = "tensor"
            if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                target = torch.ops.aten.reshape.default
            args = fx.map_arg((node.args, node.kwargs), lambda n: said[n])
            said[node] = f"{node.op}:{target}({args!s})"
        return sorted(text for text in said.values() if not text.startswith("call_function:aten.sym_size"))

    assert expressions(one) == expressions(other)


def check(gm: fx.GraphModule, model: nn.Module, *example: Tensor) -> None:
    """The graph is sound, inlining gives the graph of x86 back, and the numbers are its numbers."""
    gm.graph.lint()
    verify(gm, Stage.LOWERED)
    plain = lowered(model, *example, target="x86")
    same_nodes(inlined(gm), plain)
    with torch.no_grad():
        for got, want in zip(flat(gm(*example)), flat(inlined(gm)(*example)), strict=True):
            assert torch.equal(got, want)


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values
    return [tensor for part in parts for tensor in flat(part)]


def linears(*names: str, width: int = 6) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, width) for name in names}


def test_golden(net: Net) -> None:
    model = net(lambda s, x: s.b(s.a(x).relu()).cumsum(1), **linears("a", "b"))
    gm = lowered(model, ROWS)
    assert insides(gm) == [["x_quantize", "linear_leaf", "linear_1_leaf"]]
    assert outside(gm) == ["cumsum"]
    (call,) = [n for n in gm.graph.nodes if n.op == "call_module"]
    assert call.name == call.target == "native"
    assert info(call).reason == "one native program"
    check(gm, model, ROWS)


CASES: dict[str, tuple[Callable[..., Any], tuple[str, ...], int]] = {
    "a reader of an early result stands before the last layer": (
        lambda s, x: s.c(s.a(x).cumsum(1) + s.b(x)), ("a", "b", "c"), 2),
    "such readers in a chain": (
        lambda s, x: (s.a(x).cumsum(1).cumsum(2), s.b(x), s.c(x).cumsum(1)), ("a", "b", "c"), 1),
    "one of several results": (lambda s, x: s.b(s.a(x).sort(1)[0]), ("a", "b"), 2),
    "all of several results": (lambda s, x: (lambda v, i: (s.b(v), i))(*s.a(x).sort(1)), ("a", "b"), 2),
    "parts": (lambda s, x: (lambda p: (s.b(p[0]).cumsum(1), s.c(p[1])))(s.a(x).split((2, 3), 1)), ("a", "b", "c"), 1),
    "parts of what is not native": (lambda s, x: [s.b(p) for p in s.a(x).cumsum(1).unbind(1)], ("a", "b"), 2),
    "around": (lambda s, x: s.b(s.a(x) + s.a(x).cumsum(1)), ("a", "b"), 2),
    "apart and together": (
        lambda s, x: s.d((y := s.a(x)) + s.b(y.cumsum(1)) + s.c(y)), ("a", "b", "c", "d"), 2),
    "three deep": (
        lambda s, x: s.c(s.b(s.a(x).cumsum(1)).cumsum(1)) + x, ("a", "b", "c"), 3),
    "an input is an output": (lambda s, x: (x, s.a(x), x), ("a",), 1),
    "a value twice": (lambda s, x: ((y := s.a(x)), s.b(y), y), ("a", "b"), 1),
    "a value and a view of it": (lambda s, x: ((y := s.a(x)), y.view(-1, 30), s.b(y).transpose(1, 2)), ("a", "b"), 1),
    "a dict": (lambda s, x: {"one": s.a(x), "two": [s.b(x), {"three": x.sum()}]}, ("a", "b"), 1),
    "nothing native": (lambda s, x: x.cumsum(1).sort(1)[0], ("a",), 0),
    "no layer": (lambda s, x: x.relu().sigmoid() + x, ("a",), 0),
    "one layer twice": (lambda s, x: s.a(s.a(x).relu()), ("a",), 1),
    "one layer on both sides": (lambda s, x: s.a(s.a(x).cumsum(1)), ("a",), 2),
    "sizes": (lambda s, x: s.a(x).view(x.shape[0], -1) * x.shape[0], ("a",), 1),
    "sizes of a result": (lambda s, x: (y := s.a(x)).new_ones(y.shape[0], 3).cumsum(1) + s.b(y).sum(), ("a", "b"), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_regions(case: str, net: Net) -> None:
    forward, layers, regions = CASES[case]
    model = net(forward, **linears(*layers))
    gm = lowered(model, ROWS)
    assert len(regions_of(gm)) == regions
    check(gm, model, ROWS)


class Gate(nn.Module):
    """Operators of the layer itself around those of its children, as in squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def test_layers_within_layers(net: Net) -> None:
    model = net(lambda s, x: s.b(s.gate(s.a(x))).cumsum(1), gate=Gate(), a=nn.Conv2d(3, 3, 3), b=nn.Conv2d(3, 4, 1))
    gm = lowered(model, IMAGES)
    assert len(regions_of(gm)) == 1
    check(gm, model, IMAGES)


def test_tied_weights(net: Net) -> None:
    """One tensor in a layer of each region, and in an embedding that stays outside."""
    parts = {"table": nn.Embedding(9, 6), "head": nn.Linear(6, 9), **linears("body")}
    model = net(lambda s, i: s.head(s.body(s.table(i)).cumsum(1)), **parts)
    model.head.weight = model.table.weight
    tokens = torch.randint(0, 9, (4, 5))
    check(lowered(model, tokens), model, tokens)


def test_two_inputs(net: Net) -> None:
    model = net(lambda s, x, y: (s.a(x) + s.b(y[:, :, 0]), s.c(y).cumsum(1)), **linears("a", "b", "c"))
    example = (ROWS, torch.randn(4, 5, 2, 6))
    check(lowered(model, *example), model, *example)


def test_declines_what_has_no_kernel_with_a_note(net: Net) -> None:
    model = net(lambda s, x: s.b(s.a(x).cumsum(1)), **linears("a", "b"))
    gm = lowered(model, ROWS)
    (note,) = [text for topic, text in graph_info(gm).notes if topic == "not native"]
    assert "cumsum" in note and "no native kernel" in note


def test_declines_regions_without_a_layer(net: Net) -> None:
    model = net(lambda s, x: s.b((s.a(x).cumsum(1).relu() * 0.5).cumsum(1)), **linears("a", "b"))
    gm = lowered(model, ROWS)
    assert len(regions_of(gm)) == 2
    assert any(name.startswith("relu") for name in outside(gm))


def test_declines_without_a_compiler(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_NO_JIT", "1")
    model = net(lambda s, x: s.b(s.a(x)), **linears("a", "b"))
    gm = lowered(model, ROWS)
    assert regions_of(gm) == {}
    assert "QFX_NO_JIT" in str(qfx.report(gm))
    assert all("native" not in m.kernel for m in gm.modules() if isinstance(m, Leaf))


def test_returns_zero_for_a_graph_that_has_no_more(net: Net) -> None:
    gm = lowered(net(lambda s, x: s.a(x), **linears("a")), ROWS)
    before = str(gm.graph)
    assert CompileRegions().run(gm) == 0 and str(gm.graph) == before


def test_values_and_places_stay_known(net: Net) -> None:
    """What a region gives has the value and the origin of the nodes that gave it."""
    model = net(lambda s, x: (s.a(x), s.b(x)), **linears("a", "b"))
    gm, plain = lowered(model, ROWS), lowered(model, ROWS, target="x86")
    got, want = ([n for n in g.graph.output_node().all_input_nodes] for g in (gm, plain))
    for one, other in zip(got, want, strict=True):
        assert tuple(value(one).shape) == tuple(value(other).shape)
        assert info(one).origin == info(other).origin


def test_the_report_has_the_rows_of_x86(net: Net) -> None:
    model = net(lambda s, x: s.c(nn.functional.max_pool2d((s.a(x).relu() + s.b(x)), 2)).flatten(1).cumsum(1),
                **{n: nn.Conv2d(i, 4, 3, padding=1) for n, i in (("a", 3), ("b", 3), ("c", 4))})  # fmt: skip
    native, plain = (qfx.report(lowered(model, IMAGES, target=t)) for t in ("native", "x86"))
    assert [row.name for row in native.rows] == [row.name for row in plain.rows]
    assert [row.integer for row in native.rows] == [row.integer for row in plain.rows]
    assert [row.kernel for row in native.rows] == [row.kernel for row in plain.rows], "no region has a program here"


# --- what depends on no sample ----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Causal attention on scores, whose mask and distances are made of the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        seen, places = torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.arange(tokens)
        near = (places[:, None] - places[None, :]).le(2).float() + self.a.bias.sum()
        y = self.a(x)
        scores = y @ y.transpose(1, 2) + near + torch.zeros(tokens, tokens).masked_fill(~seen, -1e4)
        return self.b(scores.softmax(-1) @ y)


FOLDED = {"ones", "tril", "arange", "sub", "le", "masked_fill", "zeros", "sum"}


def ops(names: list[str]) -> set[str]:
    return {name.rstrip("0123456789").rstrip("_").split("_int")[0] for name in names}


@pytest.mark.parametrize("free", [pytest.param(False, marks=pytest.mark.slow), True])
def test_regions_compute_what_depends_on_no_sample(net: Net, free: bool) -> None:
    """Whether the number of tokens is known or not."""
    model = Masked().eval()
    sizes = {"x": {0: AUTO, 1: AUTO}} if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = qfx.quantize(model, (ROWS,), target="native", dynamic_shapes=sizes, verbose=False)
    assert isinstance(gm, fx.GraphModule)
    (inside,) = insides(gm)
    assert not ops(outside(gm)) & FOLDED
    assert not free or {"ones", "tril", "arange"} <= ops(inside)
    (region,) = regions_of(gm).values()
    assert len([n for n in region.graph.graph.nodes if n.op == "placeholder"]) == 1
    gm.graph.lint()
    for x in (ROWS[:2], torch.randn(3, 9, 6)) if free else (ROWS[:2],):
        with torch.no_grad():
            assert torch.equal(gm(x), inlined(gm)(x))
            assert gm(x).sub(model(x)).abs().max() < 0.3


def test_what_depends_on_the_number_of_samples_stays_outside(net: Net) -> None:
    """A region is compiled for any number of them."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        samples = torch.arange(x.shape[0]).float()
        return s.b(s.a(x) * samples[:, None, None] + torch.ones(x.shape[0]).sum() / x.shape[0])

    model = net(forward, **linears("a", "b"))
    gm = lowered(model, ROWS)
    assert {"arange", "ones", "sum"} <= ops(outside(gm))
    assert all(not ops(inside) & {"arange", "ones", "sum"} for inside in insides(gm))
    check(gm, model, ROWS)


def test_chance_is_not_computed_once(net: Net) -> None:
    model = net(lambda s, x: s.b(s.a(x) + torch.rand(5, 1)), **linears("a", "b"))
    gm = lowered(model, ROWS)
    assert "rand" in ops(outside(gm))
    with torch.no_grad():
        assert not torch.equal(gm(ROWS), gm(ROWS))


def test_a_buffer_that_the_model_writes_is_no_constant(net: Net) -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.count.add_(0.01)
        return s.b(s.a(x)) + s.count * 2

    model = net(forward, **linears("a", "b"))
    model.register_buffer("count", torch.zeros(1))
    gm = lowered(model, ROWS)
    with torch.no_grad():
        before = gm(ROWS)
        assert not torch.equal(before, gm(ROWS))


def test_moves_stay_where_their_elements_are(net: Net) -> None:
    """Those of what is not native stay outside; those of inputs and of results go in."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        y = s.a(x.transpose(1, 2).reshape(-1, 5, 6)).unsqueeze(1).cumsum(2)
        return s.b(y.squeeze(1).flip(1)[:, 1:])

    model = net(forward, **linears("a", "b"))
    gm = lowered(model, ROWS)
    first, second = (ops(inside) for inside in insides(gm))
    assert {"transpose", "reshape", "unsqueeze"} <= first
    assert {"squeeze", "slice"} <= ops(outside(gm)) and not {"squeeze", "slice"} & second
    check(gm, model, ROWS)


def test_views_outside_do_not_ask_for_strides(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's results are contiguous, other than those of the operators in its place."""
    model = net(lambda s, x: s.a(x).transpose(1, 2).sin().transpose(1, 2).view(-1, 30).cumsum(1), **linears("a"))
    gm = lowered(model, ROWS)

    def contiguous(self: NativeRegion, *inputs: Tensor) -> Declined:
        return Declined("not in this test", lambda *x: self.graph(*x).contiguous())

    with torch.no_grad():
        want = gm(ROWS)
        monkeypatch.setattr(NativeRegion, "outcome", contiguous)
        assert torch.equal(gm(ROWS), want)


def test_what_is_free_serves_those_outside_as_well(net: Net) -> None:
    """The model gives what its regions fold, too."""

    def forward(s: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(x.shape[1]).float()[:, None] * s.a.bias
        return s.a(x) + places, places, places.cumsum(0)

    model = net(forward, **linears("a"))
    gm = lowered(model, ROWS)
    with torch.no_grad():
        for got, want in zip(gm(ROWS[:2]), inlined(gm)(ROWS[:2]), strict=True):
            assert torch.equal(got, want)
        for got, want in zip(gm(ROWS[:2])[1:], model(ROWS[:2])[1:], strict=True):
            assert torch.equal(got, want)


def test_notes_are_of_floats_alone(net: Net) -> None:
    model = net(lambda s, x, i: (s.a(x).sin(), i.cumsum(1) * 2, i > 3, (i > 3).any(1)), **linears("a"))
    gm = lowered(model, ROWS, torch.arange(20).view(4, 5))
    notes = [text for topic, text in graph_info(gm).notes if topic == "not native"]
    assert len(notes) == 1 and "sin" in notes[0]
