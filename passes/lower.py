"""Replace regions between dequantize and quantize by the target's kernels.

Before::

    %d = qfx.dequantize(%q, ...)
    %conv = conv2d(%d, qfx.dequantize(@weight, ...), qfx.dequantize(@bias_int32, ...))
    %relu = relu(%conv)
    %out = qfx.quantize(%relu, ...)
    %view = view(qfx.dequantize(%out, ...), ...)
    %r = qfx.quantize(%view, ...)            # the same parameters as %out

After::

    %conv = X86Convolution<conv>(%q)
    %r = view(%conv, ...)

Anchors are found by their compute op, looking back through dequantize and forward through the epilogue. Operators that
only move elements run on the integers themselves. Embeddings of a dequantized table gather its integers. A value that
is read in several widths gets a leaf that makes the narrower integers of the wider: ``quantize(dequantize(%conv))`` is
then ``PointLeaf<conv_requantize>(%conv)``. Declines, and leaves the float computation in place with a note, where the
target makes no leaf of a region; the target then says why. Between scales per axis, or such as are chosen at run time,
float stays as well.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qfx.attributes import free_path, get_tensor, set_module
from qfx.meta import add_notes, describe, info, set_value, update, update_graph, value
from qfx.operators import OPS, Kind, Op, argument, is_constant, lookup, name_of, tensor_inputs
from qfx.ops import choose_qparams, dequantize, quantize, unpack_op
from qfx.passes.cancel_pairs import parameters
from qfx.passes.fuse_epilogues import ACTIVATIONS
from qfx.patterns import NoMatch
from qfx.rewrite import erase_dead, evaluate, insert_call, stored_bits
from qfx.stage import Stage
from qfx.targets import (
    AnchorRegion,
    DynamicQParams,
    Leaf,
    LookupRegion,
    PointRegion,
    QParams,
    Slot,
    Step,
    Target,
    requantization,
)

aten = torch.ops.aten

_CHOOSERS = ("max_pool", "pad", "constant_pad", "upsample")
MOVERS = frozenset(row.name for row in OPS.values() if row.kind is Kind.SHARE and not row.name.startswith(_CHOOSERS))
"""Operators that only move or copy elements: the same on integers as on reals."""


@dataclass(frozen=True)
class Lower:
    """Makes leaves of ``target`` for operators on integers, moves the movers, then makes leaves between two scales."""

    target: Target

    name: ClassVar[str] = "lower"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CONVERTED, Stage.LOWERED)
    writes: ClassVar[frozenset[str]] = frozenset({"reason"})

    def run(self, gm: fx.GraphModule) -> int:
        misses: list[NoMatch] = []
        made: list[tuple[fx.Node, fx.Node, Leaf]] = []
        limits = {n: limits_of(n) for n in gm.graph.nodes if n.target is dequantize}
        for node in list(gm.graph.nodes):
            row = None if node._erased else lookup(node)
            if row is None:
                continue
            found = _REGIONS.get(row.kind, point_region)(gm, node, row, limits)
            if found is None:
                continue
            leaf = self._leaf(node, found.region, misses)
            if leaf is not None:
                made.append((_replace(gm, found), found.anchor, leaf))
        layers = {_layer(anchor) for _, anchor, _ in made}
        for call, anchor, leaf in made:  # at last, when tied weights have no reader left that keeps a name taken
            _hold(gm, call, anchor, leaf, layers)
        moved = move_integers(gm, limits)
        between = self._requantize(gm, limits, misses)
        add_notes(gm, "not lowered", [str(miss) for miss in misses])
        update_graph(gm, target=self.target.name)
        return len(made) + moved + between

    def _requantize(self, gm: fx.GraphModule, limits: Limits, misses: list[NoMatch]) -> int:
        """Make leaves of what lies between integers of two scales; returns how many. Movers have moved by then."""
        notes = []
        regions = {n: between_scales(gm, n, limits) for n in gm.graph.nodes if n.target is quantize}
        for node, region in regions.items():
            leaf = None if region is None else self._leaf(node, region, misses)
            if region is not None and leaf is not None:
                notes.append(_story(node, region))
                _put_between(gm, node, leaf)
        add_notes(gm, "requantized", notes)
        return len(notes)

    def _leaf(self, node: fx.Node, region: Region, misses: list[NoMatch]) -> Leaf | None:
        """The target's leaf for the region of ``node``; None where it has none, which is noted."""
        if isinstance(region, AnchorRegion):
            leaf = self.target.lower_anchor(region)
        elif isinstance(region, LookupRegion):
            leaf = self.target.lower_lookup(region)
        else:
            leaf = self.target.lower_point(region)
        if not isinstance(leaf, NoMatch):
            return leaf
        misses.append(NoMatch(leaf.reason, node))
        update(node, reason=f"float: {leaf.reason}")
        return None


