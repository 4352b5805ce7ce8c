"""Weights and activations of 2 to 8 bits in one graph: one integer region, packed weights, real sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qfx
from qfx import affine, kernels
from qfx.ops import dequantize, quantize
from qfx.targets import Leaf, QParams, Target, requantization
from qfx.targets.reference import Reference
from qfx.targets.x86 import X86
from qfx.targets.x86_point import TableLeaf

from . import regions as r

BITS = (2, 3, 4, 6, 8)
LAYERS = ("a", "b", "c", "d", "fc")
Widths = dict[str, tuple[int, int]]

pytestmark = [
    pytest.mark.filterwarnings("ignore::qfx.QfxWarning"),
    pytest.mark.skipif(X86().unavailable() is not None, reason=str(X86().unavailable())),
]


# --- one requantization -----------------------------------------------------------------------------------------------


@st.composite
def ends(draw: st.DrawFn) -> QParams:
    """Parameters per tensor of 2 to 8 bits, signed or not, with any zero point of the range."""
    signed, bits = draw(st.booleans()), draw(st.sampled_from(BITS))
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits) - 1
    scale = draw(st.floats(2.0**-13, 8.0, width=32))
    return r.qparams(scale, draw(st.integers(low, high)), torch.int8 if signed else torch.uint8, low, high)


def limits(q: QParams) -> dict[str, Any]:
    return {"quant_min": q.quant_min, "quant_max": q.quant_max, "dtype": q.dtype}


def every(dtype: torch.dtype) -> Tensor:
    known = torch.iinfo(dtype)
    return torch.arange(known.min, known.max + 1).to(dtype)


MEMORY = {
    "plain": lambda q: q,
    "channels last": lambda q: q.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda q: torch.stack([q, q], -1)[..., 0],
}


@given(ends(), ends(), st.sampled_from(sorted(MEMORY)))
def test_a_requantization_is_a_table_with_the_same_bits(old: QParams, new: QParams, memory: str) -> None:
    """All 256 integers, those beyond the range too, as quantize and dequantize give them, by loops and by ATen."""
    q = MEMORY[memory](every(old.dtype).reshape(2, 8, 4, 4))
    given_, wanted = (old.scale, old.zero_point), (new.scale, new.zero_point)
    by_loops = kernels.quantize(kernels.dequantize(q, *given_), *wanted, **limits(new))
    by_aten = affine.quantize(affine.dequantize(q, *given_), *wanted, **limits(new))
    for target in (X86(), Reference()):
        leaf = target.lower_point(requantization(old, new))
        assert isinstance(leaf, Leaf)
        got = leaf(q)
        assert got.dtype == new.dtype and torch.equal(got, by_loops) and torch.equal(got, by_aten)


def test_x86_looks_it_up() -> None:
    leaf = X86().lower_point(requantization(r.qparams(0.02, 100), r.qparams(0.3, 7, torch.uint8, 0, 15)))
    assert isinstance(leaf, TableLeaf) and leaf.kernel == "table requantize"


def test_a_requantization_compiles_and_exports() -> None:
    leaf = X86().lower_point(requantization(r.qparams(0.02, 100), r.qparams(0.3, -1, torch.int8, -4, 3)))
    q = torch.randint(0, 256, (3, 70), dtype=torch.uint8)
    compiled = torch.compile(leaf, backend="eager", fullgraph=True)
    exported = torch.export.export(leaf, (q,)).module()
    assert torch.equal(compiled(q), leaf(q)) and torch.equal(exported(q), leaf(q))


@given(st.integers(0, 300), st.sampled_from([torch.uint8, torch.int8]), st.integers(0, 2**20))
def test_lookups_of_whole_vectors_and_their_rest(n: int, dtype: torch.dtype, seed: int) -> None:
    """A table without any order, at every offset from the start of a vector."""
    table = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    q = every(dtype).repeat(2)[seed % 200 :][:n]
    assert torch.equal(kernels.lookup(q, table), table[q.long() - torch.iinfo(dtype).min])


# --- a whole net ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual sum, parts of one value, a cat, a mean, and a linear layer: every value has several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 10, 1, bias=False), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.fc = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = (self.b(x) + x).relu()
        left, right = self.c(x).chunk(2, 1)
        x = torch.cat([left, self.d(right) + right], 1)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def lowered(widths: Widths, sums: int, *targets: Target) -> list[fx.GraphModule]:
    """The net with ``widths`` of each layer's (weight, activation), for each target; conversion checks it."""
    torch.manual_seed(0)
    recipe = qfx.Recipe.int8().set(op="add", activation=sums)
    for layer, (weight, activation) in widths.items():
        recipe = recipe.set(layer, weight=weight, activation=activation)
    model, made = Net().eval(), []
    for target in targets:
        prepared = qfx.calibrate(qfx.prepare(model, X, recipe=recipe, target=target), [X])
        gm = qfx.convert(prepared, check=True)
        assert isinstance(gm, fx.GraphModule)
        made.append(gm)
    return made


