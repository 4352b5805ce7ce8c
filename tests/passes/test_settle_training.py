"""A trained graph becomes the graph of post-training quantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.agreement import record, settled_agreement
from qfx.meta import info, update_graph
from qfx.passes import SettleTraining
from qfx.pipeline import run_pass
from qfx.printer import show
from qfx.recipe import Recipe
from qfx.spec import INT8, DerivedSpec, PerTensor, QuantSpec, Scheme
from qfx.stage import Stage
from qfx.trained_fake_quant import TrainedFakeQuantize

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Both(nn.Module):
    """Everything that training changes, in one net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.up, self.bn_up = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.head, self.bn_head = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.bn_up(self.up(self.drop(self.bn(self.conv(x)).relu()))))
        return self.bn_head(self.head(F.dropout(y.mean((2, 3)), 0.2, self.training)))


def net_of(seed: int = 0) -> Both:
    torch.manual_seed(seed)
    model = Both()
    for norm in (model.bn, model.bn_up, model.bn_head):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3.0)
    model.bn.weight.data[1] = 0.0
    return model


def settle(gm: fx.GraphModule) -> fx.GraphModule:
    update_graph(gm.eval(), stage=Stage.CALIBRATED.name)
    run_pass(SettleTraining(), gm)
    return gm


def trained_a_little(gm: fx.GraphModule) -> fx.GraphModule:
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        gm(X).square().mean().backward()
        optimizer.step()
    return gm


PER_TENSOR = Recipe.int8().set("*", weight=QuantSpec(INT8, Scheme.SYMMETRIC, PerTensor()))


@pytest.mark.parametrize(
    "recipe",
    [Recipe.int8(), PER_TENSOR, Recipe.lsq(4, 4), Recipe.lsq(2, 8)],
    ids=["per channel", "per tensor", "learned 4 bits", "learned 2 bits"],
)
def test_the_settled_graph_rounds_as_the_trained_one(trained, recipe: Recipe) -> None:
    gm = trained_a_little(trained(net_of(), X, recipe)).eval()
    live = record(gm, (X,))
    found = settled_agreement(live, record(settle(gm), (X,), live))
    lsb = [layer.lsb for layer in found if layer.lsb is not None]
    assert len(lsb) >= 3 and sum(lsb) <= 1
    assert len(found) > len(lsb) and all(layer.holds for layer in found), "the float result too"


def test_it_is_the_graph_of_post_training_quantization(trained, calibrated) -> None:
    model = net_of()
    gm = trained(model, X)
    gm(X)
    ours, theirs = (show(g, with_info=False) for g in (settle(gm), calibrated(model.eval(), X)))

    def operators(text: str) -> list[str]:
        return sorted(line.split(" = ")[-1].split("(")[0].split("<")[0] for line in text.splitlines())

    assert operators(ours) == operators(theirs)
    assert not any(isinstance(m, TrainedFakeQuantize) for m in gm.modules())
    assert not any(info(n).mark for n in gm.graph.nodes)


def test_the_bias_follows_the_bits(trained) -> None:
    """Bits that a schedule changed decide whether a bias may be int32."""
    gm = trained(net_of(), X)
    gm(X)
    for module in gm.modules():
        if isinstance(module, TrainedFakeQuantize):
            module.set_bits(4)
    settle(gm)
    layers = [n for n in gm.graph.nodes if n.name in ("conv2d", "linear")]
    assert [info(n).bits for n in layers] == [4, 4]
    assert all(spec.bits == 4 for n in layers for spec in info(n).inputs[:2])
    assert not any(isinstance(spec, DerivedSpec) for n in layers for spec in info(n).inputs)


def test_weights_with_a_factor_of_zero_round_to_zero(trained) -> None:
    gm = trained(net_of(), X)
    gm(X)
    settle(gm)
    run: Any = record(gm, (X,)).values
    weight = next(v for name, v in run.items() if name.startswith("mul") and name.endswith("fake_quant"))
    assert weight[1].abs().max() == 0 and weight[0].abs().max() > 0