Region = AnchorRegion | PointRegion | LookupRegion


@dataclass(frozen=True)
class Found:
    """A region and where it is: ``inputs`` of the leaf, the node ``last`` whose value it gives, operators it covers."""

    region: Region
    anchor: fx.Node
    inputs: tuple[fx.Node, ...]
    last: fx.Node
    covers: tuple[fx.Node, ...]


Range = tuple[int, int, torch.dtype]
Limits = Mapping[fx.Node, Range]
"""What :func:`limits_of` says of every dequantize operator of the CONVERTED graph."""


# --- reading Q/DQ -----------------------------------------------------------------------------------------------------


def qparams_of(gm: fx.GraphModule, node: fx.Node, limits: Limits) -> QParams | None:
    """Parameters of a quantize or dequantize operator with constant scale, or None."""
    scale, zero_point = node.args[1], node.args[2]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    if not (is_constant(scale) and is_constant(zero_point)):
        return None
    low_high_dtype = limits[node] if node.target is dequantize else limits_of(node)
    axis, group_size = node.args[3], node.args[4]
    return QParams(evaluate(gm, scale), evaluate(gm, zero_point), axis, group_size, *low_high_dtype)  # type: ignore[arg-type]


def limits_of(node: fx.Node) -> Range:
    """``(quant_min, quant_max, dtype)``: of a quantize itself, of a dequantize by what made its integers.

    Ask before anything is lowered: a kernel that made integers does not tell their range.
    """
    if node.target is quantize:
        return node.args[5], node.args[6], node.args[7]  # type: ignore[return-value]
    made = _origin_of_integers(node.args[0])
    if made is not None:
        return limits_of(made)
    dtype = value(node.args[0]).dtype  # type: ignore[arg-type]
    known = torch.iinfo(dtype)
    return known.min, known.max, dtype


def _origin_of_integers(node: Any) -> fx.Node | None:
    """The quantize operator behind movers, or None (a constant, or a kernel that made them)."""
    while isinstance(node, fx.Node) and name_of(node) in MOVERS and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node if isinstance(node, fx.Node) and node.target is quantize else None


def _integers(node: Any) -> fx.Node | None:
    """``node`` where it is a dequantize operator."""
    return node if isinstance(node, fx.Node) and node.target is dequantize else None


