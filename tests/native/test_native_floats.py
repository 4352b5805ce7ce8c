"""Float operators between the layers of native programs, and what is fused with the rounding behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import jit
from qfx.targets.native.inlined import inlined

from .nets import Net, assert_agrees, assert_near, calls_of, kernels, linears, native

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def test_norms() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.first(x)
        return (
            s.a(s.n(y)),
            s.b(kept := s.m(y)) + kept,
            s.c(F.layer_norm(y, (10,))),
            s.d(F.rms_norm(y, (10,), s.m.weight)),
            s.e(F.rms_norm(y, (10,), eps=0.1)),
            s.n(y),
            s.f(s.n(x[:, :, :10])),
        )

    ends = linears(first=(12, 10), **{name: (10, 10) for name in "abcdef"})
    net = Net(forward, n=nn.LayerNorm(10, eps=1e-3), m=nn.LayerNorm(10, bias=False), **ends)
    for p in net.m.parameters():
        nn.init.uniform_(p)
    made = native(net, torch.randn(4, 5, 12))
    for batch in (1, 3, 0):
        assert_agrees(made, torch.randn(batch, 5, 12), lsb=1)


def test_a_norm_whose_floats_nobody_else_reads_rounds_them_itself() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        alone = s.n(x)
        read = s.m(x)
        return s.a(alone), s.b(read), read.sin()

    net = Net(forward, n=nn.LayerNorm(8), m=nn.LayerNorm(8), **linears(a=(8, 4), b=(8, 4)))
    made = native(net, x := torch.randn(4, 5, 8))
    assert_agrees(made, x, lsb=1)
    assert "quantize" not in kernels(made, x)


class Attention(nn.Module):
    """As in ViT: one layer for queries, keys and values, taken apart by views."""

    def __init__(self, width: int, heads: int, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal, self.scale = heads, causal, scale

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return out


def test_attention() -> None:
    def parts(s: Net, x: Tensor) -> Tensor:
        """Other lengths and depths for keys and for values, of layers of their own, and heads split last."""
        batch = x.shape[0]
        q = s.q(x).unflatten(-1, (2, 5)).transpose(1, 2)
        k = s.k(x[:, 2:]).view(batch, -1, 2, 5).transpose(1, 2)
        v = s.v(x[:, 2:]).view(batch, -1, 2, 3).permute(0, 2, 1, 3)
        out: Tensor = s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out

    def split(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(2, (3, 4)).transpose(1, 2) for t in s.qkv(x).split(12, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return y, s.out(y.transpose(1, 2).reshape(x.shape[0], -1, 12)), y.mean(-1)

    net = Net(
        lambda s, x: (s.one(x), s.two(x), s.three(x), s.parts(x), *s.split(x)),
        one=Attention(12, 3),
        two=Attention(12, 2, causal=True),
        three=Attention(12, 1, scale=0.3),
        parts=Net(parts, **linears(q=(12, 10), k=(12, 10), v=(12, 6), out=(6, 4))),
        split=Net(split, **linears(qkv=(12, 36), out=(12, 4))),
    )
    made = native(net, torch.randn(4, 7, 12))
    for batch in (1, 3):
        assert_agrees(made, torch.randn(batch, 7, 12), lsb=1)


def test_attention_rounds_behind_transposition() -> None:
    made = native(Attention(12, 3), x := torch.randn(4, 7, 12))
    assert_agrees(made, x, lsb=1)
    names = kernels(made, x)
    assert names.count("quantize") == 1 and "copy" not in names, "the input's; attention rounds its own result in place"


def test_arithmetic() -> None:
    """With constants that are repeated, with numbers of the model, and between values."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y, z = s.first(x), s.second(x)
        return (
            s.a((y + s.n.weight).sin()), s.n(y) - z, (y.sin() * z), (y.sin() / (z.exp() + s.full)),
            s.b(s.n(y) + s.full), s.n(y) + s.one, s.n(y) * s.single, s.full - s.n(y), s.n(y) + y[:, :1], s.n(y) + 1.5,
            s.n(y) + s.n(z).transpose(1, 2).reshape(-1, 5, 10),
        )  # fmt: skip

    net = Net(forward, n=nn.LayerNorm(10), **linears(first=(12, 10), second=(12, 10), a=(10, 3), b=(10, 3)))
    net.full = nn.Parameter(torch.randn(5, 10))
    net.one = nn.Parameter(torch.randn(1, 1, 10))
    net.single = nn.Parameter(torch.randn(1))
    made = native(net, torch.randn(4, 5, 12))
    calls = calls_of(made, torch.randn(3, 5, 12))
    assert_agrees(made, torch.randn(3, 5, 12), regions=len(calls), lsb=1)


def test_activations() -> None:
    acts = (torch.relu, torch.sigmoid, torch.tanh, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu)
    acts += (lambda y: F.gelu(y, approximate="tanh"), lambda y: F.leaky_relu(y, 0.3))

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.n(s.first(x))
        return tuple(act(y) for act in acts)

    made = native(Net(forward, n=nn.LayerNorm(9), **linears(first=(12, 9))), torch.randn(4, 5, 12))
    assert_agrees(made, torch.randn(3, 5, 12) * 3)


