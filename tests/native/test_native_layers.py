"""Convolutions and linear layers of native programs: every value is what the reference makes of the program's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qfx import jit
from qfx.recipe import Recipe

from .nets import Branches, Net, assert_agrees, disagreements, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def conv(*args: int, act: nn.Module | None = None, **options: object) -> nn.Module:
    """A convolution on the image, then one on bytes that have a border, whose bias is in the second's output."""
    inner = nn.Conv2d(*args, **options)  # type: ignore[arg-type]
    return nn.Sequential(inner, act or nn.ReLU(), nn.Conv2d(args[1], 5, 3, padding=1))


def geometries() -> Branches:
    return Branches(
        stem=conv(3, 8, 3, stride=2, padding=1, act=nn.ReLU6()),
        pointwise=conv(3, 33, 1),
        strided=conv(3, 5, 1, stride=2),
        wide=conv(3, 7, 5, padding=2),
        dilated=conv(3, 9, 3, dilation=2, padding=2),
        row=conv(3, 4, (1, 5), padding=(0, 2)),
        column=conv(3, 4, (4, 1), stride=(2, 1), padding=(3, 0)),
        uneven=conv(3, 6, 3, stride=(1, 3), padding=(2, 0), dilation=(1, 2)),
        larger=conv(3, 4, 11, padding=6),
        cornered=conv(3, 4, (7, 2), padding=(5, 1), stride=5),
        grouped=conv(3, 12, 3, groups=3, padding=1),
        depthwise=conv(3, 3, 3, groups=3, padding=1),
        one=nn.Conv2d(3, 1, (9, 7)),  # an image of one pixel, and one channel
        no_bias=nn.Conv2d(3, 17, 2, bias=False),
    )


def depths() -> Branches:
    """Behind a layer of 32 channels, which the transformed kernels take."""
    return Branches(
        squares=nn.Conv2d(32, 40, 3, padding=1),
        inside=nn.Conv2d(32, 16, 3),
        depthwise=nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU6(), nn.Conv2d(32, 7, 1)),
        large=nn.Conv2d(32, 32, 5, padding=2, stride=2, groups=32),
        multiplied=nn.Conv2d(32, 64, 3, padding=1, groups=32),
        grouped=nn.Conv2d(32, 36, 3, padding=1, groups=4),
        flat=nn.Sequential(nn.Flatten(), nn.Linear(32 * 9 * 7, 19)),
    )


def rows() -> Branches:
    return Branches(
        wide=nn.Sequential(nn.Linear(6, 70), nn.ReLU(), nn.Linear(70, 3)),
        thin=nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 5)),
        plain=nn.Linear(6, 31, bias=False),
    )


BATCHES = [1, 3, 17, 0]


@pytest.fixture(scope="module")
def stack() -> Net:
    """Everything in one program: branches on an image, and branches behind a wide layer."""
    torch.manual_seed(0)
    return Net(
        lambda self, x: (*self.geometries(x), *self.depths(self.stem(x).relu())),
        geometries=geometries(),
        depths=depths(),
        stem=nn.Conv2d(3, 32, 3, padding=1),
    )


@pytest.fixture(scope="module")
def images(stack: Net) -> torch.fx.GraphModule:
    return native(stack, torch.randn(4, 3, 9, 7))


@pytest.mark.parametrize("batch", BATCHES)
def test_convolutions(images: torch.fx.GraphModule, batch: int) -> None:
    assert_agrees(images, torch.randn(batch, 3, 9, 7))
    assert len(region_of(images).programs) == 1, "one program for every batch"


def test_layouts_of_the_input(images: torch.fx.GraphModule) -> None:
    x = torch.randn(3, 3, 9, 7)
    wanted = images(x)
    for same in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(6, 3, 9, 14)[::2, :, :, ::2].copy_(x),
    ):
        for got, want in zip(images(same), wanted, strict=True):
            assert torch.equal(got, want)


def test_inputs_are_not_written(images: torch.fx.GraphModule) -> None:
    x = torch.randn(2, 3, 9, 7)
    kept = x.clone()
    images(x)
    assert torch.equal(x, kept)


