"""The second-order score: against the quadratic form itself, over all signs, and against the exact divergence."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, fx, nn

from qfx import api
from qfx.divergence import Kl
from qfx.errors import ConfigError, QfxWarning
from qfx.fisher import estimate
from qfx.layers import Layer, layers_of
from qfx.samples import Sample, samples_of
from qfx.scan import scan, scan_fisher
from qfx.widths import Rounders, Trial

BITS = 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in parts of 8 rows, so that a few rows are several."""
    monkeypatch.setattr("qfx.samples._MOST_ROWS", 8)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module.eval()


def calibrated(model: nn.Module, x: Any) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        made = api.prepare(model, x, target="reference")
        api.calibrate(made, [x])
    return api.graphs(made)[""]


def samples(gm: fx.GraphModule, x: Tensor) -> tuple[Sample, ...]:
    return samples_of(gm, [((x,), x)], rows=len(x), split=True)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# --- the quadratic form -----------------------------------------------------------------------------------------------


def quadratic_form(model: nn.Module, x: Tensor, layer: Layer, part: str, rounders: Rounders) -> float:
    """``1/2 (J d)^T (diag(p) - p p^T) (J d)`` over all rows, J d by forward-mode derivatives of the user's model."""
    module = model.get_submodule(layer.path)
    calls = iter(layer.calls)
    with fwAD.dual_level():
        t = fwAD.make_dual(torch.tensor(0.0), torch.tensor(1.0))

        def shifted(_: Any, args: Any) -> Any:
            call = next(calls)
            plain = [fwAD.unpack_dual(a).primal.detach() for a in args]
            moves = [rounders.data(call, i, BITS)(x) - x for x, i in zip(plain, layer.data, strict=True)]
            return tuple(a + t * move for a, move in zip(args, moves, strict=True))

        if part == "weight":
            weight = module.weight
            del module._parameters["weight"]
            module.weight = weight.detach() + t * (rounders.weight(layer, BITS) - weight.detach())
            logits = model(x)
            del module.weight
            module._parameters["weight"] = weight
        else:
            hook = module.register_forward_pre_hook(shifted)
            logits = model(x)
            hook.remove()
        z, moved = fwAD.unpack_dual(logits)
    if moved is None:
        return 0.0
    p, moved = z.detach().double().softmax(-1), moved.detach().double()
    return 0.5 * float(((p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2).sum())


@pytest.fixture
def every_sign(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...]], Iterator[None]]:
    """Lets the module draw each of all sign vectors in turn, but their negatives, which give the same."""

    def draw(shape: tuple[int, ...]) -> Iterator[None]:
        for bits in itertools.product((0, 1), repeat=torch.Size(shape).numel() - 1):
            monkeypatch.setattr(torch, "randint", lambda *_, b=(0, *bits), **__: torch.tensor(b).reshape(shape))
            yield

    return draw


