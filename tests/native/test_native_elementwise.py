"""Float arithmetic, functions, batch norms, means and softmax between the layers of native programs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import jit
from qfx.meta import graph_info
from qfx.targets.native.declined import Declined
from qfx.targets.native.inlined import inlined
from qfx.targets.native.region import NativeRegion

from .nets import Net, assert_agrees, assert_near, calls_of, disagreements, kernels, linears, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def parameters(**sizes: tuple[int, ...]) -> Net:
    """A net that holds nothing but parameters."""
    made = Net(lambda s: None)
    for name, size in sizes.items():
        setattr(made, name, nn.Parameter(torch.randn(size)))
    return made


def normed(norm: nn.Module) -> nn.Module:
    """With statistics and parameters as after training."""
    for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm.eval()


@pytest.mark.slow
def test_numbers_and_constants_in_every_place() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        p, y = s.p, s.n(s.first(x))  # [N, 5, 10]
        return (
            y + 1.5, y - 2, 3 * y, y / 7, -0.1 * y, y * 16777217, y + math.inf, y * 1e-40,
            y + p.row, p.row - y, y * p.column, y / p.full, p.full / (y.abs() + 1), p.column + y,
            y + p.scalar, p.scalar - y, y * p.one, y + p.lead, p.lead3 * y, y.mean(-1) + p.times, y.mean(-1) * 2,
        )  # fmt: skip

    constants = {"row": (10,), "column": (5, 1), "full": (5, 10), "scalar": (), "one": (1,), "lead": (1, 5, 1)}
    p = parameters(**constants, lead3=(1, 1, 10), times=(5,))
    made = native(Net(forward, p=p, n=normed(nn.LayerNorm(10)), **linears(first=(12, 10))), torch.randn(4, 5, 12))
    for batch in (1, 3, 0):
        calls = calls_of(made, x := torch.randn(batch, 5, 12))
        found = disagreements(made, x, regions=len(calls))
        assert len(calls) == 1 and len(found) > 20
        assert all((d.relative or 0) <= 1e-5 for d in found if not math.isnan(d.relative or 0)), found


def test_constants_of_images_in_either_order() -> None:
    """Behind a convolution channels lie side by side; in front of one they do not."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        p, y = s.p, s.conv(x)  # [N, 4, 6, 5], channels last
        return (
            s.last((x - p.mean) / p.std), x * p.grid, x + p.line + p.whole,
            y.sin() * 2 + p.scale, y * p.scale, y * p.grid, y - p.places,
            p.places[:, :1] + y, y + p.corner,
            y * y.flip(1)[:, :1], y + y[:, :, :1], y * y[:, :1, :, :1], y * x[:, :1], y.permute(0, 2, 3, 1) * p.last,
            y + y.transpose(2, 3).reshape(-1, 4, 6, 5), (y + x[:, :1].abs().sqrt()).neg(),
        )  # fmt: skip

    constants = {"mean": (3, 1, 1), "std": (1, 3, 1, 1), "scale": (4, 1, 1), "grid": (1, 1, 6, 5), "line": (6, 1)}
    p = parameters(**constants, whole=(3, 6, 5), places=(4, 6, 5), corner=(1, 4, 1, 5), last=(4,))
    convs = {"conv": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Conv2d(3, 2, 3, padding=1)}
    made = native(Net(forward, p=p, **convs), torch.randn(4, 3, 6, 5))
    for batch in (1, 3):
        calls = calls_of(made, x := torch.randn(batch, 3, 6, 5))
        assert_agrees(made, x, regions=len(calls), lsb=1)


@pytest.mark.slow
def test_operands_that_repeat() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.n(s.first(x))  # [N, 6, 12]
        heads = y.view(-1, 6, 3, 4).transpose(1, 2)  # [N, 3, 6, 4]
        keys = y[:, None, None, 0, :4]  # [N, 1, 1, 4]
        return (
            heads + keys, keys - heads, heads * heads[:, :1], heads / (heads[:, :, :1] + 9), y[:, :, :1] * y[:, :1],
            heads * y[:, None, :, :1], y * y, y - y, (y * y).mean(-1, keepdim=True), y * y.mean(-1, keepdim=True),
            y[:, :, None] + y[:, None, :, :],
        )  # fmt: skip

    made = native(Net(forward, n=normed(nn.LayerNorm(12)), **linears(first=(10, 12))), torch.randn(4, 6, 10))
    for batch in (1, 3, 0):
        assert_agrees(made, torch.randn(batch, 6, 10))


