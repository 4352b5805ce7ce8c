"""What a quantized model refuses by name, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.inference import GradientGuard, freeze, refuse_dtype, storages

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


class Two(nn.Module):
    """Floats and tokens, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(self.embed(batch["ids"]) + batch["x"])


def quantized(model: nn.Module, x: object, recipe: str = "int8") -> nn.Module:
    return qfx.quantize(model.eval(), x, recipe=recipe, target="reference", verbose=False)


def linear(recipe: str = "int8") -> nn.Module:
    torch.manual_seed(0)
    return quantized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 8), recipe)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_the_guard_sees_tensors_inside_containers() -> None:
    batch = {"ids": torch.randint(0, 10, (8,)), "x": torch.randn(8, 8)}
    qmodel = quantized(Two(), (batch,))
    batch["x"].requires_grad_()
    with pytest.raises(qfx.UnsupportedError, match="Two is quantized"):
        qmodel(batch)
    with pytest.raises(qfx.UnsupportedError, match="Two is quantized"):
        qmodel(batch=batch)
    with torch.no_grad():
        assert qmodel(batch).shape == (8, 4)


def test_the_guard_asks_only_where_gradients_are_recorded() -> None:
    guard, x = GradientGuard("Net"), torch.randn(2, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            guard(nn.Identity(), (x,), {})
    guard(nn.Identity(), (x.detach(), 3, None, "text"), {"flag": True})
    with pytest.raises(qfx.UnsupportedError, match=r"no_grad\(\)"):
        guard(nn.Identity(), (), {"x": [x]})


def test_a_float_layer_in_front_that_is_trained_is_told() -> None:
    """The usual surprise: a quantized backbone behind a layer that still learns."""
    front = nn.Linear(8, 8)
    with pytest.raises(qfx.UnsupportedError, match="no gradient"):
        linear()(front(torch.randn(4, 8)))


def test_weight_only_lets_a_float_layer_in_front_learn() -> None:
    front, qmodel = nn.Linear(8, 8), linear("w8a16")
    qmodel(front(torch.randn(4, 8))).sum().backward()
    assert front.weight.grad is not None and front.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in qmodel.parameters())


def test_a_model_in_which_nothing_is_quantized_passes_gradients() -> None:
    qmodel = quantized(nn.Sequential(nn.LayerNorm(8), nn.Softmax(-1)), torch.randn(8, 8))
    x = torch.randn(8, 8, requires_grad=True)
    qmodel(x).sum().backward()
    assert x.grad is not None


# --- parameters -----------------------------------------------------------------------------------------------------


def test_freeze_shares_memory_and_leaves_the_given_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    before = list(model.parameters())
    freeze(model)  # no memory is foreign
    after = list(model.parameters())
    assert [p.requires_grad for p in before] == [True, True, False]
    assert not any(p.requires_grad for p in after)
    assert [p.data_ptr() for p in after] == [p.data_ptr() for p in before]
    assert model[1].weight is model[0].weight, "tied parameters stay tied"


def test_freeze_copies_what_belongs_to_another_model() -> None:
    model, other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4)
    before = storages(model)
    shared = nn.Linear(4, 4)
    shared.weight, shared.bias = other.weight, other.bias
    freeze(model.append(shared), storages(other))
    assert not storages(model) & storages(other) and before < storages(model)
    assert torch.equal(model[2].weight, other.weight)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_dtype_names_both(dtype: torch.dtype) -> None:
    with pytest.raises(qfx.UnsupportedError, match=rf"torch\.float32 cannot become {dtype}"):
        linear().to(dtype)


def test_a_half_precision_model_keeps_its_dtype_too() -> None:
    qmodel = quantized(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).half(), torch.randn(8, 8).half(), "w8a16")
    with pytest.raises(qfx.UnsupportedError):
        qmodel.float()
    assert qmodel(torch.randn(3, 8).half()).dtype == torch.float16


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double])
def test_a_prepared_model_may_change(change: Callable[[nn.Module], nn.Module]) -> None:
    """Before lowering nothing is fixed yet."""
    prepared = qfx.prepare(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(8, 8), target="reference")
    dtype = next(change(prepared).parameters()).dtype
    assert prepared(torch.randn(2, 8).to(dtype)).dtype == dtype


def test_what_is_no_dtype_change_passes() -> None:
    qmodel = linear()
    refuse_dtype(qmodel, lambda t: t.clone())
    refuse_dtype(nn.Linear(2, 2), lambda t: t.half())
    qmodel.share_memory()
    qmodel.requires_grad_(False)
