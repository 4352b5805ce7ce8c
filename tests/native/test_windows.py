"""Attention within windows, as Swin Transformers have it: the windows of all samples are one dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import jit

from .nets import Branches, Net, assert_agrees, assert_near, linears, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

SIDE, WINDOW, HEADS, WIDTH = 6, 3, 2, 8
TOKENS, WINDOWS = WINDOW * WINDOW, (SIDE // WINDOW) ** 2


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def split(x: Tensor) -> Tensor:
    """``[N, H, W, C]`` as ``[N * windows, tokens, C]``."""
    n, side = x.shape[0], SIDE // WINDOW
    x = x.view(n, side, WINDOW, side, WINDOW, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW, WINDOW, x.shape[-1]).view(-1, TOKENS, x.shape[-1])


def joined(windows: Tensor) -> Tensor:
    """The reverse."""
    side, width = SIDE // WINDOW, windows.shape[-1]
    x = windows.view(-1, WINDOW, WINDOW, width).view(-1, side, side, WINDOW, WINDOW, width)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, SIDE, SIDE, width)


class Block(nn.Module):
    """Attention in windows that lie ``shift`` further, its steps written out, with a bias for each pair of places."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS))
        self.register_buffer("places", torch.randint(0, (2 * WINDOW - 1) ** 2, (TOKENS, TOKENS)))
        seen = torch.rand(WINDOWS, TOKENS, TOKENS) < 0.7
        self.register_buffer("mask", torch.zeros(WINDOWS, TOKENS, TOKENS).masked_fill(~seen, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = joined(self.attention(split(y)))
        return x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)

    def attention(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (width // HEADS) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if self.shift:
            scores = scores.view(-1, WINDOWS, HEADS, tokens, tokens) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, HEADS, tokens, tokens)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width))


class Merging(nn.Module):
    """Four neighbours become one: by slices, or by a view."""

    def __init__(self, slices: bool) -> None:
        super().__init__()
        self.slices = slices
        self.norm, self.reduction = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.slices:
            whole = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        else:
            n, height, width, channels = x.shape
            whole = x.reshape(n, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(whole))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 2, 2), nn.Sequential(Block(0), Block(1))
        self.merging = nn.ModuleList([Merging(True), Merging(False)])
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(self.merging[0](y) + self.merging[1](y)).mean((1, 2)))


def check(net: nn.Module, example: Tensor, lsb: int = 1) -> None:
    """One program, for every number of samples."""
    made = native(net, example)
    for batch in (len(example), 1, 2):
        assert_agrees(made, x := example[:batch], lsb=lsb)
        assert_near(made(x), net(x), tolerance=0.2)
    region = region_of(made)
    assert len(region.programs) == 1 and not region.declined


def test_a_small_swin_is_one_program() -> None:
    torch.manual_seed(0)
    check(Swin(), torch.randn(5, 3, 2 * SIDE, 2 * SIDE))


# --- attention by the operator ----------------------------------------------------------------------------------------


def heads(y: Tensor) -> Tensor:
    """``[..., tokens, C]`` as ``[..., heads, tokens, C / heads]``."""
    return y.view(*y.shape[:-1], HEADS, -1).transpose(-3, -2)


