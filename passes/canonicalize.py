"""One spelling for one operation; operations that do nothing in inference are gone.

Before::

    %d = dropout(%x, 0.5, False)
    %t = t(%weight)
    %y = addmm(%bias, %d, %t)
    %c = conv2d.padding(%z, %w, None, [1, 1], 'same')

After::

    %y = linear(%x, %weight, %bias)
    %c = conv2d(%z, %w, None, [1, 1], [1, 1])

A term of ``addmm`` that is no bias, one parameter for each output, becomes an ``add`` behind the linear layer.
Declines when ``addmm`` scales its terms, when the right operand of ``addmm``, ``mm`` or ``matmul`` is computed from
inputs or has not two dimensions, when padding ``'same'`` is not the same on both sides, when dropout is active in eval
mode, when a copy changes dtype, device or memory format, and when an operator writes to a copy or a whole slice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qfx.meta import describe, info, set_value, update, value
from qfx.operators import argument, is_constant, is_written, name_of
from qfx.origin import layer_path
from qfx.patterns import Match, NoMatch, Rule, op
from qfx.patterns import apply as apply_rules
from qfx.rewrite import erase_dead, insert_call
from qfx.stage import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize:
    """Applies :data:`RULES` and records every node's layer path."""

    name: ClassVar[str] = "canonicalize"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CAPTURED, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset({"origin"})

    def run(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            update(node, origin=layer_path(node))
        return apply_rules(RULES, gm, notes="not canonicalized").rewrites


def _always(match: Match) -> NoMatch | None:
    return None


def _unscaled(match: Match) -> NoMatch | None:
    scaled = any(match["mm"].kwargs.get(k, 1) != 1 for k in ("alpha", "beta"))
    return NoMatch("alpha or beta scales its terms", match["mm"]) if scaled else _constant_right(match, 2)


def _constant_right(match: Match, position: int = 1) -> NoMatch | None:
    right = match["mm"].args[position]
    assert isinstance(right, fx.Node)
    if not is_constant(right):
        return NoMatch("its right operand is computed from inputs", match["mm"])
    val = value(right)
    if val is None or val.ndim != 2:
        return NoMatch("its right operand has not two dimensions", match["mm"])
    return None


def _inactive(match: Match) -> NoMatch | None:
    node = match["dropout"]
    if argument(node, 2, "train", True) and argument(node, 1, "p", 0.5) != 0.0:
        return NoMatch("the model drops out in eval mode too", node)
    return None


def _same_dtype(match: Match) -> NoMatch | None:
    node, source = match["copy"], match["copy"].args[0]
    assert isinstance(source, fx.Node)
    if info(node).mark is not None:
        return NoMatch("it does something in training", node)
    before, after = value(source), value(node)
    if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
        return NoMatch("it changes dtype or device", node)
    if node.kwargs.get("memory_format") is not None:
        return NoMatch("it changes the memory format", node)
    if is_written(node) or is_written(source):
        return NoMatch("an operator writes to it or to what it copies", node)
    return None


def _whole(match: Match) -> NoMatch | None:
    """``x[:]``, which a trace with free sizes keeps and one with fixed sizes does not."""
    node = match["slice"]
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    if start not in (None, 0) or end not in (None, sys.maxsize) or step != 1:
        return NoMatch("it takes a part", None)
    return NoMatch("an operator writes to it", node) if is_written(node) else None


def _pads_nothing(match: Match) -> NoMatch | None:
    """What models write that fill images up to whole windows, where the sizes are fixed and need no filling."""
    node = match["pad"]
    source, widths = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(widths, list | tuple)
    if any(not isinstance(width, int) or width for width in widths):
        return NoMatch("it adds or cuts", None)
    if is_written(node) or is_written(source):
        return NoMatch("an operator writes to it or to what it copies", node)
    return None


def _to_linear(gm: fx.GraphModule, match: Match) -> None:
    node = match["mm"]
    term, x, right = node.args if name_of(node) == "addmm" else (None, *node.args[:2])
    assert isinstance(right, fx.Node)
    with gm.graph.inserting_before(node):
        weight = _transposed(gm, right)
        if term is None or _is_bias(term, right):
            new = insert_call(gm, aten.linear.default, x, weight, term, like=node, name=node.name)
        else:
            product = insert_call(gm, aten.linear.default, x, weight, None, like=node, name=f"{node.name}_linear")
            new = insert_call(gm, aten.add.Tensor, product, term, like=node, name=node.name)
    _take_over(gm, node, new)


def _is_bias(term: Any, right: fx.Node) -> bool:
    return isinstance(term, fx.Node) and is_constant(term) and value(term).shape == value(right).shape[1:]


def _transposed(gm: fx.GraphModule, right: fx.Node) -> Any:
    """The transpose of ``right``: what is behind it where it is a transpose itself."""
    turned = name_of(right) in ("t", "numpy_T", "mT") or (
        name_of(right) in ("transpose", "permute") and value(right).ndim == 2 and _swaps(right.args[1:])
    )
    return right.args[0] if turned else insert_call(gm, aten.t.default, right, like=right)


def _swaps(args: tuple[Any, ...]) -> bool:
    """True for the dimensions of a permute, one list, or of a transpose, two numbers, that swap the two of a matrix."""
    if len(args) == 1:
        return [d % 2 for d in args[0]] == [1, 0]
    return {d % 2 for d in args} == {0, 1}


def _drop(name: str) -> Callable[[fx.GraphModule, Match], None]:
    def rewrite(gm: fx.GraphModule, match: Match) -> None:
        node = match[name]
        assert isinstance(node.args[0], fx.Node)
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)

    return rewrite


