"""Whole models on the native engine: layer by layer against the reference, and as a whole against x86."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import jit
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL
from qfx.targets.native.agreement import compare
from qfx.targets.native.inlined import inlined

from .nets import Net, calls_of, flat, native

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def check(made: Any, inputs: tuple[Tensor, ...], regions: int | None = None) -> None:
    """No region is declined; values are within 1 LSB of the reference's, nearly all exactly."""
    calls = calls_of(made, *inputs)
    assert calls and (regions is None or len(calls) == regions)
    found = []
    for region, args in calls:
        values = compare(region, args, exact=True)
        assert values, region.declined
        found += values
    off = {d.node.name: d for d in found if (d.lsb or 0) > 1 or (d.relative or 0.0) > 1e-5}
    assert not off, off
    assert sum(bool(d.lsb) for d in found) <= 0.1 * len(found)
    with torch.no_grad():
        for got, want in zip(flat(made(*inputs)), flat(inlined(made)(*inputs)), strict=True):
            assert got.shape == want.shape and sqnr_db(want, got) > 25


def quantized(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    model, example = MODELS_SMALL[name](seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = qfx.quantize(model, example, target="native", verbose=False)
    return made, tuple(example.values()) if isinstance(example, dict) else example


REGIONS = {"resnet18": 1, "mobilenet_v2": 1, "vit_s16": 1, "bert_small": 1, "resnet20": None, "resnet50": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIONS)
def test_models(name: str) -> None:
    made, example = quantized(name)
    check(made, example, REGIONS[name])
    check(made, tuple(torch.cat([x, x.flip(-1)]) for x in example))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, convs: bool) -> None:
        super().__init__()
        self.convs = convs
        ends = ((channels, channels // 2), (channels // 2, channels))
        self.down, self.up = (nn.Conv2d(*e, 1) if convs else nn.Linear(*e) for e in ends)

    def forward(self, x: Tensor) -> Tensor:
        if self.convs:
            return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


def squeeze_and_excitation() -> nn.Module:
    def block(channels: int, convs: bool) -> nn.Module:
        parts = (nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Hardswish())
        return nn.Sequential(*parts, SqueezeExcite(channels, convs), nn.Conv2d(channels, channels, 1))

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(stem, block(8, True), block(8, False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def u_net() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        one = s.one(x).relu()
        two = s.two(F.max_pool2d(one, 2)).relu()
        up = s.up(s.three(F.max_pool2d(two, 2)).relu())
        two = s.four(torch.cat([up, two], 1)).relu()
        wide = F.interpolate(two, scale_factor=2)
        out: Tensor = s.last(torch.cat([wide, one], 1))
        return out

    ends = {"one": (3, 6), "two": (6, 8), "three": (8, 10), "four": (16, 6), "last": (12, 2)}
    convs = {name: nn.Conv2d(*e, 3, padding=1) for name, e in ends.items()}
    return Net(forward, up=nn.ConvTranspose2d(10, 8, 2, stride=2), **convs)


def dense_net() -> nn.Module:
    def block(s: Net, x: Tensor) -> Tensor:
        for layer in s.children():
            x = torch.cat([x, layer(x)], 1)
        return x

    def unit(channels: int) -> nn.Module:
        norms = (nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 1, bias=False))
        return nn.Sequential(*norms, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False))

    first = Net(block, **{f"unit{i}": unit(6 + 4 * i) for i in range(3)})
    second = Net(block, **{f"unit{i}": unit(9 + 4 * i) for i in range(2)})
    between = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1), nn.AvgPool2d(2))
    end = (nn.BatchNorm2d(17), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 4))
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), first, between, second, *end)


def conv_next() -> nn.Module:
    """Norms and layers over the last dimension between convolutions over images."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.stem(x)
        for conv, norm, up, down in ((s.a, s.m, s.b, s.c), (s.d, s.n, s.e, s.f)):
            y = norm(conv(x).permute(0, 2, 3, 1))
            x = x + down(F.gelu(up(y))).permute(0, 3, 1, 2)
        out: Tensor = s.head(x.mean((2, 3)))
        return out

    convs = {name: nn.Conv2d(8, 8, 7, padding=3, groups=8) for name in "ad"}
    lines = {"b": (8, 16), "c": (16, 8), "e": (8, 16), "f": (16, 8), "head": (8, 3)}
    norms = {name: nn.LayerNorm(8) for name in "mn"}
    parts = {**convs, **norms, **{name: nn.Linear(*e) for name, e in lines.items()}}
    return Net(forward, stem=nn.Conv2d(3, 8, 2, stride=2), **parts)


OWN: dict[str, Callable[[], nn.Module]] = {
    "squeeze_and_excitation": squeeze_and_excitation,
    "u_net": u_net,
    "dense_net": dense_net,
    "conv_next": conv_next,
}


OFTEN = "squeeze_and_excitation"


@pytest.mark.parametrize("name", [OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in OWN if n != OFTEN)])
def test_models_of_our_own(name: str) -> None:
    made = native(OWN[name](), torch.randn(4, 3, 12, 12))
    for batch in (1, 3):
        check(made, (torch.randn(batch, 3, 12, 12),))