class Twins(fx.Interpreter):
    """Runs a lowered graph; gives every leaf's integers to the other target's leaf of that name too."""

    def __init__(self, gm: fx.GraphModule, other: fx.GraphModule) -> None:
        super().__init__(gm)
        self.other = {n.name: other.get_submodule(str(n.target)) for n in other.graph.nodes if n.op == "call_module"}
        self.compared: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        copies = [t.clone() for t in self.fetch_args_kwargs_from_env(n)[0]] if n.op == "call_module" else []
        got = super().run_node(n)
        if n.op == "call_module":
            want = self.other[n.name](*copies)
            if want.is_floating_point():
                assert r.relative(got, want) <= 1e-5, n.name
            else:
                self.compared[n.name] = r.worst_lsb(got, want)
        return got


pairs = st.tuples(st.sampled_from(BITS), st.sampled_from(BITS))


@settings(max_examples=settings.default.max_examples // 5)  # each converts two models
@given(st.fixed_dictionaries({layer: pairs for layer in LAYERS}), st.sampled_from(BITS))
def test_any_widths_are_one_integer_region(widths: Widths, sums: int) -> None:
    gm, reference = lowered(widths, sums, X86(), Reference())
    for made in (gm, reference):
        assert [n.name for n in made.graph.nodes if n.target in (quantize, dequantize)] == ["x_quantize"]
        assert (qfx.report(made).crossings, qfx.report(made).regions) == (1, 1)
    twins = Twins(gm, reference)
    twins.run(X, enable_io_processing=False)
    assert len(twins.compared) >= 6 and max(twins.compared.values()) <= 1, twins.compared
    rows = {row.layer: row for row in qfx.report(gm).rows if row.layer}
    assert {layer: (rows[layer].weight_bits, rows[layer].activation_bits) for layer in LAYERS} == widths
    adds = {row.activation_bits for row in qfx.report(gm).rows if row.operator == "add"}
    assert adds == {sums}
    assert qfx.report(gm).weight_bytes_after == expected_bytes(gm, widths)


def expected_bytes(gm: fx.GraphModule, widths: Widths) -> int:
    """Packed weights by rows, a float32 scale and a bias of 4 bytes a channel, and 8 bytes for every other scale."""
    total = 0
    for layer, (bits, _) in widths.items():
        module = getattr(Net(), layer)
        channels, length = module.weight.shape[0], math.prod(module.weight.shape[1:])
        total += channels * math.ceil(length * bits / 8) + 4 * channels * (1 + (module.bias is not None))
        total += 4  # the zero points of symmetric weights: one number
    alone = [name for name, t in gm.named_buffers() if name.endswith("scale") and t.ndim == 0]
    return total + 8 * len(alone)


def test_running_keeps_nothing_unpacked_in_the_state_dict() -> None:
    (gm,) = lowered({layer: (2, 4) for layer in LAYERS}, 8, X86())
    before = {name: (t.shape, t.dtype) for name, t in gm.state_dict().items()}
    gm(X)
    assert {name: (t.shape, t.dtype) for name, t in gm.state_dict().items()} == before
    assert before["b.weight"] == ((8, 18), torch.uint8)  # 72 weights of 2 bits


def test_the_report_tells_of_every_requantization() -> None:
    (gm,) = lowered({"a": (4, 8), "b": (8, 4), "c": (4, 4), "d": (3, 6), "fc": (8, 8)}, 8, X86())
    told = [text for topic, text in qfx.report(gm).notes if topic == "requantized"]
    assert told == ["relu: 8 to 4 bits for conv2d_1", "getitem_1: 8 to 6 bits for conv2d_3"]


@pytest.mark.parametrize("target", [X86(), Reference()])
def test_zero_points_that_differ_are_kept(target: Target) -> None:
    """Affine weights have a zero point a channel, symmetric ones a single number."""
    affine_ = qfx.QuantSpec(qfx.IntType(4, True), qfx.Scheme.AFFINE, qfx.PerAxis(0))
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight += torch.arange(5.0)[:, None] / 5
    for weight, shape in ((affine_, (5,)), (4, ())):
        recipe = qfx.Recipe.int8().set(op="linear", weight=weight)
        gm = qfx.quantize(nn.Sequential(layer).eval(), torch.randn(4, 6), recipe=recipe, target=target, verbose=False)
        (leaf,) = [m for m in gm.modules() if isinstance(m, Leaf)]
        assert leaf.weight_qparams.zero_point.shape == shape