def _retarget(name: str, target: Any, *extra: Any) -> Callable[[fx.GraphModule, Match], None]:
    def rewrite(gm: fx.GraphModule, match: Match) -> None:
        match[name].target = target
        match[name].args = (*match[name].args, *extra)

    return rewrite


def _symmetric(match: Match) -> NoMatch | None:
    node = match["conv"]
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._overloadname != "padding":
        return NoMatch("its padding is a number already", None)
    if argument(node, 4, "padding", "valid") == "same" and any(total % 2 for total in _same_totals(node)):
        return NoMatch("padding 'same' is not the same on both sides", node)
    return None


def _weight_value(node: fx.Node) -> torch.Tensor:
    assert isinstance(node.args[1], fx.Node)
    val: torch.Tensor = value(node.args[1])
    return val


def _same_totals(node: fx.Node) -> list[int]:
    kernel = list(_weight_value(node).shape[2:])
    dilation = list(argument(node, 5, "dilation", [1] * len(kernel)))
    return [int(d) * (int(k) - 1) for k, d in zip(kernel, dilation * len(kernel), strict=False)]


def _number_padding(gm: fx.GraphModule, match: Match) -> None:
    node = match["conv"]
    dims = _weight_value(node).ndim - 2
    same = argument(node, 4, "padding", "valid") == "same"
    padding = [total // 2 for total in _same_totals(node)] if same else [0] * dims
    stride = argument(node, 3, "stride", [1] * dims)
    dilation = argument(node, 5, "dilation", [1] * dims)
    groups = argument(node, 6, "groups", 1)
    target = getattr(aten, name_of(node)).default
    with gm.graph.inserting_before(node):
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        new = insert_call(gm, target, x, weight, bias, stride, padding, dilation, groups, like=node, name=node.name)
    _take_over(gm, node, new)


def _take_over(gm: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    val = value(old)
    new.meta.update(describe(old))
    update(new, origin=layer_path(old))
    set_value(new, val)
    old.replace_all_uses_with(new)
    erase_dead(gm, old)


RULES = (
    Rule("dropout", op("dropout", "dropout feature_dropout alpha_dropout"), _inactive, _drop("dropout")),
    Rule("no-op", op("copy", "lift_fresh_copy alias detach detach_ to _to_copy type_as"), _same_dtype, _drop("copy")),
    Rule("no-padding", op("pad", "pad constant_pad_nd"), _pads_nothing, _drop("pad")),
    Rule("whole-slice", op("slice", "slice"), _whole, _drop("slice")),
    Rule("addmm", op("mm", "addmm"), _unscaled, _to_linear),
    Rule("mm", op("mm", "mm matmul"), _constant_right, _to_linear),
    Rule("relu6", op("relu6", "relu6"), _always, _retarget("relu6", aten.hardtanh.default, 0.0, 6.0)),
    Rule("unsafe-view", op("view", "_unsafe_view"), _always, _retarget("view", aten.view.default)),
    Rule("padding", op("conv", "conv1d conv2d conv3d"), _symmetric, _number_padding),
)