def attention(mask: Tensor | None) -> Callable[[Net, Tensor], Tensor]:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = split(s.first(x))
        if mask is None or mask.ndim < 5:
            given = mask
        else:
            given = mask.expand(y.shape[0] // WINDOWS, -1, -1, -1, -1).reshape(-1, *mask.shape[2:])
        y = F.scaled_dot_product_attention(heads(s.q(y)), heads(s.k(y)), heads(s.v(y)), given)
        return joined(s.out(y.transpose(1, 2).flatten(2)))

    return forward


def within(s: Net, x: Tensor) -> Tensor:
    """The windows stay a dimension of their own."""
    y = s.first(x).view(-1, 2, WINDOW, 2, WINDOW, WIDTH).transpose(2, 3).reshape(-1, WINDOWS, TOKENS, WIDTH)
    return s.out(F.scaled_dot_product_attention(heads(s.q(y)), heads(s.k(y)), heads(s.v(y))).transpose(2, 3).flatten(3))


def test_attention_within_windows() -> None:
    """Without a mask; with one by head, by window, by both; and windows that are a dimension of their own."""
    torch.manual_seed(0)
    sizes = (TOKENS, TOKENS)
    masks = {
        "none": None, "by_head": torch.randn(HEADS, *sizes), "by_window": torch.randn(1, WINDOWS, 1, *sizes),
        "by_both": torch.randn(1, WINDOWS, HEADS, *sizes),
    }  # fmt: skip
    forwards = {name: attention(mask) for name, mask in masks.items()} | {"within": within}
    ends = dict.fromkeys(("first", "q", "k", "v", "out"), (WIDTH, WIDTH))
    nets = {name: Net(forward, **linears(**ends)) for name, forward in forwards.items()}
    check(Branches(**nets), torch.randn(3, SIDE, SIDE, WIDTH))


# --- other operators on rows of all samples ---------------------------------------------------------------------------


def test_operators_on_windows() -> None:
    """Moves that turn the windows to another place and back, parts, joins, rolls, norms and means."""

    def forward(s: Net, x: Tensor) -> tuple[Tensor, ...]:
        y = split(s.a(x).relu())  # [N * 4, 9, 8]
        turned = y.view(-1, TOKENS, 2, 4).permute(2, 0, 3, 1)  # [2, N * 4, 4, 9]
        first, second = turned.unbind(0)
        return (
            s.b(y.transpose(1, 2)), s.b(turned[1]), s.b(first) - s.b(second), s.b(turned.transpose(0, 1)),
            s.c(torch.cat([y, y * 2], 1)[:, 3:12]), torch.stack([first, second], 2), y[:, ::2], y[:, 4, 1:-1],
            y.split((2, 6), -1)[1] + 1, torch.roll(y, (2, -1), (1, 2)), y.chunk(2, 2)[1].mean((1, 2)),
            s.norm(y), y.mean(1, keepdim=True) * y, s.c(y.unsqueeze(1).expand(-1, 2, -1, -1)), y[:, None, :, 3],
            y.mean(1).view(-1, WINDOWS * WIDTH), s.c(joined(y)), y,
        )  # fmt: skip

    torch.manual_seed(0)
    net = Net(forward, norm=nn.BatchNorm1d(TOKENS).eval(), **linears(a=(WIDTH, WIDTH), b=(TOKENS, 3), c=(WIDTH, 4)))
    nn.init.uniform_(net.norm.running_mean)  # type: ignore[arg-type, union-attr]
    check(net, torch.randn(3, SIDE, SIDE, WIDTH))


def test_what_mixes_windows_is_cut_out() -> None:
    """Right all the same: a convolution on windows, and windows taken apart."""
    torch.manual_seed(0)

    def forward(s: Net, x: Tensor) -> Tensor:
        y = split(s.a(x).relu())  # [N * 4, 9, 8]
        images = s.conv(y.transpose(1, 2).reshape(-1, WIDTH, WINDOW, WINDOW)).flatten(2).transpose(1, 2)
        return s.b(images) + s.b(torch.roll(y, 1, 0)) + s.b(y)

    net = Net(forward, conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1), **linears(a=(WIDTH, WIDTH), b=(WIDTH, 4)))
    made = native(net, example := torch.randn(3, SIDE, SIDE, WIDTH))
    for batch in (3, 1, 2):
        x = example[:batch]
        assert_agrees(made, x, lsb=1)
        assert_near(made(x), net(x), tolerance=0.2)
    region = region_of(made)
    assert len(region.programs) >= 2 and "cut" in region.declined[0]
