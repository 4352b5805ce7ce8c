"""Ask for integers in the tables of embeddings, which stay float operators.

Before::

    %embedding = embedding(%emb_weight, %ids)    {embeddings stay float: a lookup multiplies nothing}

After (the same operators)::

    %embedding = embedding(%emb_weight, %ids)    {in int8 symmetric per axis 0, float; embeddings stay float, ...}

From there on the table is what any weight is: ``insert-observers`` rounds it, ``convert`` and ``fold-weights`` store
its integers, and ``lower`` makes a leaf that gathers rows of integers and dequantizes those alone. 8 bits have a scale
per row, 4 bits one per 32 columns, symmetric, from the extremes.

A table that another layer reads as integers (a tied output layer) is stored once where those have as many bits, or
more, by row: the embedding takes the layer's spec. Else each stores its own, together still less than the float table.

Declines, with a note:

* the recipe skips the embedding;
* its table is computed from inputs, or an operator writes to it in place (``max_norm``);
* a layer reads its table in float: integers beside it would only take more memory;
* ``embedding_bag``, which sums rows in a kernel that takes float tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.meta import add_notes, info, update, value
from qfx.observers import MinMax
from qfx.operators import is_constant, lookup, name_of, tensor_inputs
from qfx.passes.annotate import subject
from qfx.patterns import NoMatch
from qfx.recipe import Recipe
from qfx.spec import INT4, INT8, PerAxis, PerGroup, QuantSpec, Scheme
from qfx.stage import Stage

SPECS = {
    8: QuantSpec(INT8, Scheme.SYMMETRIC, PerAxis(0), MinMax),
    4: QuantSpec(INT4, Scheme.SYMMETRIC, PerGroup(32), MinMax),
}
"""How a table is stored in so many bits where no other layer reads its integers."""

_EMBEDDINGS = ("embedding", "embedding_bag")
_SPARSE = 4  # embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)


@dataclass(frozen=True)
class StoreEmbeddings:
    """Writes the spec of every table that ``recipe.embedding_storage`` asks for; without it, it does nothing."""

    recipe: Recipe

    name: ClassVar[str] = "store-embeddings"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.ANNOTATED, Stage.ANNOTATED)
    writes: ClassVar[frozenset[str]] = frozenset({"inputs", "bits", "reason"})

    def run(self, gm: fx.GraphModule) -> int:
        bits = self.recipe.embedding_storage
        if bits is None:
            return 0
        reasons = {n: _why_float(n, self.recipe) for n in gm.graph.nodes if name_of(n) in _EMBEDDINGS}
        constants = tensors_by_storage(gm)
        _settle(gm, reasons, constants)
        stored = [n for n, reason in reasons.items() if reason is None]
        for node in stored:
            _join(gm, _table(node), constants)
            _store(node, bits)
        notes = [str(NoMatch(f"its table stays float: {reason}", n)) for n, reason in reasons.items() if reason]
        nothing = [] if reasons else [f"{type(gm).__name__} has no embedding to store in {bits} bits"]
        add_notes(gm, "embedding storage", notes + nothing)
        return len(stored)


def _table(node: fx.Node) -> fx.Node:
    row = lookup(node)
    assert row is not None and row.table is not None
    table = node.args[row.table]
    assert isinstance(table, fx.Node)
    return table


def _why_float(node: fx.Node, recipe: Recipe) -> str | None:
    """Why the embedding's table is float whoever else reads it, or None."""
    row = lookup(node)
    if row is None or row.table is None:
        return f"{name_of(node)} has no kernel for integers"
    rule = next((rule for rule in recipe.rules if rule.matches(subject(node))), None)
    if rule is not None and rule.qconfig is None and not rule.own:
        return rule.why
    if is_constant(_table(node)):
        return None
    return "an in-place operator changes it" if _table(node).op == "get_attr" else "it is computed from inputs"


# --- who else reads the table -----------------------------------------------------------------------------------------