def _sole_quantize(node: fx.Node) -> fx.Node | None:
    """The one quantize operator, per tensor and constant, that is the node's only reader."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.target is quantize and _per_tensor(user) else None


def _per_tensor(node: fx.Node) -> bool:
    """True for a quantize or dequantize operator with one constant scale and zero point."""
    return node.args[3] is None and all(isinstance(p, fx.Node) and is_constant(p) for p in node.args[1:3])


def _full_arguments(node: fx.Node, start: int) -> tuple[Any, ...]:
    """Positional arguments from ``start`` on, defaults filled in from the schema."""
    return tuple(value for _, value in _arguments(node, start, by_name=False))


def _arguments(node: fx.Node, start: int, *, by_name: bool) -> Iterator[tuple[str, Any]]:
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, a in enumerate(node.target._schema.arguments):
        if i >= start and a.kwarg_only == by_name:
            default = a.default_value if a.has_default_value() else None
            yield a.name, _plain(node.kwargs.get(a.name, default) if by_name else argument(node, i, a.name, default))


def _plain(arg: Any) -> Any:
    """``arg`` with Python's own containers: fx's immutable ones neither compile nor compare by type."""
    if isinstance(arg, dict):
        return {k: _plain(v) for k, v in arg.items()}
    if isinstance(arg, list | tuple):
        return (list if isinstance(arg, list) else tuple)(_plain(v) for v in arg)
    return arg


# --- anchors ----------------------------------------------------------------------------------------------------------


def anchor_region(gm: fx.GraphModule, node: fx.Node, row: Op, limits: Limits) -> Found | None:
    """The region around a compute op, or None where it computes in float."""
    if row.weight is None:
        return _product_region(gm, node, row, limits)
    weight_node = _integers(node.args[row.weight])
    if weight_node is None:
        return None
    data, data_node = _data(gm, node.args[0], limits)
    weight, bits = _weight(gm, weight_node.args[0])
    bias_node = node.args[row.bias] if row.bias is not None and len(node.args) > row.bias else None
    bias, bias_scale = _bias(gm, bias_node)
    if bias_node is not None and bias is None:
        return None
    steps, others, covers = _epilogue(gm, node, limits) if isinstance(data, QParams) else ((), (), (node,))
    last = covers[-1]
    output = _sole_quantize(last) if isinstance(data, QParams) else None
    dtype = value(last).dtype if isinstance(value(last), Tensor) else torch.float32
    region = AnchorRegion(
        op=row,
        target=node.target,
        data=data,
        weight=weight,
        weight_qparams=qparams_of(gm, weight_node, limits),
        weight_bits=bits,
        bias=bias,
        bias_scale=bias_scale,
        args=_full_arguments(node, 3),
        steps=steps,
        output=None if output is None else qparams_of(gm, output, limits),
        dtype=dtype,
        stored=stored_at(gm, weight_node.args[0]),
    )
    return Found(region, node, (data_node, *others), output or last, covers)


def _product_region(gm: fx.GraphModule, node: fx.Node, row: Op, limits: Limits) -> Found | None:
    left, right = (_integers(a) for a in node.args[:2])
    if left is None or right is None:
        return None
    first, second = qparams_of(gm, left, limits), qparams_of(gm, right, limits)
    if first is None or second is None:
        return None
    output = _sole_quantize(node)
    region = AnchorRegion(
        op=row,
        target=node.target,
        data=first,
        weight=None,
        weight_qparams=None,
        weight_bits=0,
        bias=None,
        bias_scale=None,
        args=(),
        steps=(),
        output=None if output is None else qparams_of(gm, output, limits),
        dtype=value(node).dtype if isinstance(value(node), Tensor) else torch.float32,
        second=second,
    )
    inputs = (left.args[0], right.args[0])
    return Found(region, node, inputs, output or node, (node,))  # type: ignore[arg-type]


def _data(
    gm: fx.GraphModule, node: Any, limits: Limits
) -> tuple[QParams | DynamicQParams | None, fx.Node]:
    """How the data come: integers (the leaf reads them), or float (the leaf quantizes them itself, or never)."""
    back = _integers(node)
    if back is None:
        return None, node
    constant = qparams_of(gm, back, limits)
    if constant is not None:
        return constant, back.args[0]  # type: ignore[return-value]
    quantized = back.args[0]
    assert isinstance(quantized, fx.Node)
    item = quantized.args[1]
    assert isinstance(item, fx.Node) and item.target is operator.getitem and isinstance(item.args[0], fx.Node)
    chosen = item.args[0]
    assert chosen.target is choose_qparams
    _, axis, group_size, symmetric, quant_min, quant_max = chosen.args
    dynamic = DynamicQParams(axis, group_size, symmetric, quant_min, quant_max, quantized.args[7])  # type: ignore[arg-type]
    return dynamic, quantized.args[0]  # type: ignore[return-value]


def _weight(gm: fx.GraphModule, node: Any) -> tuple[Tensor, int]:
    """Integers of the weight and how many bits each has."""
    return evaluate(gm, node), stored_bits(node)


def stored_at(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor in which ``fold-weights`` stored the integers ``node``, the same object for all that read it."""
    if name_of(node) == "view" and tensor_inputs(node)[0].target is unpack_op:
        node = tensor_inputs(node)[0]
    if node.target is unpack_op:
        node = node.args[0]
    return get_tensor(gm, str(node.target)) if node.op == "get_attr" else None


