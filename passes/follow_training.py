"""Put in place what follows ``self.training``: live batch norms, dropout, drop path, attention dropout.

Before::

    %scaled = mul(%weight, @weight_factor)                  # {mark: batch norm bn1, on %conv}
    %scaled_fake_quant = TrainedFakeQuantize<...>(%scaled)
    %conv = conv2d(%x_fake_quant, %scaled_fake_quant, @bias_folded)
    %dropout = alias(%relu)                                 # {mark: dropout 0.1}

After::

    %weight_factor = BatchNormFactor<...>(@bn1.running_var, @bn1.weight)
    %scaled_fake_quant = TrainedFakeQuantize<...>(%weight, factor=%weight_factor)
    %conv = conv2d(%x_fake_quant, %scaled_fake_quant, %bias)
    %conv_bn = LiveBatchNorm2d<bn1>(%conv)
    %dropout = Dropout<dropout>(%relu)

There is one convolution. Its weight is quantized as it will be when the batch norm is folded into it by the running
statistics, and divided by the factor again, so that the live batch norm sees what it saw in the float model. The
nodes keep their names and their NodeInfo; ``settle-training`` undoes all this. A rounding that dropout only repeats is
dropped. Nothing is declined: a graph without marks stays as it is.
Method: Jacob et al., 2018 (arXiv:1712.05877), section 3.2, with the division moved from the output to the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from qfx.attributes import drop_unused, exists, free_path, get_tensor, set_module
from qfx.meta import describe, info, update, value
from qfx.operators import name_of
from qfx.passes import batch_norm
from qfx.rewrite import erase_dead, insert_get
from qfx.roundings import fake_quant_of
from qfx.spec import PerAxis, PerGroup, QuantSpec
from qfx.stage import Stage
from qfx.training import AttentionMark, BatchNormMark, DropoutMark, DropPathMark
from qfx.training_modules import BATCH_NORMS, DROPOUTS, Attention, BatchNormFactor, DropPath, LiveBatchNorm


@dataclass(frozen=True)
class FollowTraining:
    """Reads the marks that :mod:`qfx.eval_form` left."""

    name: ClassVar[str] = "follow-training"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.PREPARED, Stage.PREPARED)
    writes: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def run(self, gm: fx.GraphModule) -> int:
        count = 0
        for node in list(gm.graph.nodes):
            follow = _FOLLOW.get(type(info(node).mark))
            if follow is not None:
                follow(gm, node, info(node).mark)
                count += 1
        return count + drop_unused(gm)


# --- batch norm -------------------------------------------------------------------------------------------------------


def _batch_norm(gm: fx.GraphModule, node: fx.Node, mark: BatchNormMark) -> None:
    if name_of(node) in batch_norm.NAMES.split():
        _live(gm, mark, value(node).ndim)
        _call(node, mark.path, (node.args[0],))
    else:
        _unfold(gm, node, mark)


def _live(gm: fx.GraphModule, mark: BatchNormMark, rank: int) -> LiveBatchNorm:
    """The live batch norm at the user's path; it holds the tensors themselves, under their own names."""
    held = gm.get_submodule(mark.path)
    if isinstance(held, LiveBatchNorm):
        return held
    mean = get_tensor(gm, mark.mean)
    module = BATCH_NORMS[rank](mean.numel(), mark.eps, mark.momentum, affine=False)
    module.affine = mark.weight is not None
    for name, path in (("weight", mark.weight), ("bias", mark.shift)):
        module._parameters[name] = None if path is None else get_tensor(gm, path)  # type: ignore[assignment]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if isinstance(tensor := getattr(held, name, None), Tensor):
            module._buffers[name] = tensor
    module.training = held.training
    module.freeze(mark.frozen)
    module.frozen_by_user = mark.frozen
    set_module(gm, mark.path, module)
    return module