Constants = dict[int, list[fx.Node]]
"""The ``get_attr`` nodes by the memory that they read: tied parameters have one for each name."""


def tensors_by_storage(gm: fx.GraphModule) -> Constants:
    found: Constants = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value(node), Tensor):
            found.setdefault(_address(gm, node), []).append(node)
    return found


def _address(gm: fx.GraphModule, node: fx.Node) -> int:
    return get_tensor(gm, str(node.target)).untyped_storage().data_ptr()


def _roots(table: fx.Node) -> Iterator[fx.Node]:
    """The ``get_attr`` nodes that a constant table is computed from."""
    if table.op == "get_attr":
        yield table
    for n in tensor_inputs(table):
        yield from _roots(n)


def _settle(gm: fx.GraphModule, reasons: dict[fx.Node, str | None], constants: Constants) -> None:
    """Decline what is read in float too, until no reader of a table that is left does so: embeddings share tables."""
    while True:
        left = [n for n, reason in reasons.items() if reason is None]
        late = {n: reader for n in left if (reader := _float_reader(gm, n, left, constants)) is not None}
        if not late:
            return
        for node, reader in late.items():
            reasons[node] = f"{info(reader).origin or reader.name} reads it in float"


def _float_reader(
    gm: fx.GraphModule, node: fx.Node, stored: Collection[fx.Node], constants: Constants
) -> fx.Node | None:
    """The first that reads memory of the embedding's table in float, though all of ``stored`` read integers."""
    names = [name for root in _roots(_table(node)) for name in constants[_address(gm, root)]]
    return next((reader for name in names for reader in _float_readers(name, stored)), None)


def _float_readers(constant: fx.Node, stored: Collection[fx.Node]) -> Iterator[fx.Node]:
    for user in constant.users:
        if user in stored or any(spec is not None for spec in _specs_of(constant, user)):
            continue
        if user.op == "call_function" and is_constant(user):  # a view of it, or a product: who reads that?
            yield from _float_readers(user, stored)
        else:
            yield user


def _specs_of(source: fx.Node, reader: fx.Node) -> Iterable[object]:
    return [spec for n, spec in zip(tensor_inputs(reader), info(reader).inputs, strict=False) if n is source]


# --- storing ----------------------------------------------------------------------------------------------------------


def _join(gm: fx.GraphModule, table: fx.Node, constants: Constants) -> None:
    """Let all that read the tensor ``table``, under several names, read it under the first: it is one value."""
    if table.op != "get_attr":
        return
    own = get_tensor(gm, str(table.target))
    names = constants[_address(gm, table)]
    same = [n for n in names if _geometry(get_tensor(gm, str(n.target))) == _geometry(own)]
    for other in same[1:]:
        other.replace_all_uses_with(same[0])
        gm.graph.erase_node(other)
        names.remove(other)


def _geometry(t: Tensor) -> tuple[object, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _store(node: fx.Node, bits: int) -> None:
    table = _table(node)
    shared = next(((user, spec) for user in table.users for spec in _by_row(table, user) if spec.bits >= bits), None)
    layer, spec = shared if shared is not None else (node, SPECS[bits])
    also = f", shared with {info(layer).origin or layer.name}" if layer is not node else ""
    node.args = node.args[:_SPARSE]  # in training, the gradient of rounding is dense
    update(
        node,
        inputs=tuple(spec if n is table else None for n in tensor_inputs(node)),
        bits=spec.bits,
        reason=f"embeddings stay float, the table in {spec.bits} bits{also}",
    )


def _by_row(table: fx.Node, reader: fx.Node) -> Iterator[QuantSpec]:
    """The specs with which ``reader`` reads the table whose scales belong to single rows."""
    for spec in _specs_of(table, reader):
        if isinstance(spec, QuantSpec) and not spec.dynamic:
            axis, group_size = spec.granularity.layout()
            if (axis, group_size) == (0, None) or (axis in (-1, 1) and group_size is not None):
                yield spec