@pytest.mark.slow
def test_rounding_is_part_of_the_step() -> None:
    """Of arithmetic, functions, norms of batches, means and softmax: no step rounds what another has computed."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.n(x)
        return (
            s.a(y * y), s.b(y.sigmoid()[:, :, :8] + s.p.row), s.c(y.softmax(-1)), s.d(y.mean(-1)),
            s.e(kept := y * 2), kept, s.f((y + 1).view(-1, 5, 2, 4).transpose(1, 2)),
        )  # fmt: skip

    ends = {"a": (8, 3), "b": (8, 3), "c": (8, 3), "d": (5, 3), "e": (8, 3), "f": (4, 3)}
    net = Net(forward, p=parameters(row=(8,)), n=normed(nn.LayerNorm(8)), **linears(**ends))
    made = native(net, torch.randn(4, 5, 8))
    assert_agrees(made, x := torch.randn(3, 5, 8), lsb=1)
    assert "quantize" not in kernels(made, x)


@pytest.mark.slow
def test_functions() -> None:
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda y: y**2, lambda y: y.pow(3), lambda y: y**2.0, torch.square, lambda y: y.abs().sqrt(),
        lambda y: (y.abs() + 1e-3).rsqrt(), torch.neg, torch.abs, torch.sqrt, torch.rsqrt, torch.relu,
        lambda y: F.leaky_relu(y, negative_slope=0.3), lambda y: y.rsqrt().relu(),
    )  # fmt: skip

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y, z = s.n(s.first(x)), s.conv(x[:, None]).permute(0, 2, 3, 1)
        return (*(f(y) for f in functions), *(f(z) for f in functions[:6]))

    net = Net(forward, n=nn.LayerNorm(9), conv=nn.Conv2d(1, 3, 3), **linears(first=(12, 9)))
    made = native(net, torch.randn(4, 5, 12))
    x = torch.randn(3, 5, 12)
    calls = calls_of(made, x)
    for d in disagreements(made, x, regions=len(calls)):
        assert math.isnan(d.relative or 0) or ((d.relative or 0) < 1e-6 and not d.lsb), d
    with torch.no_grad():
        for got, want in zip(made(x), inlined(made)(x), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, rtol=0.05, atol=0.05)


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str, str]] = {
    "add of a scaled operand": (lambda s, y: torch.add(y, y.sin(), alpha=2), "add", "neither scales"),
    "sub of a scaled operand": (lambda s, y: torch.sub(y.sin(), s.p.row, alpha=0.5), "sub", "neither scales"),
    "rounded quotient": (lambda s, y: torch.div(y, 0.3, rounding_mode="floor"), "div", "nor rounds"),
    "other power": (lambda s, y: y.abs() ** 1.5, "pow", "squares and cubes"),
    "power of a number": (lambda s, y: 2**y, "pow", "squares and cubes"),
    "softmax of heads": (lambda s, y: y.softmax(1), "softmax", "over the last"),
    "mean of samples": (lambda s, y: y.sin().mean((0, 2)), "mean", "of each sample"),
    "mean of all": (lambda s, y: y.sin().mean(), "mean", "of each sample"),
    "float64": (lambda s, y: (y.double() * 2).float(), "mul", "float32"),
    "samples": (lambda s, y: y.sin()[:, 0, 0].softmax(-1), "softmax", "not the batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_declines(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
    forward, name, why = REFUSED[case]
    net = Net(lambda s, x: forward(s, s.a(x)), p=parameters(row=(6,)), **linears(a=(6, 6)))
    made = native(net, x := torch.randn(4, 5, 6))
    notes = [text for topic, text in graph_info(made).notes if topic == "not native"]
    assert any(why in note and name in note for note in notes), notes
    with torch.no_grad():
        assert_near(made(x), net(x), tolerance=0.1)


def test_integers_stay_outside_without_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """That counting is not native is no news."""
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
    net = Net(lambda s, x, i: (s.a(x).sin() + s.a(x), i * 2 + 1, i > 3), **linears(a=(6, 6)))
    made = native(net, torch.randn(4, 5, 6), torch.arange(20).view(4, 5))
    notes = [text for topic, text in graph_info(made).notes if topic == "not native"]
    assert notes and all("sin" in note for note in notes)


def test_one_number_for_a_long_row_is_stored_once() -> None:
    """As images of any size are normalized: a program holds three numbers, not one for every pixel."""
    net = Net(
        lambda s, x: (s.a((x - s.p.mean) / s.p.std), s.n(x * s.p.places)),
        p=parameters(mean=(3, 1, 1), std=(1, 3, 1, 1), places=(9, 1)),
        a=nn.Conv2d(3, 2, 1),
        n=normed(nn.BatchNorm2d(3)),
    )
    made = native(net, torch.randn(4, 3, 9, 37))
    assert_agrees(made, torch.randn(2, 3, 9, 37))
    (program,) = region_of(made).programs
    assert program.constant_bytes < 9000, "less than one image"


def test_nothing_at_all() -> None:
    """Parts without elements are no reason to fail."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        return s.a(x)[:, 5:] + 1.5, s.a(x)[:, :, 6:].softmax(-1)

    made = native(Net(forward, **linears(a=(6, 6))), x := torch.randn(4, 5, 6))
    assert [y.shape for y in made(x)] == [(4, 0, 6), (4, 5, 0)]


