"""The stage table as code: what must be true of a graph at each stage.

Every row is a check with the stages it holds for; ``verify`` runs the rows of a stage and raises on the first finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from qfx.errors import VerifyError
from qfx.meta import info, value
from qfx.operators import Kind, Op, is_constant, lookup, mutates, name_of, tensor_inputs
from qfx.ops import dequantize, quantize
from qfx.printer import show_node
from qfx.roundings import fake_quant_of, rounded_by
from qfx.spec import QuantSpec
from qfx.stage import Stage
from qfx.targets import Leaf

Finding = tuple[fx.Node, str]


@dataclass(frozen=True)
class Row:
    """``check`` yields findings; it holds from stage ``first`` up to ``last``."""

    name: str
    first: Stage
    last: Stage
    check: Callable[[fx.GraphModule], Iterator[Finding]]


def verify(gm: fx.GraphModule, stage: Stage) -> None:
    """Raise VerifyError, with the row, the node and its line of text, where ``gm`` is not what ``stage`` promises."""
    gm.graph.lint()
    for row in TABLE:
        if row.first <= stage <= row.last:
            for node, problem in row.check(gm):
                raise VerifyError(
                    f"stage {stage.name}, {row.name}: {problem}: {show_node(node)}",
                    where=info(node).origin,
                    hint="a pass of the pipeline broke this; run with QFX_CHECK=1 to see which",
                )


def _plain_calls(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        if node.op == "call_method":
            yield node, "methods are spelled as operators"
        if node.op == "call_function" and "_assert" in str(node.target):
            yield node, "assertions of export are removed"


def _canonical(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        right = node.args[1] if name_of(node) in ("mm", "matmul") else None
        if isinstance(right, fx.Node) and is_constant(right) and value(right) is not None and value(right).ndim == 2:
            yield node, "a product with a parameter is spelled linear"


def _explained(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and not info(node).quantized and not info(node).reason:
            yield node, "a node that stays float has no reason"


def _known_specs(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        known = info(node)
        if known.inputs and len(known.inputs) != len(tensor_inputs(node)):
            yield node, "it has not one spec for each tensor input"
        row = lookup(node)
        fits = row is not None and not mutates(node) and (row.kind is not Kind.FLOAT or _stores(node, row))
        if known.quantized and known.mark is None and not fits:
            yield node, "an operator without integer form is annotated"


def _stores(node: fx.Node, row: Op) -> bool:
    """True where nothing of a float operator is annotated but its table, which is stored in integers."""
    known = info(node)
    specified = [n for n, spec in zip(tensor_inputs(node), known.inputs, strict=False) if spec is not None]
    return row.table is not None and known.output is None and specified == [node.args[row.table]]


def _observed(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        for position, spec in enumerate(info(node).inputs):
            source = tensor_inputs(node)[position]
            if not isinstance(spec, QuantSpec) or not isinstance(value(source), torch.Tensor | None):
                continue
            module = rounded_by(gm, source)
            if module is None or module.spec != spec:
                yield node, f"its input {position} has no FakeQuantize of its spec"


def _calibrated(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        module = fake_quant_of(gm, node)
        if module is not None and not module.dynamic and not module.scale.numel():
            yield node, "its FakeQuantize has no scale"


def _no_observers(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        if fake_quant_of(gm, node) is not None:
            yield node, "an observer is left"


def _portable(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            yield node, "the portable form calls no modules"


def _integers_in(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        source = node.args[0] if node.target in (quantize, dequantize) else None
        val = value(source) if isinstance(source, fx.Node) else None
        if not isinstance(val, torch.Tensor):
            continue
        if node.target is dequantize and val.dtype not in (torch.uint8, torch.int8, torch.int32):
            yield node, "dequantize reads no integers"
        if node.target is quantize and not val.dtype.is_floating_point:
            yield node, "quantize reads no floats"


def leaf_of(gm: fx.GraphModule, node: fx.Node) -> Leaf | None:
    """The lowered layer that the node calls, or None."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Leaf) else None


def read_again(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Why the last input of ``node`` must not be overwritten, or None where nobody reads it afterwards."""
    last = node.args[-1]
    if not isinstance(last, fx.Node) or (leaf_of(gm, last) is None and last.target is not quantize):
        return "its last input is no kernel's own result"
    if node.args.count(last) > 1:
        return "its inputs are one tensor"
    behind = node
    while (behind := behind.next).op != "root":
        if behind in last.users:
            return f"{behind.name} reads {last.name} again"
    views = [user.name for user in last.users if leaf_of(gm, user) is None and user.target is not dequantize]
    return f"{views[0]} may share memory with {last.name}" if views else None


def _overwrites_nothing_read(gm: fx.GraphModule) -> Iterator[Finding]:
    for node in gm.graph.nodes:
        leaf = leaf_of(gm, node)
        if leaf is not None and leaf.overwrites and (reason := read_again(gm, node)):
            yield node, f"it overwrites its last input, but {reason}"


TABLE = (
    Row("plain calls", Stage.CAPTURED, Stage.LOWERED, _plain_calls),
    Row("one spelling", Stage.CANONICAL, Stage.LOWERED, _canonical),
    Row("every node explained", Stage.ANNOTATED, Stage.CALIBRATED, _explained),
    Row("specs fit", Stage.ANNOTATED, Stage.CALIBRATED, _known_specs),
    Row("edges observed", Stage.PREPARED, Stage.CALIBRATED, _observed),
    Row("ranges known", Stage.CALIBRATED, Stage.CALIBRATED, _calibrated),
    Row("no observer", Stage.CONVERTED, Stage.LOWERED, _no_observers),
    Row("portable", Stage.CONVERTED, Stage.CONVERTED, _portable),
    Row("nothing overwritten that is read", Stage.LOWERED, Stage.LOWERED, _overwrites_nothing_read),
    Row("types of quantize", Stage.CONVERTED, Stage.LOWERED, _integers_in),
)
