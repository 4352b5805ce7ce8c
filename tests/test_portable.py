"""The CONVERTED graph beside a lowered one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import qfx
from qfx.errors import ConfigError
from qfx.metrics import sqnr_db
from qfx.portable import portable
from qfx.stage import Stage, stage_of


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


@pytest.fixture
def quantized() -> nn.Module:
    return qfx.quantize(_net(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), verbose=False)


def _storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel() > 100}


def test_it_is_converted_and_computes_the_same(quantized: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    twin = portable(quantized)
    assert stage_of(twin) is Stage.CONVERTED
    assert sqnr_db(twin(x), quantized(x)) > 35  # the output itself stays float: only ties round apart


def test_it_is_no_part_of_the_model(quantized: nn.Module) -> None:
    twin = portable(quantized)
    assert all(m is not twin for m in quantized.modules())
    assert not any("portable" in key for key in quantized.state_dict())
    assert len(quantized.state_dict()) == len({id(t) for t in quantized.buffers()})


def test_weights_lie_in_the_same_memory(quantized: nn.Module) -> None:
    assert _storages(portable(quantized)) == _storages(quantized) != set()


def test_float_weights_are_gone_and_the_float_model_is_untouched() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    twin = portable(qfx.quantize(net, torch.randn(4, 3, 8, 8), recipe="int8", verbose=False))
    assert all(t.numel() <= 8 for t in (*twin.parameters(), *twin.buffers()) if t.is_floating_point())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert _storages(twin).isdisjoint(_storages(net))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_it_follows_copies_and_shares_memory_there_too(quantized: nn.Module, how: str) -> None:
    if how == "deepcopy":
        other = copy.deepcopy(quantized)
    else:
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(portable(other)(x), portable(quantized)(x))
    assert _storages(portable(other)) == _storages(other)
    assert _storages(other).isdisjoint(_storages(quantized))


def test_a_pipeline_that_stops_before_lowering_gives_the_portable_form_itself() -> None:
    pipeline = qfx.Pipeline.default()
    for name in ("lower", "reuse-memory"):
        pipeline = pipeline.without(name)
    model = qfx.quantize(_net(), torch.randn(4, 3, 8, 8), pipeline=pipeline, verbose=False)
    assert portable(model) is model


@pytest.mark.parametrize("model", [_net(), qfx.prepare(_net(), torch.randn(2, 3, 8, 8))], ids=["float", "prepared"])
def test_what_was_not_converted_has_none(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="no converted graph"):
        portable(model)
