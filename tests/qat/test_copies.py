"""A prepared model can be copied, pickled and moved in the middle of training."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import qfx
from qfx.api import UntrainedWarning

from .nets import ResNet, Tabular, quantizers, settle, train

SHAPE = (4, 3, 6, 6)


def in_training(recipe: str = "int8") -> nn.Module:
    x = torch.randn(SHAPE)
    prepared = qfx.prepare(settle(ResNet(dropout=0.2), x), x, recipe=recipe, mode="qat")
    train(prepared, list(prepared.parameters()), 2, SHAPE)
    return prepared


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_trains_on_alone(duplicate: object, recipe: str) -> None:
    model = in_training(recipe)
    before = copy.deepcopy(model.state_dict())
    twin = duplicate(model)  # type: ignore[operator]
    results = []
    for m in (twin, model):
        if m is model:
            assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items()), "the copy reached it"
        torch.manual_seed(9)
        results.append((train(m, list(m.parameters()), 3, SHAPE), m.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][k], v) for k, v in results[1][1].items())
    x = torch.randn(7, *SHAPE[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        assert torch.equal(qfx.convert(twin.eval())(x), qfx.convert(model.eval())(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_trained_model_counts_as_trained(duplicate: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedWarning)
        qfx.convert(duplicate(in_training()).eval())  # type: ignore[operator]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_untrained_model_does_not(duplicate: object) -> None:
    x = torch.randn(5, 6)
    prepared = qfx.prepare(settle(Tabular(), x), x, mode="qat")
    prepared(x)
    with pytest.warns(UntrainedWarning, match="no optimizer has changed a weight"):
        qfx.convert(duplicate(prepared).eval())  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_scales_stay_float32_when_the_model_changes_its_dtype(recipe: str, dtype: torch.dtype) -> None:
    prepared = in_training(recipe)
    scales = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers(prepared)]
    prepared.to(dtype)
    for q, (scale, zero_point) in zip(quantizers(prepared), scales, strict=True):
        assert torch.equal(q.scale, scale)
        assert q.scale.dtype == torch.float32
        assert torch.equal(q.zero_point, zero_point)
        assert all(t.dtype in (torch.float32, torch.int32) for t in (*q.parameters(), *q.buffers()))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        result = prepared(torch.randn(SHAPE, dtype=dtype))
        assert result.dtype == dtype
        result.square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in prepared.parameters())
    with pytest.raises(qfx.ConfigError, match=r"prepared in torch.float32 and is in"):
        qfx.convert(prepared.eval())
    qfx.convert(prepared.float())


def test_moves_to_the_meta_device_and_says_so() -> None:
    prepared = in_training()
    prepared.to("meta")
    assert all(t.is_meta for t in (*prepared.parameters(), *prepared.buffers()))
    assert prepared(torch.randn(SHAPE, device="meta")).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_trains_on_cuda(recipe: str) -> None:
    prepared = in_training(recipe).cuda()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(torch.randn(SHAPE, device="cuda")).square().mean().backward()
        optimizer.step()
    prepared.cpu()
    qfx.convert(prepared.eval(), check=True)
