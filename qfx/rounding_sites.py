"""Where a CONVERTED graph rounds, what was seen of the values there, and whose rule in the recipe decides about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from qfx.findings import LayerCheck
from qfx.graph_module import CapturedModule
from qfx.integer_weights import WeightUse, weight_use
from qfx.meta import info
from qfx.operators import Kind, Op, argument, lookup, name_of, tensor_inputs
from qfx.ops import choose_qparams, dequantize, quantize
from qfx.passes.convert import LARGEST_BIAS
from qfx.range_use import RangeUse, ValueCounts
from qfx.recipe import Recipe
from qfx.remedies import Reader, reader_of
from qfx.rewrite import evaluate, stored_bits


@dataclass(frozen=True)
class Site:
    """A place that rounds: ``node`` of the graph, the value ``source`` that it rounds, and what was seen of that."""

    node: fx.Node
    source: fx.Node
    bits: int
    use: RangeUse | ValueCounts | WeightUse

    def row(self) -> LayerCheck:
        source = self.source
        operator = f"input {source.name}" if source.op == "placeholder" else name_of(source) or str(source.target)
        known: dict[str, Any]
        if isinstance(self.use, RangeUse):
            names = ("below", "above", "used", "drift", "reach")
            known = {"part": "activation", "outliers": self.use.values.outliers, "count": self.use.values.total}
            known |= {name: getattr(self.use, name) for name in names}
        elif isinstance(self.use, ValueCounts):
            known = {"part": "dynamic", "outliers": self.use.outliers, "count": self.use.total}
        else:
            known = {"part": "weight", **asdict(self.use)}
        return LayerCheck(source.name, layer=info(source).origin, operator=operator, bits=self.bits, **known)

    def readers(self, recipe: Recipe | None) -> tuple[Reader, ...]:
        """Whose rules in ``recipe`` decide how the value is rounded, through all that shares its scale."""
        if isinstance(self.use, WeightUse):
            return (reader_of(self.source, self.source.all_input_nodes[0], recipe),)
        scale = _scale_of(self.node)
        same = [n for n in self.node.graph.nodes if n.target is quantize and _scale_of(n) == scale]
        rounded = [back for n in same for back in n.users if back.target is dequantize]
        pairs = [(user, back) for back in rounded for user in back.users]
        wanted = (pair for pair in pairs if not _passes_on(pair[0], same) and _wants(*pair))
        return tuple(reader_of(user, back, recipe) for user, back in wanted)


def _scale_of(n: fx.Node) -> object:
    """What tells one scale from another: the attribute that holds it, or the node that finds it."""
    if n.target is choose_qparams:
        return n
    scale = n.args[1]
    assert isinstance(scale, fx.Node)
    return scale.target if scale.op == "get_attr" else scale.args[0]


def _passes_on(user: fx.Node, same: list[fx.Node]) -> bool:
    """True of a reshape and its like: its result is rounded by the same scale, for those behind it."""
    row = lookup(user)
    return row is not None and row.kind is Kind.SHARE and any(n.args[0] is user for n in same)


def _wants(user: fx.Node, back: fx.Node) -> bool:
    """True where the operator asked for integers; of a graph from a file, which does not say so, where it may have."""
    asked, row = info(user).inputs, lookup(user)
    if not any(info(n).inputs for n in user.graph.nodes):
        return row is not None and row.kind is not Kind.FLOAT
    return any(asked[i] is not None for i, n in enumerate(tensor_inputs(user)) if n is back and i < len(asked))


def sites_of(gm: CapturedModule) -> list[Site]:
    """What a CONVERTED graph rounds, by a scale for a whole tensor or scales found at run time, and its weights.

    In the order of the graph.
    """
    found: list[Site] = []
    for n in gm.graph.nodes:
        if n.target is quantize and _rounds_first(n):
            source, scale, zero_point, _, _, quant_min, quant_max, _ = n.args
            use = RangeUse(evaluate(gm, scale), evaluate(gm, zero_point), quant_min, quant_max)
            found.append(Site(n, source, _bits(quant_min, quant_max), use))
        elif n.target is choose_qparams:
            found.append(Site(n, n.args[0], _bits(*n.args[4:]), ValueCounts()))
        else:
            found += _weight(gm, n)
    return found


def _bits(quant_min: int, quant_max: int) -> int:
    """Of integers in that range, also where it leaves out the lowest."""
    return (quant_max - quant_min).bit_length()


def _rounds_first(n: fx.Node) -> bool:
    """True of a constant scale for the whole tensor, of a value that no reshape brings along already rounded by it."""
    source, scale = n.args[0], n.args[1]
    assert isinstance(source, fx.Node) and isinstance(scale, fx.Node)
    row = lookup(source)
    if scale.op != "get_attr" or n.args[3] is not None:
        return False
    if row is None or row.kind is not Kind.SHARE:
        return True
    before = [i for i in tensor_inputs(source) if i.target is dequantize]
    return not before or any(_scale_of(i) != scale.target for i in before)


def _weight(gm: CapturedModule, n: fx.Node) -> list[Site]:
    """The integer weight of an operator, if it has one."""
    row = lookup(n)
    back = n.args[row.weight] if row is not None and row.weight is not None else None
    if row is None or not isinstance(back, fx.Node) or back.target is not dequantize:
        return []
    stored, scale, zero_point, axis, group_size, _ = cast(Any, back.args)
    bits = stored_bits(stored)
    q, scale, zero_point = (evaluate(gm, part) for part in (stored, scale, zero_point))
    channels = row.channel_axis if axis is None or group_size is not None else axis
    use = weight_use(q, scale, zero_point, axis, group_size, bits=bits, channels=channels)
    lost = tuple(c for c in use.zero_channels if c not in _widened(gm, n, row))
    return [Site(n, n, bits, replace(use, zero_channels=lost))]


def _widened(gm: CapturedModule, n: fx.Node, row: Op) -> frozenset[int]:
    """Channels whose scale was widened until the bias fits int32: weights that vanish in it are below its rounding."""
    bias = argument(n, row.bias, "bias") if row.bias is not None else None
    if not isinstance(bias, fx.Node) or bias.target is not dequantize:
        return frozenset()
    integers = evaluate(gm, bias.args[0])  # type: ignore[arg-type]
    return frozenset(torch.nonzero(integers.abs() > LARGEST_BIAS / 2).flatten().tolist())