class Product(nn.Module):
    """A place for a product of two activations, so that a hook sees what it reads."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out, self.product = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), Product()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.product(self.q(x).softmax(-1).transpose(1, 2), self.v(x)).mean(1))


def _constant(self: Any, x: Tensor) -> Tensor:
    return self.out(self.product(self.w, x).flatten(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3, bias=False)), rand(2, 4)),
    "conv": (
        lambda: net(
            lambda self, x: self.b(self.a(x).sigmoid()).mean((2, 3)),
            a=nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            b=nn.Conv2d(4, 2, 1, bias=False),
        ),
        rand(2, 2, 5, 5),
    ),
    "transposed": (
        lambda: net(
            lambda self, x: self.b(self.a(x).tanh()).mean((2, 3)),
            a=nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            b=nn.Conv2d(4, 2, 1),
        ),
        rand(2, 3, 3, 3),
    ),
    "used twice": (
        lambda: net(lambda self, x: self.b(self.a(self.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        rand(2, 4),
    ),
    "tokens": (
        lambda: net(lambda self, x: self.b(self.a(x).tanh().cumsum(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        rand(1, 3, 4),
    ),
    "flattened tokens": (
        lambda: net(
            lambda self, x: self.b(self.a(x).tanh().cumsum(1)).flatten(0, 1), a=nn.Linear(4, 4), b=nn.Linear(4, 2)
        ),
        rand(2, 1, 4),
    ),
    "attention": (Attention, rand(2, 3, 4)),
    "a constant among the data": (
        lambda: net(_constant, w=nn.Parameter(torch.randn(4, 3)), product=Product(), out=nn.Linear(8, 2)),
        rand(2, 3, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_all_signs_is_the_quadratic_form(
    name: str, every_sign: Callable[[tuple[int, ...]], Iterator[None]]
) -> None:
    make, x = CASES[name]
    model = make().eval().requires_grad_(False)
    gm = calibrated(model, x)
    layers, rounders = layers_of(gm), Rounders(gm)
    trials = [Trial(y.key, part, BITS) for y in layers for part in ("weight", "activation")]
    trials = [t for t in trials if t.part == "activation" or next(y for y in layers if y.key == t.key).weight]
    (sample,) = samples(gm, x)
    shape = tuple(model(x).shape)
    totals = dict.fromkeys(trials, 0.0)
    rows = torch.Size(shape[:-1]).numel()
    for seed, _ in enumerate(every_sign(shape)):
        for trial, (total, count) in estimate(gm, layers, trials, sample, rounders, seed).items():
            assert count == rows
            totals[trial] += total / 2 ** (torch.Size(shape).numel() - 1)
    for trial in trials:
        layer = next(y for y in layers if y.key == trial.key)
        expected = quadratic_form(model, x, layer, trial.part, rounders)
        assert expected > 0.0
        assert totals[trial] == pytest.approx(expected, rel=2e-3), trial


def test_several_weights_at_one_place(every_sign: Callable[[tuple[int, ...]], Iterator[None]]) -> None:
    """``nn.MultiheadAttention`` calls two projections that no module of their own stands for."""
    model = net(
        lambda self, x: self.h(self.m(x, x, x, need_weights=False)[0].mean(1)),
        m=nn.MultiheadAttention(4, 1, batch_first=True),
        h=nn.Linear(4, 2),
    ).requires_grad_(False)
    x = rand(2, 3, 4)
    gm = calibrated(model, x)
    layers, rounders = layers_of(gm), Rounders(gm)
    (sample,) = samples(gm, x)
    inner = [layer for layer in layers if layer.path == "m" and layer.weight is not None]
    assert {layer.shape for layer in inner} == {(12, 4), (4, 4)}
    for layer in inner:
        trial = Trial(layer.key, "weight", BITS)
        found = [estimate(gm, layers, [trial], sample, rounders, i)[trial][0] for i, _ in enumerate(every_sign((2, 2)))]
        parameter = {(12, 4): model.m.in_proj_weight, (4, 4): model.m.out_proj.weight}[layer.shape]
        before, step = parameter.data.clone(), rounders.weight(layer, BITS) - parameter.data
        z = []
        for size in (-1e-3, 0.0, 1e-3):
            parameter.data = before + size * step
            z.append(model(x).double())
        parameter.data = before
        p, moved = z[1].softmax(-1), (z[2] - z[0]) / 2e-3
        expected = 0.5 * float(((p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2).sum())
        assert sum(found) / len(found) == pytest.approx(expected, rel=2e-2)


# --- against the exact divergence -------------------------------------------------------------------------------------


def test_small_errors_are_estimated_within_a_factor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    x = rand(200, 8)
    gm = calibrated(model, x)
    layers, rounders = layers_of(gm), Rounders(gm)
    parts = ("weight", "activation", "weight")
    trials = [Trial(layer.key, part, 8) for layer, part in zip(layers, parts, strict=True)]
    found = samples_of(gm, [((x,), x)], rows=200, split=True)
    cheap = scan_fisher(gm, layers, trials, found, rounders=rounders)
    exact = scan(gm, layers, trials, found, Kl(), rounders=rounders)
    for trial in trials:
        assert 0.7 < cheap[trial] / exact[trial] < 1.4, trial


def test_more_samples_only_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = rand(20, 4)
    gm = calibrated(model, x)
    layers = layers_of(gm)
    trial = Trial(layers[0].key, "weight", BITS)
    parts = samples(gm, x)
    assert [len(part.inputs[0]) for part in parts] == [8, 8, 4]
    sums = [estimate(gm, layers, [trial], part, Rounders(gm), i)[trial] for i, part in enumerate(parts)]
    expected = sum(s for s, _ in sums) / 20
    assert scan_fisher(gm, layers, [trial], parts)[trial] == pytest.approx(expected, rel=1e-12)


# --- what no output depends on, and what cannot be scored -------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: (x * 2.0, self.a(self.b(x))),  # nothing that is scored has a gradient at all
        lambda self, x: (self.a(x), self.b(x)),
        lambda self, x: (self.a(x), self.b(x).argmax(-1)),
    ],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_a_layer_without_effect_on_the_logits_costs_nothing(forward: Callable[..., Any], trainable: bool) -> None:
    model = net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)).requires_grad_(trainable)
    gm = calibrated(model, rand(2, 4))
    layers = layers_of(gm)
    trials = [Trial("b:linear", part, 2) for part in ("weight", "activation")]
    (sample,) = samples(gm, rand(2, 4))
    found = estimate(gm, layers, trials, sample, Rounders(gm), 0)
    assert found == {trial: (0.0, 2.0) for trial in trials}
    assert all(p.grad is None for p in model.parameters())


def test_classes_that_are_masked_out_count_nothing() -> None:
    mask = torch.tensor([False, True, False])
    model = net(lambda self, x: self.a(x).masked_fill(self.mask, -torch.inf), a=nn.Linear(4, 3), mask=mask)
    gm = calibrated(model, rand(64, 4))
    layers = layers_of(gm)
    trials = [Trial("a:linear", "weight", bits) for bits in (4, 8)]
    parts = samples_of(gm, [((rand(64, 4),), None)], rows=64, split=True)
    cheap, exact = scan_fisher(gm, layers, trials, parts), scan(gm, layers, trials, parts, Kl())
    for trial in trials:
        assert 0.5 < cheap[trial] / exact[trial] < 2.0


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (net(lambda self, x: self.a(x).argmax(-1), a=nn.Linear(4, 3)), "no floating-point tensor"),
        (net(lambda self, x: self.a(x), a=nn.Linear(4, 1)), "no classes"),
    ],
)
def test_outputs_that_are_no_logits(model: nn.Module, what: str) -> None:
    gm = calibrated(model, rand(2, 4))
    (sample,) = samples(gm, rand(2, 4))
    trials = [Trial("a:linear", "weight", 2)]
    with pytest.raises(ConfigError, match=what):
        estimate(gm, layers_of(gm), trials, sample, Rounders(gm), 0)
    with pytest.raises(ConfigError, match=what):
        scan(gm, layers_of(gm), trials, [sample], Kl())


def test_graphs_that_write_in_place_have_no_gradient() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0].add_(1.0)
        return self.b(y.relu() * 2.0)

    gm = calibrated(net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), rand(2, 4))
    layers = layers_of(gm)
    (sample,) = samples(gm, rand(2, 4))
    with pytest.raises(ConfigError, match="in place") as caught:
        estimate(gm, layers, [Trial(layers[0].key, "weight", 2)], sample, Rounders(gm), 0)
    assert "sqnr" in caught.value.hint