# --- batch norm -------------------------------------------------------------------------------------------------------


def test_batch_norms_that_no_layer_takes_in() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.conv(x)  # [N, 4, 6, 5]
        rows = F.adaptive_avg_pool2d(y, 1).flatten(1)
        joined = torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1)
        return (
            s.n8(joined), s.last(s.n8(joined).relu()), s.bare(F.avg_pool2d(y, 2)), s.n3(x), s.n5(y.transpose(1, 3)),
            s.rows(rows), s.b(s.rows(rows)), s.lines(y.flatten(2)), s.c(s.lines(y.flatten(2)).sin()), s.other(x[:, 0]),
        )  # fmt: skip

    norms = {"n8": nn.BatchNorm2d(8), "bare": nn.BatchNorm2d(4, affine=False, eps=0.1), "n3": nn.BatchNorm2d(3)}
    norms |= {"n5": nn.BatchNorm2d(5), "rows": nn.BatchNorm1d(4), "lines": nn.BatchNorm1d(4)}
    parts = {name: normed(norm) for name, norm in (norms | {"other": nn.BatchNorm1d(6, affine=False)}).items()}
    convs = {"conv": nn.Conv2d(3, 4, 3, padding=1), "last": nn.Conv2d(8, 2, 3, padding=1)}
    made = native(Net(forward, **parts, **convs, **linears(b=(4, 3), c=(30, 3))), torch.randn(4, 3, 6, 5))
    for batch in (1, 3, 0):
        calls = calls_of(made, x := torch.randn(batch, 3, 6, 5))
        found = assert_agrees(made, x, regions=len(calls), lsb=1)
        assert sum("batch_norm" in d.node.name for d in found) >= 6


def test_batch_norms_of_samples_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without statistics the samples of a batch are not apart."""
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
    net = Net(lambda s, x: s.n(s.a(x).sin()), n=nn.BatchNorm1d(5, track_running_stats=False), **linears(a=(6, 4)))
    made = native(net, x := torch.randn(4, 5, 6))
    notes = [text for topic, text in graph_info(made).notes if topic == "not native"]
    assert any("have statistics" in note for note in notes), notes
    assert_near(made(x), net(x), tolerance=0.1)


# --- means and softmax ------------------------------------------------------------------------------------------------


def test_means_and_softmax() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.n(s.first(x))  # [N, 5, 37]
        z = s.conv(x[:, None])  # [N, 3, 3, 10], channels last
        return (
            y.mean(-1), y.mean(2, keepdim=True), y.mean(-1).mean(-1), y[:, 0].mean(-1), y.transpose(1, 2).mean(-1),
            z.mean(-1), z.mean(3, keepdim=True), y[:, :, :1].mean(-1), y.mean(1), y.mean((2, 1)), z.mean((1, -1)),
            z.mean((2, 3), keepdim=True), z.mean((1, 2, 3)), s.last(y.mean(1)), y.softmax(-1), y.softmax(2),
            y.transpose(1, 2).softmax(-1), z.softmax(-1), y[:, 0].softmax(1), y[:, :, :1].softmax(-1),
            (y * 1e4).softmax(-1), (y + s.p.hide).softmax(-1),
        )  # fmt: skip

    parts = {"n": normed(nn.LayerNorm(37)), "conv": nn.Conv2d(1, 3, 3), "p": Net(lambda s: None)}
    net = Net(forward, **parts, **linears(first=(12, 37), last=(37, 2)))
    net.p.hide = nn.Parameter(torch.zeros(37).masked_fill(torch.arange(37) > 20, -torch.inf))
    made = native(net, torch.randn(4, 5, 12))
    for batch in (1, 3, 0):
        calls = calls_of(made, x := torch.randn(batch, 5, 12))
        found = disagreements(made, x, regions=len(calls))
        assert sum("mean" in d.node.name for d in found) >= 14 and sum("softmax" in d.node.name for d in found) >= 8
        off = [d for d in found if (d.relative or 0) > 2e-5 and "hide" not in d.node.name]
        assert not off, off


def test_softmax_of_all_samples_is_not_taken_by_sample() -> None:
    """One dimension is the batch, or holds it: probabilities over samples."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.a(x).mean(-1)  # [N, 5]
        return y.mean(-1).softmax(-1), y.reshape(-1).softmax(0)

    made = native(Net(forward, **linears(a=(6, 4))), torch.randn(4, 5, 6))
    for batch in (1, 3):
        with torch.no_grad():
            x = torch.randn(batch, 5, 6)
            assert_near(made(x), inlined(made)(x), tolerance=1e-5)
            assert all(float(y.sum()) == pytest.approx(1) for y in made(x))
