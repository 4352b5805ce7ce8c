"""Models that cannot become one graph train in parts; what is tied stays tied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qfx

from .nets import Tied, quantizers, settle, train, without_rounding

X = (8, 6)


class Branches(nn.Module):
    """Python code that decides by values, around two children that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8))
        self.drop, self.gain = nn.Dropout(0.1), nn.Parameter(torch.ones(8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.body(x)) * self.gain
        if float(y.detach().abs().max()) > 1e6:
            y = y / 2
        result: Tensor = self.head(y)
        return result


class TiedAcross(nn.Module):
    """An embedding whose weight is read again behind a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.output = nn.Linear(8, 16, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.first(self.embedding(tokens))
        if float(y.detach().abs().max()) > 1e6:
            y = y / 2
        result: Tensor = self.output(y)
        return result


def test_trains_in_parts() -> None:
    x = torch.randn(X)
    model = settle(Branches(), x)
    prepared = qfx.prepare(model, x, mode="qat")
    assert len(quantizers(prepared)) > 4
    values = train(prepared, list(prepared.parameters()), 5, X)
    assert values[-1] < values[0]
    converted = qfx.convert(prepared.eval(), check=True)
    torch.testing.assert_close(converted(x), prepared(x).detach(), rtol=0.05, atol=0.02)
    assert qfx.report(converted).float_parts


def test_parts_are_the_float_model_in_both_modes() -> None:
    x = torch.randn(X)
    model = settle(Branches(), x)
    before = copy.deepcopy(model.state_dict())
    prepared = without_rounding(qfx.prepare(model, x, mode="qat"))
    names = {n for n, _ in prepared.named_parameters() if "fake_quant." not in n}
    assert names == {n for n, _ in model.named_parameters()}
    assert torch.equal(prepared.eval()(x), model.eval()(x))
    torch.manual_seed(3)
    want = model.train()(x)
    torch.manual_seed(3)
    assert torch.equal(prepared.train()(x), want)
    model.load_state_dict(before)
    train(prepared, list(prepared.parameters()), 2, X)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items()), "the parts have weights of their own"


@pytest.mark.parametrize("kind", [Tied, TiedAcross])
def test_tied_weights_stay_one_parameter(kind: type[nn.Module]) -> None:
    tokens = torch.randint(16, (4, 5))
    prepared = qfx.prepare(kind(), tokens, mode="qat")
    assert prepared.get_parameter("embedding.weight") is prepared.get_parameter("output.weight")
    assert sum(p.shape == (16, 8) for p in prepared.parameters()) == 1
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(tokens).square().mean().backward()
        optimizer.step()
    for twin in (copy.deepcopy(prepared), prepared):
        assert twin.get_parameter("embedding.weight") is twin.get_parameter("output.weight")
        assert torch.equal(twin.embedding.weight, prepared.output.weight)
    converted = qfx.convert(prepared.eval(), check=True)
    y, z = prepared(tokens).detach(), converted(tokens)
    assert float((y - z).abs().max()) <= 0.05 * float(y.abs().max())