def test_results_are_the_caller_s(images: torch.fx.GraphModule) -> None:
    """A second call does not write what the first gave."""
    first = images(torch.randn(2, 3, 9, 7))
    kept = [y.clone() for y in first]
    images(torch.randn(2, 3, 9, 7))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("recipe", ["xnnpack", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_signed_data(stack: Net, recipe: str) -> None:
    """Data of int8, of which tensorrt's have a zero point of zero."""
    kept = {n: stack.geometries.branches[n] for n in ("stem", "uneven", "larger", "grouped", "depthwise")}
    if recipe == "xnnpack":  # the fast one is a part of the whole
        squares = stack.depths.branches["squares"]
        stack = Net(lambda s, x: (*s.a(x), s.c(s.b(x).relu())), a=Branches(**kept), b=stack.stem, c=squares)
    made = native(stack, torch.randn(4, 3, 9, 7), recipe=recipe)
    assert_agrees(made, torch.randn(3, 3, 9, 7))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_sets(stack: Net, images: torch.fx.GraphModule, isa: str) -> None:
    """Every set that this machine has gives the same bits."""
    from qfx.targets.native.isa import supported

    if isa not in {known.name for known in supported()[1:]}:
        pytest.skip("this CPU has not got it, or takes it anyway")
    x = torch.randn(3, 3, 9, 7)
    wanted = images(x)
    region = region_of(images)
    region.isa, kept = isa, region.isa
    region._forget()
    try:
        got = images(x)
    finally:
        region.isa = kept
        region._forget()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_few_bits() -> None:
    """Weights and data of 2 to 8 bits; few bits have their bias in float."""
    pairs = ((2, 8), (3, 8), (4, 8), (5, 8), (6, 8), (7, 8), (8, 4), (4, 4), (3, 3), (2, 2))
    widths = {f"w{w}a{a}": (w, a) for w, a in pairs}
    convs = {name: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 5, 3)) for name in widths}
    recipe = Recipe.int8()
    for name, (weight, activation) in widths.items():
        recipe = recipe.set(f"branches.{name}", weight=weight, activation=activation)
    made = native(Branches(**convs), torch.randn(4, 3, 8, 8), recipe=recipe)
    assert_agrees(made, torch.randn(3, 3, 8, 8))


EPILOGUES = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.3, 0.4),
    "clamp": Net(lambda self, y: y.clamp(-0.2)),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


def epilogues() -> Branches:
    """Behind a convolution whose result is bytes, one whose result is floats, and a linear layer."""
    found = {}
    for name, act in EPILOGUES.items():
        found[f"conv_{name}"] = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), act, nn.Conv2d(9, 2, 1), act)
        found[f"linear_{name}"] = nn.Sequential(nn.Linear(6, 9), act, nn.Linear(9, 18), act)
    return Branches(**found)


def test_epilogues() -> None:
    made = native(epilogues(), torch.randn(4, 3, 6, 6))
    found = disagreements(made, torch.randn(3, 3, 6, 6) * 2)
    off = {d.node.name: d for d in found if (d.lsb or 0) > 1 or (d.relative or 0.0) > 1e-5}
    assert not off, off
    assert sum(bool(d.lsb) for d in found) <= len(found) // 10, "exponentials differ in the last bit, seldom in a byte"


def residuals() -> Branches:
    def block(forward: object, channels: int = 9) -> Net:
        assert callable(forward)
        parts = {name: nn.Conv2d(channels, channels, 3, padding=1) for name in "abc"}
        return Net(forward, stem=nn.Conv2d(3, channels, 1), **parts)

    return Branches(
        relu=block(lambda s, x: s.c((s.b(s.a(y := s.stem(x).relu()).relu()) + y).relu())),
        plain=block(lambda s, x: s.c(s.a(y := s.stem(x)) + y)),
        swapped=block(lambda s, x: s.c((y := s.stem(x)) + s.a(y))),
        two=block(lambda s, x: s.c(s.a(y := s.stem(x)) + s.b(y))),
        itself=block(lambda s, x: s.c((y := s.a(s.stem(x))) + y)),
        last=block(lambda s, x: s.a(y := s.stem(x)) + s.b(y)),
        with_the_input=Net(lambda s, x: s.a(x) + x, a=nn.Conv2d(3, 3, 3, padding=1)),
        silu=block(lambda s, x: torch.nn.functional.silu(s.a(y := s.stem(x)) + y)),
    )


