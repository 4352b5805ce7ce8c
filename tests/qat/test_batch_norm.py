"""Batch norms of every kind live on behind their layer, or alone, and are what they are in the float model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.training_modules import BatchNormFactor, LiveBatchNorm

from .nets import Stack, Tabular, settle, train, without_rounding

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 4, 7, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (4, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: nn.BatchNorm3d(4), (3, 2, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), lambda: nn.BatchNorm2d(4), (4, 4, 7, 7)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 4, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (4, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2), lambda: nn.BatchNorm3d(4), (3, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), lambda: nn.BatchNorm1d(8, eps=1e-3), (5, 6)),
    "cumulative": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, momentum=None), (4, 4, 7, 7)),
    "not affine": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (4, 4, 7, 7)),
    "no statistics": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 4, 7, 7)),
    "alone": (nn.Identity, lambda: nn.BatchNorm2d(4), (4, 4, 7, 7)),
}


class Before(nn.Module):
    """A batch norm before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(self.norm(x))
        return result


class SecondReader(nn.Module):
    """A convolution that is read behind its batch norm and in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        result: Tensor = self.norm(y) + y
        return result


class Twice(nn.Module):
    """One convolution and one batch norm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(self.norm(self.conv(x))))
        return result


def same_after_a_step(model: nn.Module, x: Tensor) -> None:
    """With rounding off: outputs, gradients and running statistics of a step are the float model's, bit for bit."""
    prepared = without_rounding(qfx.prepare(model, x, mode="qat"))
    assert torch.equal(prepared.eval()(x), model.eval()(x))
    for _ in range(2):
        results = [m.train()(x) for m in (model, prepared)]
        assert torch.equal(*results)
        for result in results:
            (result * torch.arange(result.numel()).reshape(result.shape).cos()).sum().backward()
    parameters, state = dict(prepared.named_parameters()), prepared.state_dict()
    for name, p in model.named_parameters():
        assert torch.equal(parameters[name].grad, p.grad), name
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", PAIRS)
def test_is_the_float_models(name: str) -> None:
    layer, norm, shape = PAIRS[name]
    x = torch.randn(shape)
    same_after_a_step(settle(Stack(layer(), norm()), x), x)


@pytest.mark.parametrize("kind", [Before, SecondReader, Twice])
def test_stays_one_where_it_cannot_be_folded(kind: Callable[[], nn.Module]) -> None:
    x = torch.randn(4, 3, 8, 8)
    same_after_a_step(settle(kind(), x), x)


@pytest.mark.parametrize("kind", [Before, SecondReader])
def test_is_not_folded_before_a_layer_or_with_a_second_reader(kind: Callable[[], nn.Module]) -> None:
    x = torch.randn(4, 3, 8, 8)
    prepared = qfx.prepare(settle(kind(), x), x, mode="qat")
    assert any(isinstance(m, LiveBatchNorm) for m in prepared.modules())
    assert not any(isinstance(m, BatchNormFactor) for m in prepared.modules())
    train(prepared, list(prepared.parameters()), 2, tuple(x.shape))
    qfx.convert(prepared.eval(), check=True)


def test_a_function_with_weights_of_its_own_is_refused() -> None:
    """Folding would make constants of them."""

    class Functional(nn.Module):
        def __init__(self, trained: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)
            self.weight = nn.Parameter(torch.rand(4), requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(self.conv(x), self.mean, self.var, self.weight)

    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(qfx.CaptureError, match=r"weights to train that no batch norm module holds"):
        qfx.prepare(Functional(True), x, mode="qat")
    prepared = without_rounding(qfx.prepare(Functional(False), x, mode="qat"))
    train(prepared, list(prepared.parameters()), 1, tuple(x.shape))


def test_statistics_of_all_ranks_are_refused() -> None:
    x = torch.randn(4, 4, 7, 7)
    layer, norm, _ = PAIRS["conv2d"]
    model = settle(Stack(layer(), norm()), x)
    with pytest.raises(qfx.CaptureError, match=r"SyncBatchNorm takes its statistics from all ranks.*\[layer norm\]"):
        qfx.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), x, mode="qat")
    prepared = qfx.prepare(model, x, mode="qat")
    train(prepared, list(prepared.parameters()), 1, tuple(x.shape))
    prepared = nn.SyncBatchNorm.convert_sync_batchnorm(prepared)
    with pytest.raises(qfx.ConfigError, match="norm has become a SyncBatchNorm since"):
        qfx.convert(prepared.eval())


def test_statistics_can_be_frozen_and_taken_up_again() -> None:
    x = torch.randn(5, 6)
    prepared = qfx.prepare(settle(Tabular(dropout=0.0), x), x, mode="qat")
    prepared(x)
    norm = prepared.norm
    norm.freeze()
    before = norm.running_mean.clone(), int(norm.num_batches_tracked)
    prepared.train()(x).sum().backward()
    assert torch.equal(norm.running_mean, before[0])
    assert int(norm.num_batches_tracked) == before[1]
    assert norm.weight.grad is not None
    prepared.zero_grad()
    prepared.eval()
    norm.freeze(False)
    assert not norm.training
    prepared.train()(x)
    assert int(norm.num_batches_tracked) == before[1] + 1


def test_a_frozen_batch_norm_survives_copies_and_state_dicts() -> None:
    x = torch.randn(5, 6)
    model = settle(Tabular(dropout=0.0), x)
    prepared = qfx.prepare(model, x, mode="qat")
    prepared.norm.freeze()
    fresh = qfx.prepare(model, x, mode="qat")
    fresh.load_state_dict(prepared.state_dict())
    for m in (copy.deepcopy(prepared), fresh):
        m.train()(x)
        assert torch.equal(m.norm.running_mean, model.norm.running_mean)


def test_reestimation_is_the_plain_average_of_the_data() -> None:
    data = [torch.randn(16, 6) * 2 + 1 for _ in range(4)]
    prepared = qfx.prepare(settle(Tabular(dropout=0.5), data[0]), data[0], mode="qat")
    train(prepared, list(prepared.parameters()), 2)
    momentum, low = prepared.norm.momentum, [b.clone() for n, b in prepared.named_buffers() if n.endswith("low")]
    reached = []
    hook = prepared.norm.register_forward_pre_hook(lambda _, args: reached.append(args[0].detach()))
    assert qfx.reestimate_batch_norm(prepared, data) is prepared
    hook.remove()
    assert len(reached) == len(data)
    torch.testing.assert_close(prepared.norm.running_mean, torch.stack([r.mean(0) for r in reached]).mean(0))
    torch.testing.assert_close(prepared.norm.running_var, torch.stack([r.var(0) for r in reached]).mean(0))
    assert prepared.training
    assert prepared.norm.training
    assert prepared.norm.momentum == momentum
    now = [b for n, b in prepared.named_buffers() if n.endswith("low")]
    assert all(torch.equal(a, b) for a, b in zip(low, now, strict=True)), "no range moves"


def test_reestimation_leaves_what_the_user_froze_and_refuses_no_data() -> None:
    x = torch.randn(5, 6)
    model = settle(Tabular(), x).train()
    model.norm.eval()
    prepared = qfx.prepare(model, x, mode="qat")
    prepared(x)
    qfx.reestimate_batch_norm(prepared, [x * 3])
    assert torch.equal(prepared.norm.running_mean, model.norm.running_mean)
    with pytest.raises(qfx.ConfigError, match="no data to estimate"):
        qfx.reestimate_batch_norm(prepared, [])