def test_joins_and_parameters_for_every_sample() -> None:
    """As ViT puts a class token before the patches, and reads it at the end."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        patches = s.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([s.token.expand(x.shape[0], -1, -1), patches], 1) + s.places
        y = s.n(y + s.a(s.n(y)))
        return s.b(y[:, 0]), s.c(y[:, 1:]), torch.cat([y, y, s.n(y)], -1), y.select(1, 2)

    net = Net(forward, patch=nn.Conv2d(3, 8, 2, stride=2), n=nn.LayerNorm(8), **linears(a=(8, 8), b=(8, 3), c=(8, 3)))
    net.token, net.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
    made = native(net, torch.randn(4, 3, 6, 6))
    for batch in (1, 3, 0):
        assert_agrees(made, torch.randn(batch, 3, 6, 6), lsb=1)


def test_joins_of_images() -> None:
    """As in DenseNet: what was joined is joined again, read through a border, and pooled."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.stem(x).relu()
        z = torch.cat([y, s.a(y).relu()], 1)
        z = torch.cat([z, s.b(z).relu(), F.max_pool2d(y, 3, 1, 1)], 1)
        last = torch.cat([s.c(z).relu(), s.c(z).sigmoid(), y, y], 1)
        return s.d(last), last, s.e(torch.cat([y, y[:, :, :1]], 2)), torch.cat([y, z], 1).flatten(1).sin()

    convs = {"stem": (3, 4), "a": (4, 3), "b": (7, 5), "c": (16, 6), "d": (20, 2), "e": (4, 2)}
    net = Net(forward, **{n: nn.Conv2d(*ends, 3, padding=1) for n, ends in convs.items()})
    made = native(net, torch.randn(4, 3, 6, 5))
    calls = calls_of(made, torch.randn(3, 3, 6, 5))
    for batch in (1, 3):
        assert_agrees(made, torch.randn(batch, 3, 6, 5), regions=len(calls), lsb=1)


def test_views() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.n(s.first(x))  # [N, 6, 12]
        a, b = y.chunk(2, -1)
        c, d, e = y.split((1, 2, 3), 1)
        return (
            s.a(y.view(-1, 6, 3, 4).permute(0, 2, 1, 3).flatten(2)),
            s.b(a.transpose(1, 2)) + s.b(b.transpose(1, 2)),
            s.c(y.unbind(1)[3]),
            c.squeeze(1), d.unsqueeze(1), e.flip(1), y[:, ::2, 1:-1:3], y[:, -2], y[..., None, 5],
            y.reshape(-1, 2, 36)[:, 1], y.transpose(1, 2).reshape(-1, 72), a.contiguous() + b, y,
        )  # fmt: skip

    net = Net(forward, n=nn.LayerNorm(12), **linears(first=(10, 12), a=(24, 2), b=(6, 2), c=(12, 2)))
    made = native(net, torch.randn(4, 6, 10))
    calls = calls_of(made, torch.randn(3, 6, 10))
    for batch in (1, 3, 0):
        assert_agrees(made, torch.randn(batch, 6, 10), regions=len(calls), lsb=1)


def test_the_batch_in_another_place_is_declined() -> None:
    """Rows of a result of that kind are as far apart as there are samples, which no program knows."""
    turned = Net(lambda s, x: s.b(s.a(x).transpose(0, 1).sin().transpose(0, 1)), **linears(a=(8, 8), b=(8, 8)))
    made = native(turned, x := torch.randn(4, 3, 8))
    ((region, args), *_) = calls_of(made, x)
    assert region.program(*args) is None
    assert "first dimension is not the batch" in str(region.declined)
    assert_near(made(x), inlined(made)(x))


@pytest.mark.slow
def test_bounds_that_are_made_of_sizes() -> None:
    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y, half = s.n(s.first(x)), x.shape[1] // 2
        return s.a(y[:, half]), y[:, half:] + 1, s.a(y[:, 1 : half + 1]), y[:, -half:], y[:, half - x.shape[1]]

    net = Net(forward, n=nn.LayerNorm(10), **linears(first=(12, 10), a=(10, 3)))
    sizes = {"inputs": ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)}
    made = native(net, torch.randn(4, 6, 12), dynamic_shapes=sizes)
    for tokens in (6, 9):
        assert_agrees(made, torch.randn(3, tokens, 12), lsb=1)


def test_results_that_are_one_value() -> None:
    """A value and views of it: each is given in memory of its own."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = s.a(x)
        return y.flatten(1), y, y.view(-1, 5, 3, 2), s.n(y).unsqueeze(1), s.n(y)

    made = native(Net(forward, n=nn.LayerNorm(6), **linears(a=(8, 6))), torch.randn(4, 5, 8))
    assert_agrees(made, x := torch.randn(3, 5, 8))
    flat_, y, *_ = made(x)
    y.zero_()
    assert flat_.any()


@pytest.mark.parametrize("batch", [2, 8])
def test_bounds_that_are_made_of_the_batch_decline(batch: int) -> None:
    """Half of the samples is one, with two of them and with three."""
    net = Net(lambda s, x: s.b(s.a(x)[:, : x.shape[0] // 2] + 1), **linears(a=(8, 6), b=(6, 3)))
    made = native(net, torch.randn(4, 5, 8))
    calls = calls_of(made, x := torch.randn(batch, 5, 8))
    assert any("depends on the batch" in reason for region, _ in calls for reason in region.declined)
    assert_near(made(x), inlined(made)(x))