def _bias(gm: fx.GraphModule, node: Any) -> tuple[Tensor | None, Tensor | None]:
    """``(int32, scale)``, ``(float, None)``, or ``(None, None)`` where there is none."""
    back = _integers(node)
    if back is not None:
        integers, scale = back.args[0], back.args[1]
        assert isinstance(integers, fx.Node) and isinstance(scale, fx.Node)
        return evaluate(gm, integers), evaluate(gm, scale)
    if isinstance(node, fx.Node) and is_constant(node):
        return evaluate(gm, node), None
    return None, None


def _epilogue(
    gm: fx.GraphModule, anchor: fx.Node, limits: Limits
) -> tuple[tuple[Step, ...], tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """``[add] [activation]`` behind the anchor, as long as each value has one reader and the add's other is known."""
    steps: list[Step] = []
    others: list[fx.Node] = []
    covers = [anchor]
    for allowed in ("add", ACTIVATIONS):
        last = covers[-1]
        following = next(iter(last.users)) if len(last.users) == 1 else None
        if following is None or name_of(following) not in allowed.split():
            continue
        if name_of(following) == "add":
            step, other = _add_step(gm, following, last, limits)
            if step is None or other is None:
                break
            others.append(other)
        else:
            by_name = tuple(_arguments(following, 1, by_name=True))
            step = Step(name_of(following), following.target, _full_arguments(following, 1), kwargs=by_name)
        steps.append(step)
        covers.append(following)
    return tuple(steps), tuple(others), tuple(covers)


def _add_step(
    gm: fx.GraphModule, add: fx.Node, flowing: fx.Node, limits: Limits
) -> tuple[Step | None, fx.Node | None]:
    operands = [a for a in add.args[:2] if a is not flowing]
    back = _integers(operands[0]) if len(operands) == 1 else None
    if back is None or argument(add, 2, "alpha", 1) != 1 or value(back).shape != value(add).shape:
        return None, None
    qparams = qparams_of(gm, back, limits)
    if qparams is None or not qparams.per_tensor:
        return None, None
    return Step("add", add.target, (), qparams), back.args[0]  # type: ignore[return-value]


# --- other integer operators ------------------------------------------------------------------------------------------


def point_region(gm: fx.GraphModule, node: fx.Node, row: Op, limits: Limits) -> Found | None:
    """The region of an operator whose inputs are all dequantized and whose one reader quantizes, or None."""
    if row.name in MOVERS:
        return None
    data = [n for n in tensor_inputs(node) if isinstance(value(n), Tensor)]
    output = _sole_quantize(node)
    if output is None or not data or any(_integers(n) is None for n in data):
        return None
    unique = list(dict.fromkeys(data))
    inputs = [qparams_of(gm, n, limits) for n in unique]
    if any(q is None or not q.per_tensor for q in inputs):
        return None
    if any(isinstance(n, fx.Node) and n not in unique for n in tensor_inputs(node)):
        return None  # sizes that are computed: they cannot be constants of a leaf

    def slot(n: fx.Node) -> Any:
        return Slot(unique.index(n))

    region = PointRegion(
        op=row,
        target=node.target,
        inputs=tuple(q for q in inputs if q is not None),
        args=_plain(fx.map_arg(node.args, slot)),
        kwargs=_plain(fx.map_arg(node.kwargs, slot)),
        output=qparams_of(gm, output, limits),  # type: ignore[arg-type]
    )
    return Found(region, node, tuple(n.args[0] for n in unique), output, (node,))  # type: ignore[misc]


# --- embeddings -------------------------------------------------------------------------------------------------------


def lookup_region(gm: fx.GraphModule, node: fx.Node, row: Op, limits: Limits) -> Found | None:
    """The region of a float operator whose table is stored in integers, an embedding; None for all others."""
    back = None if row.table is None else _integers(node.args[row.table])
    table = None if back is None else stored_at(gm, back.args[0])
    qparams = None if back is None else qparams_of(gm, back, limits)
    if back is None or table is None or qparams is None:
        return None
    integers = value(back.args[0])  # type: ignore[arg-type]
    region = LookupRegion(
        op=row,
        table=table,
        bits=stored_bits(back.args[0]),
        signed=integers.dtype == torch.int8,
        length=integers.shape[1],
        qparams=qparams,
        dtype=value(back).dtype,
    )
    return Found(region, node, (argument(node, 1, "indices"),), node, (node,))


_REGIONS = {Kind.ANCHOR: anchor_region, Kind.FLOAT: lookup_region}
"""How the region of an operator is found; all other kinds are points."""


# --- between two scales -----------------------------------------------------------------------------------------------


def between_scales(gm: fx.GraphModule, node: fx.Node, limits: Limits) -> PointRegion | None:
    """The region of a quantize operator that reads dequantized integers, both with constant scales per tensor."""
    back = _integers(node.args[0])
    if back is None or not (_per_tensor(back) and _per_tensor(node)):
        return None
    given, output = qparams_of(gm, back, limits), qparams_of(gm, node, limits)
    assert given is not None and output is not None
    return requantization(given, output)


def _story(node: fx.Node, region: PointRegion) -> str:
    """``conv2d: 8 to 4 bits for linear``."""
    given, output = ((q.quant_max - q.quant_min).bit_length() for q in (*region.inputs, region.output))
    return f"{_plain_name(node)}: {given} to {output} bits for {', '.join(_readers(node))}"


def _plain_name(node: fx.Node) -> str:
    """The value that ``node`` quantizes anew, by its name in the prepared graph."""
    return str(node.args[0]).partition("_dequantize")[0]


def _readers(node: fx.Node) -> Iterator[str]:
    """Names of operators that read the integers of ``node``, or the reals that these stand for."""
    for user in node.users:
        if user.target is dequantize:
            yield from _readers(user)
        else:
            yield next(iter(info(user).fused), user.name)


def _put_between(gm: fx.GraphModule, node: fx.Node, leaf: Leaf) -> None:
    """Call ``leaf`` in place of the quantize operator ``node`` and the dequantize before it, if nobody else reads that.

    It covers no operator of the model, so that it stands for none in the table.
    """
    back = _integers(node.args[0])
    assert back is not None
    path = free_path(gm, f"{_plain_name(node)}_requantize")
    set_module(gm, path, leaf)
    with gm.graph.inserting_before(node):
        call = gm.graph.create_node("call_module", path, (back.args[0],), {}, name=path)
    call.meta.update(describe(node))
    node.replace_all_uses_with(call)
    erase_dead(gm, node)


# --- leaves -----------------------------------------------------------------------------------------------------------


def _replace(gm: fx.GraphModule, found: Found) -> fx.Node:
    """Call a leaf, which has no path yet, in place of the region's last node."""
    anchor, last = found.anchor, found.last
    with gm.graph.inserting_before(last):
        call = gm.graph.create_node("call_module", "", found.inputs, {}, name=f"{anchor.name}_leaf")
    call.meta.update(describe(anchor))
    covers = tuple(n.name for n in found.covers)
    update(call, group=info(found.covers[-1]).group, bits=info(anchor).bits, reason=info(anchor).reason, fused=covers)
    set_value(call, value(last))
    last.replace_all_uses_with(call)
    erase_dead(gm, last)
    return call


def _layer(anchor: fx.Node) -> str:
    return info(anchor).origin or anchor.name


def _hold(gm: fx.GraphModule, call: fx.Node, anchor: fx.Node, leaf: Leaf, layers: Collection[str]) -> None:
    """Put the leaf that ``call`` calls under its layer's own path, where that is free; no leaf holds another."""
    path = _layer(anchor)
    inside = any(other.startswith(f"{path}.") for other in layers)
    call.target = path if not inside and _free(gm, path) else free_path(gm, f"{path}_{anchor.name}")
    set_module(gm, str(call.target), leaf)


def _free(gm: fx.GraphModule, path: str) -> bool:
    """True where no node refers to ``path`` or to anything below it."""
    used = [str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    return not any(target == path or target.startswith(f"{path}.") for target in used)


# --- movers -----------------------------------------------------------------------------------------------------------


def move_integers(gm: fx.GraphModule, limits: dict[fx.Node, Range]) -> int:
    """Let ``quantize(mover(dequantize(q)))`` move ``q`` itself; returns how many it replaced.

    Where the quantize has other parameters, as behind a split whose parts are read in several widths, it then reads the
    moved integers, dequantized: what moves elements moves their widths as well. ``limits`` learns of those.
    """
    twins: dict[fx.Node, fx.Node | None] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node._erased or node.target is not quantize:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        back = _common(source) if name_of(source) in MOVERS else None
        same = back is not None and parameters(back) == parameters(node)
        if back is None or not (same or (_per_tensor(back) and _per_tensor(node))):
            continue
        twin = _twin(gm, source, twins)
        if twin is None:
            continue
        if same:
            node.replace_all_uses_with(twin)
            erase_dead(gm, node)
        else:
            with gm.graph.inserting_before(node):
                name = f"{source.name}_dequantize"
                moved = insert_call(gm, dequantize, twin, *back.args[1:], like=source, name=name)
            limits[moved] = limits[back]
            node.replace_input_with(source, moved)
            erase_dead(gm, source)
        count += 1
    return count


def _common(node: fx.Node) -> fx.Node | None:
    """One of the dequantize operators behind movers where all of these have equal parameters; else None."""
    found = list(_behind(node))
    alike = len({back and parameters(back) for back in found}) == 1
    return found[0] if alike else None


def _behind(node: fx.Node) -> Iterator[fx.Node | None]:
    """Every dequantize behind the movers; None for anything else."""
    todo, seen = [node], set[fx.Node]()
    while todo:  # each once: parts of a split come together again, perhaps many times over
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if (back := _integers(current)) is not None:
            yield back
        elif name_of(current) in MOVERS:
            todo += [n for n in reversed(tensor_inputs(current)) if isinstance(value(n), Tensor | tuple | list)]
        else:
            yield None


def _twin(gm: fx.GraphModule, node: fx.Node, twins: dict[fx.Node, fx.Node | None]) -> fx.Node | None:
    """The node that moves integers where ``node`` moves reals."""
    if (back := _integers(node)) is not None:
        integers = back.args[0]
        assert isinstance(integers, fx.Node)
        return integers
    if node not in twins:
        ready = {n: _twin(gm, n, twins) for n in tensor_inputs(node) if isinstance(value(n), Tensor | tuple | list)}
        args = fx.map_arg(node.args, lambda n: ready.get(n) or n)
        kwargs = fx.map_arg(node.kwargs, lambda n: ready.get(n) or n)
        with gm.graph.inserting_after(node):
            twin = gm.graph.create_node("call_function", node.target, args, kwargs, name=f"{node.name}_int")
        twin.meta.update(describe(node))
        update(twin, group=info(node).group, reason=info(node).reason, fused=(node.name,))
        dtypes = [dtype for n in ready.values() if n is not None for dtype in _dtypes(value(n))]
        set_value(twin, _as(value(node), dtypes[0]) if dtypes else value(node))
        twins[node] = twin
    return twins[node]


def _dtypes(val: Any) -> list[torch.dtype]:
    if isinstance(val, Tensor):
        return [val.dtype]
    return [dtype for v in val for dtype in _dtypes(v)] if isinstance(val, tuple | list) else []


def _as(val: Any, dtype: torch.dtype) -> Any:
    if isinstance(val, Tensor):
        return val.to(dtype)
    return type(val)(_as(v, dtype) for v in val) if isinstance(val, tuple | list) else val

