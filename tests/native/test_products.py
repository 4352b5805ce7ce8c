"""Products of two activations in native programs: exactly those of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from qfx import jit
from qfx.meta import graph_info
from qfx.targets.native import products
from qfx.targets.native.agreement import compare
from qfx.targets.native.declined import Declined
from qfx.targets.native.inlined import inlined
from qfx.targets.native.region import NativeRegion

from ..targets import regions as r
from .many_products import ADD, ADD_FLOAT, HIGH, INT8, LOW, ODD, RELU, SIGMOID, UINT8, Case, graph_of, inputs_of
from .nets import Net, assert_agrees, assert_near, linears, native

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

OUT, OUT_SIGNED = r.qparams(0.2, 100), r.qparams(0.2, -3, torch.int8)
SHAPES = (
    Case(1, 1, 1),
    Case(1, 1, 1, (1,), output=OUT),
    Case(7, 5, 9, output=OUT),
    Case(13, 33, 17, (3,)),
    Case(1, 64, 16, (2,), output=OUT),  # one row, a whole tile
    Case(6, 2, 1, (5,)),
    Case(5, 1, 35, (2,), output=OUT),
    Case(70, 3, 40),
    Case(300, 300, 3),  # more rows than a panel holds
    Case(3, 130, 31, (1,)),
)
LAYOUTS = (
    Case(6, 5, 7, right_order=(0, 2, 1)),
    Case(6, 5, 7, left_order=(0, 2, 1), right_order=(0, 2, 1), output=OUT),
    Case(6, 19, 17, (3,), right_order=(0, 1, 3, 2)),
    Case(6, 5, 7, (3,), left_order=(0, 2, 1, 3), right_order=(0, 2, 3, 1), output=OUT),  # heads between
    Case(6, 5, 7, (3,), left_order=(0, 2, 1, 3), right_order=(0, 2, 1, 3)),
    Case(6, 5, 18, (3,), right_order=(0, 3, 2, 1)),  # neither rows nor columns side by side
    Case(6, 5, 7, (3,), left_order=(0, 3, 2, 1)),
    Case(4, 1, 1, (2,), left_order=(0, 1, 3, 2), right_order=(0, 3, 1, 2)),
    Case(6, 5, 7, (2, 3), output=OUT, steps=(ADD,)),  # windows of each sample, and heads of each
    Case(6, 5, 7, (2, 3), left_order=(0, 1, 3, 2, 4), right_order=(0, 1, 3, 4, 2)),
    Case(6, 5, 7, (2, 3), left_order=(0, 3, 2, 1, 4), right_order=(0, 2, 1, 3, 4), output=OUT),  # windows inside heads
    Case(6, 5, 7, (1, 3), right_order=(0, 2, 1, 3, 4)),
    Case(6, 5, 7, (2, 1, 2, 2), left_order=(0, 2, 1, 3, 4, 5, 6)),
)
INTEGERS = (
    *(Case(9, 21, 18, left=a, right=b, output=OUT) for a in (UINT8, LOW, INT8) for b in (UINT8, HIGH, INT8, ODD)),
    Case(9, 21, 18, (2,), ODD, LOW, OUT_SIGNED),
    Case(9, 21, 18, (2,), HIGH, INT8),
)
BEHIND = (
    Case(5, 6, 20, output=OUT, steps=(RELU,)),
    Case(5, 6, 20, steps=(RELU,)),
    Case(5, 6, 20, output=OUT, steps=(SIGMOID,)),
    Case(5, 6, 20, (2,), output=OUT, steps=(ADD, RELU)),
    Case(5, 6, 20, (2,), steps=(ADD,)),
    Case(5, 6, 20, (2,), ODD, INT8, OUT_SIGNED, steps=(ADD_FLOAT,)),
    Case(5, 6, 20, steps=(ADD_FLOAT,)),
)
ALL = (*SHAPES, *LAYOUTS, *INTEGERS, *BEHIND)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def region() -> NativeRegion:
    return NativeRegion(graph_of(ALL))


@pytest.mark.parametrize("samples, threads", [(1, 1), (5, 1), (1, 4), (5, 3), (2, 16)])
def test_every_product_is_exact(samples: int, threads: int) -> None:
    inputs = inputs_of(ALL, samples, seed=samples)
    torch.set_num_threads(threads)
    found = compare(region(), inputs, exact=True)
    assert len(region().programs) == 1 and len(found) > len(ALL) + len(inputs)
    off = {d.node.name: d for d in found if d.lsb or (d.relative or 0.0) > (1e-6 if "sigmoid" in d.node.name else 0)}
    assert not off, off


def test_no_samples() -> None:
    for case, y in zip(ALL, region()(*inputs_of(ALL, 0)), strict=True):
        assert y.shape == (0, *case.result)


def test_values_at_the_ends_of_the_range() -> None:
    """All integers at their bounds: the greatest sums and the greatest parts of zero points."""
    for sign_left in (9, -9):
        for sign_right in (9, -9):
            inputs = [x.abs() * 1e3 * (sign_left, sign_right)[i % 2] for i, x in enumerate(inputs_of(ALL, 1))]
            assert not any(d.lsb or d.relative for d in compare(region(), tuple(inputs), exact=True))


def test_the_longest_sum_stays_in_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    long = tuple(Case(1, products.LONGEST, 2, left=a, right=b) for a in (LOW, HIGH) for b in (LOW, HIGH))
    made = NativeRegion(graph_of(long))
    for left, right in ((1e4, 1e4), (-1e4, 1e4), (1e4, -1e4), (-1e4, -1e4)):
        inputs = tuple(torch.full_like(x, (left, right)[i % 2]) for i, x in enumerate(inputs_of(long, 1)))
        found = compare(made, inputs, exact=True)
        assert found and not any(d.lsb or d.relative for d in found)


# --- in models --------------------------------------------------------------------------------------------------------


def written_out(s: Net, x: Tensor) -> tuple[Tensor, ...]:
    """Attention with its steps written out, as in BERT, and with queries and keys that are one."""
    batch, tokens, _ = x.shape
    q, k, v = (layer(x).view(batch, tokens, 3, 4).transpose(1, 2) for layer in (s.q, s.k, s.v))
    weights = ((q @ k.transpose(-1, -2)) / 2.0 + s.bias).softmax(-1)
    y = s.out((weights @ v).transpose(1, 2).reshape(batch, tokens, 12))
    z = s.a(x)
    turned = z.transpose(1, 2)
    return y, torch.bmm(z, turned), (z @ turned).relu() @ z, s.b(torch.matmul(turned, z))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "xnnpack"])
def test_attention_written_out(recipe: str) -> None:
    ends = {"q": (12, 12), "k": (12, 12), "v": (12, 12), "out": (12, 5), "a": (12, 7), "b": (7, 3)}
    net = Net(written_out, **linears(**ends))
    net.bias = nn.Parameter(torch.randn(3, 6, 6))
    made = native(net, torch.randn(4, 6, 12), recipe=recipe)
    for batch in (1, 3, 0):
        found = assert_agrees(made, torch.randn(batch, 6, 12), lsb=1)
        assert sum("matmul" in d.node.name or "bmm" in d.node.name for d in found) == 6
        off = [d.node.name for d in found if d.lsb and ("matmul" in d.node.name or "bmm" in d.node.name)]
        assert not off


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "repeated": (lambda y: torch.stack([y, y + 1], 1) @ y[:, None], "without repetition"),
    "of rows": (lambda y: y[:, 0] @ y[0], "without repetition"),
    "by a vector": (lambda y: y @ y[0, 0], "without repetition"),
    "long": (lambda y: (z := y.repeat(1, 1, 2731)) @ z.transpose(1, 2), "more than int32 holds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_declines(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a product runs as in the lowered graph, and a note says why."""
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
    forward, why = REFUSED[case]
    net = Net(lambda s, x: forward(s.a(x)), **linears(a=(6, 6)))
    made = native(net, x := torch.randn(4, 6, 6))
    notes = [text for topic, text in graph_info(made).notes if topic == "not native"]
    assert any(why in note and "matmul" in note for note in notes), notes
    with torch.no_grad():
        assert_near(made(x), net(x), tolerance=0.1)
        assert_near(made(x), inlined(made)(x), tolerance=1e-6)
