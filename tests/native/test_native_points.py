"""Operators without weights in native programs: pooling, arithmetic and tables on integers, and the crossings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import jit

from .nets import Branches, Net, assert_agrees, disagreements, native

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def behind(function: object, channels: int = 5) -> Net:
    """``function`` between two convolutions, the second of which reads a border."""
    assert callable(function)
    second = nn.Conv2d(channels, 2, 3, padding=1)
    return Net(lambda s, x: s.second(function(s.first(x))), first=nn.Conv2d(3, channels, 1), second=second)


def at_the_end(function: object, features: int) -> Net:
    """``function`` behind a convolution and before a linear layer."""
    assert callable(function)
    last = nn.Linear(features, 3)
    return Net(lambda s, x: s.last(function(s.first(x).relu())), first=nn.Conv2d(3, 5, 1), last=last)


def pooling() -> Branches:
    return Branches(
        max=behind(nn.MaxPool2d(2)),
        max_padded=behind(nn.MaxPool2d(3, 2, padding=1)),
        max_dilated=behind(nn.MaxPool2d(3, 1, padding=1, dilation=2)),
        max_ceil=behind(nn.MaxPool2d(3, 2, ceil_mode=True)),
        max_uneven=behind(nn.MaxPool2d((1, 4), (2, 3), padding=(0, 2))),
        max_ceil_padded=behind(nn.MaxPool2d(2, 4, padding=1, ceil_mode=True)),
        adaptive=behind(nn.AdaptiveAvgPool2d((3, 2))),
        adaptive_up=behind(nn.AdaptiveAvgPool2d((11, 10))),
        adaptive_row=behind(nn.AdaptiveAvgPool2d((None, 1))),
        twice=behind(lambda y: F.max_pool2d(F.max_pool2d(y, 2), 3)),
        to_one=at_the_end(lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), 5),
        mean=at_the_end(lambda y: y.mean((2, 3)), 5),
        mean_backwards=at_the_end(lambda y: y.mean((-1, -2)), 5),
        mean_kept=at_the_end(lambda y: y.mean((2, 3), keepdim=True).flatten(1), 5),
        max_to_rows=at_the_end(lambda y: F.max_pool2d(y, (9, 7)).flatten(1), 5),
        many=at_the_end(nn.Sequential(nn.Conv2d(5, 70, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 70),
    )


def test_pooling() -> None:
    made = native(pooling(), torch.randn(4, 3, 9, 7))
    for batch in (1, 3, 0):
        found = assert_agrees(made, torch.randn(batch, 3, 9, 7), lsb=1)
        off = [d.node.name for d in found if d.lsb]
        assert len(off) <= 2 and all("avg_pool" in name or "mean" in name for name in off), off


@pytest.mark.slow
def test_pooling_of_signed_integers() -> None:
    branches = pooling().branches
    parts = {name: branches[name] for name in ("max_padded", "adaptive", "mean", "many")}
    made = native(Branches(**parts), torch.randn(4, 3, 9, 7) - 1, recipe="xnnpack")
    assert_agrees(made, torch.randn(3, 3, 9, 7), lsb=1)


def test_arithmetic() -> None:
    """Sums and products of integers, in images with borders, in images of another layout, and in rows."""

    def images(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        a, b = s.a(x), s.b(x)
        gate = F.adaptive_avg_pool2d(a, 1)
        return (
            s.c(a.relu() + b.relu()),
            s.d(a.relu() * b),
            s.e(a.relu() + b.relu().transpose(2, 3)),
            s.f(F.max_pool2d(a, 2) * F.max_pool2d(b, 2)),
            s.g(b.relu() * s.h(gate).sigmoid()),
            (a.relu() + b.relu()).flatten(1),
        )

    def rows(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        a, b = s.a(x), s.b(x)
        return s.c(a.relu() * b), s.d(a.sigmoid() + b.tanh()), s.e((a.relu() + b.relu()).transpose(1, 2))

    convs = {n: nn.Conv2d(3 if n in "ab" else 5, 5, 1 if n == "h" else 3, padding=int(n != "h")) for n in "abcdefgh"}
    lines = {"a": (6, 4), "b": (6, 4), "c": (4, 2), "d": (4, 2), "e": (6, 2)}
    made = native(
        Net(
            lambda s, x: (*s.images(x), *s.rows(x[:, 0])),
            images=Net(images, **convs),
            rows=Net(rows, **{n: nn.Linear(*ends) for n, ends in lines.items()}),
        ),
        torch.randn(4, 3, 6, 6),
    )
    found = assert_agrees(made, torch.randn(3, 3, 6, 6), lsb=1)
    assert sum(bool(d.lsb) for d in found) <= 2


TABLES = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "silu": F.silu,
    "times_half": lambda y: y * 0.5,
    "plus_some": lambda y: y + 1.5,
    "squared": lambda y: y * y,
}


@pytest.mark.parametrize("recipe", ["int8", pytest.param("xnnpack", marks=pytest.mark.slow)])
def test_tables(recipe: str) -> None:
    """Functions of one integer behind a pool, which no layer takes in."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = F.max_pool2d(s.stem(x), 2)
        images = [s.get_submodule(name)(table(y)) for name, table in TABLES.items()]
        return (*images, s.rows(torch.sigmoid(y.flatten(1))))

    convs = {name: nn.Conv2d(5, 2, 3, padding=1) for name in TABLES}
    net = Net(forward, stem=nn.Conv2d(3, 5, 1), rows=nn.Linear(5 * 12, 3), **convs)
    made = native(net, torch.randn(4, 3, 9, 7), recipe=recipe)
    assert_agrees(made, torch.randn(3, 3, 9, 7))


def test_crossings_of_every_rank() -> None:
    """What is rounded and what is read back: rows, sequences, images of both layouts, and parts of them."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.stem(x)
        return (
            s.two(x[:, 0, 0]),
            s.three(x[:, 1]),
            s.four(x),
            s.image(x),
            s.both(x), s.both_rows(x),
            s.part(x[:, :, 1:4, ::2]),
            s.turned(x.permute(0, 2, 3, 1)),
            y.softmax(1),
            torch.sin(y),
            s.three(x[:, 1]).exp(),
        )  # fmt: skip

    rows = {name: nn.Linear(width, 4) for name, width in (("two", 6), ("three", 6), ("four", 6), ("turned", 3))}
    made = native(
        Net(
            forward,
            stem=nn.Conv2d(3, 5, 3, padding=1),
            image=nn.Conv2d(3, 5, 3, padding=1),
            both=nn.Conv2d(3, 5, 3, padding=1),
            both_rows=nn.Linear(6, 3),
            part=nn.Conv2d(3, 5, 3, padding=1),
            **rows,
        ),
        torch.randn(4, 3, 6, 6),
    )
    assert_agrees(made, torch.randn(3, 3, 6, 6))


def test_values_beyond_the_range() -> None:
    """Infinite values and such as are far beyond are bounded, as the reference does."""
    net = Branches(conv=nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), rows=nn.Linear(4, 3))
    made = native(net, torch.randn(4, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0], x[1, 2, 3], x[1, 0, 0] = torch.inf, -torch.inf, 3e38
    found = disagreements(made, x)
    assert all(not d.lsb and (d.relative or 0.0) <= 1e-5 for d in found)