def _unfold(gm: fx.GraphModule, node: fx.Node, mark: BatchNormMark) -> None:
    """Bring the batch norm back behind ``node``, into which it was folded."""
    shape, axis, groups = batch_norm.channels(node)
    module = _live(gm, mark, value(node).ndim)
    weight, folded_bias = node.args[1], node.args[2]
    assert isinstance(weight, fx.Node) and isinstance(folded_bias, fx.Node)
    quantizer = fake_quant_of(gm, weight)
    product = weight if quantizer is None else weight.args[0]
    assert isinstance(product, fx.Node) and isinstance(product.args[0], fx.Node)
    with gm.graph.inserting_before(weight):
        bias = None if mark.bias is None else insert_get(gm, mark.bias, like=folded_bias)
        if quantizer is None:
            node.args = (node.args[0], product.args[0], bias, *node.args[3:])
        else:
            path = free_path(gm, f"fake_quant.{node.name}_factor")
            separable = _is_separable(quantizer.spec, axis, groups)
            set_module(gm, path, BatchNormFactor(module.eps, shape, axis, groups, separable))
            tensors = [insert_get(gm, p, like=weight) for p in (mark.var, mark.weight) if p is not None]
            factor = gm.graph.create_node("call_module", path, tuple(tensors), {}, name=f"{node.name}_factor")
            factor.meta.update(describe(weight))
            weight.args, weight.kwargs = (product.args[0],), {"factor": factor}
            node.args = (node.args[0], weight, bias, *node.args[3:])
    if bias is None:
        update(node, inputs=info(node).inputs[:2])
    with gm.graph.inserting_after(node):
        live = gm.graph.create_node("call_module", mark.path, (node,), {}, name=f"{node.name}_bn")
    live.meta.update(describe(node))
    node.replace_all_uses_with(live, delete_user_cb=lambda user: user is not live)
    erase_dead(gm, folded_bias, product)


def _is_separable(spec: Any, axis: int, groups: int) -> bool:
    """Whether every output channel has scales of its own, so that a factor of a channel is a factor of its scales."""
    if not isinstance(spec, QuantSpec) or groups != 1:
        return False
    granularity = spec.granularity
    if isinstance(granularity, PerAxis):
        return granularity.axis == axis
    return isinstance(granularity, PerGroup) and axis == 0 and granularity.axis != 0


# --- all that drops ---------------------------------------------------------------------------------------------------


def _dropout(gm: fx.GraphModule, node: fx.Node, mark: DropoutMark) -> None:
    _act(gm, node, DROPOUTS[mark.operator](mark.p), "dropout")
    _drop_repeated(gm, node)


def _drop_path(gm: fx.GraphModule, node: fx.Node, mark: DropPathMark) -> None:
    _act(gm, node, DropPath(mark.keep, mark.kept, mark.scaled, mark.uniform), "drop_path")
    _drop_repeated(gm, node)


def _attention(gm: fx.GraphModule, node: fx.Node, mark: AttentionMark) -> None:
    _act(gm, node, Attention(mark.p), "attention")


def _act(gm: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> None:
    """Let ``module`` do what the node does, at the user's path where the user's module does nothing else."""
    path = info(node).origin or name
    path = path if not exists(gm, path) else free_path(gm, f"{path}.{name}")
    set_module(gm, path, module)
    _call(node, path, node.args)


def _call(node: fx.Node, path: str, args: tuple[Any, ...]) -> None:
    node.op, node.target, node.args = "call_module", path, args


def _drop_repeated(gm: fx.GraphModule, node: fx.Node) -> None:
    """What was rounded before dropout need not be rounded, and clipped, behind it: in eval it is the same."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before = fake_quant_of(gm, source)
    for user in list(node.users):
        if before is not None and fake_quant_of(gm, user) is before:
            user.replace_all_uses_with(node)
            gm.graph.erase_node(user)


_FOLLOW: dict[type, Callable[[fx.GraphModule, fx.Node, Any], None]] = {
    BatchNormMark: _batch_norm,
    DropoutMark: _dropout,
    DropPathMark: _drop_path,
    AttentionMark: _attention,
}
