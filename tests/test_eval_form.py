"""A graph traced in training mode, in eval form with marks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.capture import capture
from qfx.errors import CaptureError
from qfx.meta import info
from qfx.training import (
    AttentionMark,
    BatchNormMark,
    DetachMark,
    DropoutMark,
    DropPathMark,
    Mark,
)

X = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.run = (forward,)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.run[0](self, x)
        return result


def marks(forward: Any, *, training: bool = True, **parts: nn.Module) -> list[Mark]:
    model = Net(forward, **parts).train(training)
    gm = capture(model, X, training=True)
    torch.testing.assert_close(gm(X), model.eval()(X), rtol=0, atol=0)
    return [mark for n in gm.graph.nodes if (mark := info(n).mark) is not None]


def timm(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.training:
        mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9)
        mask.div_(0.9)
        x = x * mask
    return x


def by_row(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.training:
        x = x * torch.empty([x.shape[0], 1, 1], dtype=x.dtype).bernoulli_(0.9).div_(0.9)
    return x


def unscaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.training:
        x = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9) * x
    return x


def floored(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.training:
        x = x.div(0.9) * (0.9 + torch.rand((x.shape[0], 1, 1))).floor_()
    return x


def attention(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if self.training else 0.0)


@pytest.mark.parametrize(
    ("forward", "parts", "expected"),
    [
        (lambda self, x: self.drop(x) * 2, {"drop": nn.Dropout(0.3)}, [DropoutMark("dropout", 0.3)]),
        (lambda self, x: F.dropout(x * 2, 0.3, self.training), {}, [DropoutMark("dropout", 0.3)]),
        (lambda self, x: F.dropout(x * 2, 0.3, self.training, inplace=True), {}, [DropoutMark("dropout", 0.3)]),
        (lambda self, x: self.drop(x * 2), {"drop": nn.Dropout2d(0.3)}, [DropoutMark("feature_dropout", 0.3)]),
        (lambda self, x: self.drop(x * 2), {"drop": nn.AlphaDropout(0.3)}, [DropoutMark("alpha_dropout", 0.3)]),
        (lambda self, x: F.dropout(x * 2, 0.0, self.training), {}, []),
        (attention, {}, [AttentionMark(0.2)]),
        (timm, {}, [DropPathMark(0.9, (0,))]),
        (by_row, {}, [DropPathMark(0.9, (0,))]),
        (unscaled, {}, [DropPathMark(0.9, (0,), scaled=False)]),
        (floored, {}, [DropPathMark(0.9, (0,), uniform=True)]),
        (lambda self, x: x * x.mean().detach(), {}, [DetachMark()]),
    ],
    ids=[
        "module", "function", "in place", "features", "alpha", "no dropout",
        "attention", "timm", "torch", "unscaled", "floored", "detach",
    ],
)  # fmt: skip
def test_marks(forward: Any, parts: dict[str, nn.Module], expected: list[Mark]) -> None:
    assert marks(forward, **parts) == expected


@pytest.mark.parametrize("momentum", [0.2, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_batch_norm_with_the_user_s_hyper_parameters(momentum: float | None, training: bool) -> None:
    norm = nn.BatchNorm1d(4, eps=0.1, momentum=momentum)
    (mark,) = marks(lambda self, x: self.norm(x), norm=norm, training=training)
    tensors = {"mean": "norm.running_mean", "var": "norm.running_var", "weight": "norm.weight", "shift": "norm.bias"}
    assert mark == BatchNormMark("norm", **tensors, eps=0.1, momentum=momentum)
    assert norm.momentum == momentum


def test_a_frozen_batch_norm() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    (mark,) = marks(lambda self, x: self.norm(x), norm=Frozen(4, affine=False))
    assert isinstance(mark, BatchNormMark) and mark.frozen and mark.weight is None


def test_no_gradient_passes_where_the_model_stops_it() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            still = self.fc(x)
        return self.fc(x) * still

    model = Net(forward, fc=nn.Linear(3, 3)).train()
    gm = capture(model, X, training=True)
    for module in (model, gm):
        module(X).sum().backward()
    torch.testing.assert_close(gm.get_submodule("fc").weight.grad, model.fc.weight.grad)


def test_weights_are_its_own_and_tied_ones_stay_tied() -> None:
    model = Net(lambda self, x: self.b(self.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.b.weight = model.a.weight
    gm = capture(model, X, training=True)
    assert gm.get_parameter("a.weight") is gm.get_parameter("b.weight")
    gm.get_parameter("a.weight").data.zero_()
    assert model.a.weight.abs().max() > 0


def viewed(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    flat = y.view(-1)
    return torch.dropout_(y, 0.5, self.training) + flat.view_as(y)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda self, x: x + torch.rand_like(x) * self.training, "draws random numbers in training"),
        (lambda self, x: x * 2 if self.training else x * 3, "is not what the model does"),
        (viewed, "dropout in place changes a tensor"),
    ],
    ids=["noise", "another branch", "read again"],
)
def test_what_training_does_besides_is_refused(forward: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text) as caught:
        capture(Net(forward), X, training=True)
    assert caught.value.hint
