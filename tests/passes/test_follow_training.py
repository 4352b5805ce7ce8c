"""What follows ``self.training``, put in place."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qfx.passes import FollowTraining
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.spec import INT8, PerAxis, PerTensor, QuantSpec, Scheme
from qfx.testing import assert_graph
from qfx.training_modules import Attention, BatchNormFactor, DropPath, LiveBatchNorm, LiveBatchNorm2d

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def modules(gm: nn.Module, kind: type) -> list[Any]:
    return [m for m in gm.modules() if isinstance(m, kind)]


def test_golden(net, trained) -> None:
    model = net(
        lambda self, x: self.head(self.drop(self.bn(self.conv(x)).relu())),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        drop=nn.Dropout(0.1),
        head=nn.Conv2d(4, 2, 1),
    )
    assert_graph(trained(model, X, until="follow-training"), """
        %x: f32[*, 3, 4, 4] = input
        %x_fake_quant: f32[*, 3, 4, 4] = TrainedFakeQuantize<fake_quant.x>(%x)
        %conv_weight: f32[4, 3, 1, 1] = @conv.weight
        %conv_bias_1: f32[4] = @conv.bias
        %bn_running_var_1: f32[4] = @bn.running_var
        %bn_weight_1: f32[4] = @bn.weight
        %conv2d_factor: f32[4, 3, 1, 1] = BatchNormFactor<fake_quant.conv2d_factor>(%bn_running_var_1, %bn_weight_1)
        %mul_tensor_fake_quant: f32[4, 3, 1, 1] = TrainedFakeQuantize<fake_quant.conv_weight>(%conv_weight, factor=%conv2d_factor)
        %conv2d: f32[*, 4, 4, 4] = conv2d(%x_fake_quant, %mul_tensor_fake_quant, %conv_bias_1)
        %conv2d_bn: f32[*, 4, 4, 4] = LiveBatchNorm2d<bn>(%conv2d)
        %relu: f32[*, 4, 4, 4] = relu(%conv2d_bn)
        %relu_fake_quant: f32[*, 4, 4, 4] = TrainedFakeQuantize<fake_quant.relu>(%relu)
        %dropout_1: f32[*, 4, 4, 4] = Dropout<drop>(%relu_fake_quant)
        %head_weight: f32[2, 4, 1, 1] = @head.weight
        %head_weight_fake_quant: f32[2, 4, 1, 1] = TrainedFakeQuantize<fake_quant.head_weight>(%head_weight)
        %head_bias: f32[2] = @head.bias
        %conv2d_1: f32[*, 2, 4, 4] = conv2d(%dropout_1, %head_weight_fake_quant, %head_bias)
        return (%conv2d_1)
    """, with_info=False)


def test_a_graph_without_marks_stays(net, trained) -> None:
    gm = trained(net(lambda self, x: self.conv(x).relu(), conv=nn.Conv2d(3, 4, 1)), X, until="insert-observers")
    assert run_pass(FollowTraining(), gm) == 0


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_batch_norms_of_every_rank_behind_every_convolution(net, trained, rank: int, bias: bool) -> None:
    make = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank]
    norm = (None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](4, eps=0.02, momentum=0.3)
    gm = trained(net(lambda self, x: self.bn(self.conv(x)), conv=make(3, 4, 1, bias=bias), bn=norm), torch.randn(2, 3, *[4] * rank))
    live = gm.get_submodule("bn")
    assert isinstance(live, type(norm)) and isinstance(live, LiveBatchNorm) and (live.eps, live.momentum) == (0.02, 0.3)
    assert set(dict(gm.named_parameters())) == {"conv.weight", "bn.weight", "bn.bias", *(["conv.bias"] if bias else [])}
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= set(dict(gm.named_buffers()))


@pytest.mark.parametrize(("granularity", "sign_only"), [(PerAxis(0), True), (PerTensor(), False)], ids=["per channel", "per tensor"])
def test_only_the_factor_s_sign_matters_where_scales_are_per_channel(net, trained, granularity: Any, sign_only: bool) -> None:
    recipe = Recipe.int8().set("conv", weight=QuantSpec(INT8, Scheme.SYMMETRIC, granularity))
    model = net(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    (factor,) = modules(trained(model, X, recipe), BatchNormFactor)
    assert factor.sign_only is sign_only


def test_groups_of_inputs_are_scales_of_a_channel(net, trained) -> None:
    model = net(lambda self, x: self.bn(self.fc(x)), fc=nn.Linear(64, 4), bn=nn.BatchNorm1d(4))
    (factor,) = modules(trained(model, torch.randn(2, 64), Recipe.w4a16(32)), BatchNormFactor)
    assert factor.sign_only


def test_grouped_transposed_convolutions_have_a_factor_for_every_group(net, trained) -> None:
    model = net(lambda self, x: self.bn(self.conv(x)), conv=nn.ConvTranspose2d(4, 6, 2, groups=2), bn=nn.BatchNorm2d(6))
    nn.init.uniform_(model.bn.weight, -1.0, 1.0)
    gm = trained(model, torch.randn(2, 4, 3, 3))
    (factor,) = modules(gm, BatchNormFactor)
    values = factor(model.bn.running_var, model.bn.weight)
    assert values.shape == (4, 3, 1, 1) and not factor.sign_only
    by_channel = (model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()).reshape(2, 3)
    torch.testing.assert_close(values.reshape(2, 2, 3)[:, 0], by_channel)


def test_a_factor_of_zero_divides_nothing() -> None:
    factor = BatchNormFactor(0.0, (3, 1, 1, 1), 0, 1, False)
    values = factor(torch.full((3,), 4.0), torch.tensor([2.0, 0.0, -2.0]))
    assert values.flatten().tolist() == [1.0, 0.5, -1.0]


def test_a_batch_norm_that_nothing_takes_up_lives_on(net, trained) -> None:
    model = net(lambda self, x: self.conv(self.bn(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(3))
    gm = trained(model, X)
    assert isinstance(gm.get_submodule("bn"), LiveBatchNorm2d) and not modules(gm, BatchNormFactor)
    gm(X)
    assert int(gm.get_submodule("bn").num_batches_tracked) == 1


def test_one_batch_norm_called_twice_is_one(net, trained) -> None:
    model = net(lambda self, x: self.bn(self.a(x)) + self.bn(self.b(x)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    gm = trained(model, X)
    assert len(modules(gm, LiveBatchNorm)) == 1 and len(modules(gm, BatchNormFactor)) == 2
    gm(X)
    assert int(gm.get_submodule("bn").num_batches_tracked) == 2


def test_a_batch_norm_held_in_eval_stays_frozen(net, trained) -> None:
    model = net(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)).train()
    model.bn.eval()
    live = trained(model, X).get_submodule("bn")
    assert not live.training and not live.train().training


def test_attention_and_drop_path(net, trained) -> None:
    def forward(self: Any, x: Any) -> Any:
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25 if self.training else 0.0)
        if self.training:
            y = y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.75).div_(0.75)
        return y

    gm = trained(net(forward), X)
    assert [m.p for m in modules(gm, Attention)] == [0.25]
    assert [(m.keep, m.kept, m.scaled) for m in modules(gm, DropPath)] == [(0.75, (0,), True)]
    torch.testing.assert_close(gm.eval()(X), F.scaled_dot_product_attention(X, X, X))
    torch.manual_seed(1)
    dropped = [gm.train()(X)[0].eq(0).all().item() for _ in range(40)]
    assert 2 < sum(dropped) < 20
