"""``torch.compile`` of a prepared model trains and evaluates as the model itself, without compiling over and over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qfx

from .nets import ResNet, Tabular, settle

SHAPE = (4, 6)
IMAGES = (4, 3, 6, 6)


def net(recipe: str, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(2)
    model = settle(ResNet() if shape is IMAGES else Tabular(dropout=0.0), torch.randn(shape))
    return qfx.calibrate(qfx.prepare(model, torch.zeros(shape), recipe=recipe, mode="qat"), [torch.randn(shape)])


def losses(model: nn.Module, call: nn.Module, shape: tuple[int, ...], count: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    found = []
    for step in range(count):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def compiled_is_eager(recipe: str, backend: str, shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    eager, model = net(recipe, shape), net(recipe, shape)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want, got = losses(eager, eager, shape), losses(model, compiled, shape)
    assert counter.frame_count == 1, "one graph for all steps"
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=2e-3, atol=1e-5)
    state = model.state_dict()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=2e-2, atol=2e-2)
    x = torch.randn(shape)
    eager.eval()
    compiled.eval()
    model.load_state_dict(eager.state_dict())
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "and one for evaluation"
    compiled.train()
    losses(model, compiled, shape, 2)
    assert counter.frame_count == 2
    qfx.convert(compiled.eval(), check=True)


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_trains_as_the_model_itself(recipe: str) -> None:
    compiled_is_eager(recipe, "aot_eager", SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_trains_with_inductor(recipe: str) -> None:
    compiled_is_eager(recipe, "inductor", IMAGES)


def test_ranges_may_start_in_the_compiled_model() -> None:
    """The first batch decides whether there is a range, which breaks the graph; from then on it is whole."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    model = qfx.prepare(settle(Tabular(), torch.randn(SHAPE)), torch.zeros(SHAPE), mode="qat")
    compiled = torch.compile(model, backend="aot_eager")
    values = losses(model, compiled, SHAPE, 6)
    assert all(torch.isfinite(torch.tensor(values)))
    torch._dynamo.utils.counters.clear()
    losses(model, compiled, SHAPE, 3)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0, "nothing is compiled any more"