def linear_residuals() -> Branches:
    def block(forward: object) -> Net:
        assert callable(forward)
        return Net(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), n=nn.LayerNorm(6))

    return Branches(
        floats=block(lambda s, x: s.b(s.n(x + s.a(x)))),
        bytes=block(lambda s, x: s.b(s.a(x).relu() + x)),
        itself=block(lambda s, x: (y := s.a(x)) + y),
        twice=block(lambda s, x: (y := s.a(x)) + s.b(x) + y),
        chain=block(lambda s, x: x + s.a(s.n(x + s.b(s.n(x))))),
        other_rank=Net(lambda s, x: s.a(x) + s.b(x[:, :1]), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
    )


def test_residuals() -> None:
    made = native(Net(lambda s, x: (*s.i(x), *s.l(x)), i=residuals(), l=linear_residuals()), torch.randn(4, 3, 5, 6))
    for batch in (1, 3):
        found = assert_agrees(made, torch.randn(batch, 3, 5, 6), lsb=1)
        assert sum(bool(d.lsb) for d in found) <= len(found) // 10


OFTEN, SELDOM = [(), (4, 3)], [(1, 4), (5,), (1,), (3, 1), (2, 2, 3)]


@pytest.mark.parametrize("shape", [*OFTEN, *(pytest.param(s, marks=pytest.mark.slow) for s in SELDOM)], ids=str)
def test_rows_of_any_rank(shape: tuple[int, ...]) -> None:
    """Rank 2 is one row a sample; rank 4 is no image."""
    made = native(rows(), torch.randn(4, *shape, 6))
    assert_agrees(made, torch.randn(3, *shape, 6))


def test_many_rows() -> None:
    """More than a panel holds, and more than one thread takes."""
    made = native(rows(), torch.randn(4, 200, 6))
    for batch in (1, 5, 0):
        assert_agrees(made, torch.randn(batch, 200, 6))


def test_rows_that_do_not_lie_side_by_side() -> None:
    def forward(s: Net, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        across = x.transpose(1, 2)
        return s.a(across), s.b(x.relu().transpose(1, 2)), s.c(across[:, 1:9:3]), s.d(s.e(x).transpose(1, 2)[:, :, :5])

    parts = {"a": (6, 5), "b": (6, 5), "c": (6, 5), "d": (5, 5), "e": (10, 7)}
    made = native(Net(forward, **{name: nn.Linear(*ends) for name, ends in parts.items()}), torch.randn(4, 6, 10))
    assert_agrees(made, torch.randn(3, 6, 10))


def test_images_that_are_no_images_yet() -> None:
    """What a padded convolution reads may have been moved, cut, joined or made of rows: it has no border then."""
    parts = {name: nn.Conv2d(4, 5, 3, padding=1) for name in "abcdefg"}
    made = native(
        Net(
            lambda s, x: (
                s.a(y := s.stem(x).relu()),
                s.b(y[:, :, 2:6, 1:-1]),
                s.c(y.transpose(2, 3)),
                s.d(y[:, :, ::2]),
                s.e(torch.cat([y, y], 2)),
                s.f(s.rows(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
                s.g(s.rows(y.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 16))),
            ),
            stem=nn.Conv2d(3, 4, 3, padding=1),
            rows=nn.Linear(4, 4),
            **parts,
        ),
        torch.randn(4, 3, 8, 8),
    )
    assert_agrees(made, torch.randn(3, 3, 8, 8))


def test_data_of_channels_last() -> None:
    """[N, H, W, C] at the border of the model."""
    made = native(
        Net(
            lambda s, x: (s.a(y := x.permute(0, 3, 1, 2)), s.b(y).permute(0, 2, 3, 1)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(3, 8, 3, padding=1),
        ),
        torch.randn(4, 6, 5, 3),
    )
    assert_agrees(made, torch.randn(3, 6, 5, 3))
