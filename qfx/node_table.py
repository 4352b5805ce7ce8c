"""The before/after node table: what became of every node, as values and as text."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

from tabulate import tabulate
from torch import Tensor, fx, nn

from qfx.agreement import LayerAgreement
from qfx.attributes import nbytes
from qfx.bit_allocation import Allocation
from qfx.errors import ConfigError
from qfx.meta import graph_info, info, value
from qfx.operators import Kind, activations, lookup, macs, name_of, tensor_inputs
from qfx.ops import dequantize, quantize
from qfx.printer import show_value
from qfx.targets import Leaf
from qfx.targets.native.inlined import inlined

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class NodeRow:
    """One operator of the float model. ``after``: its types in and out; ``sqnr_db`` against the float model.

    ``activation_bits``: of the integers that it reads.
    """

    name: str
    operator: str
    layer: str
    shape: str
    after: str
    weight_bits: int | None
    activation_bits: int | None
    kernel: str
    sqnr_db: float | None
    reason: str
    macs: int
    product: bool
    integer: bool
    sensitivity: float | None = None


@dataclass(frozen=True)
class Report:
    """What quantization did. ``str(report)`` is the table with its summary; ``to_dict`` gives plain values.

    ``weight_bytes``: of all parameters and buffers, tied storage once. ``integer_macs`` leaves out products of two
    activations (attention), which have no weights; ``product_macs`` counts those. ``agreement``: layer by layer, how
    far the integers are from the prepared model's, where ``convert`` was asked to check. ``allocation``: the bits that
    an AutoRecipe found, and the scores that it found them by. ``calibration``: digests of the first samples that the
    model was calibrated on (:mod:`qfx.digests`), by which ``qfx.check`` knows them again.
    """

    model: str
    recipe: str
    target: str
    rows: tuple[NodeRow, ...]
    nodes_before: int
    nodes_after: int
    crossings: int
    regions: int
    share_groups: int
    weight_bytes_before: int
    weight_bytes_after: int
    output_sqnr_db: float | None = None
    notes: tuple[tuple[str, str], ...] = ()
    float_parts: tuple[str, ...] = field(default=())
    agreement: tuple[LayerAgreement, ...] = ()
    allocation: Allocation | None = None
    calibration: tuple[str, ...] = ()

    @property
    def integer_macs(self) -> float:
        """Share of multiply-accumulates with weights that run on integers, in [0, 1]."""
        weighted = [row for row in self.rows if row.macs and not row.product]
        total = sum(row.macs for row in weighted)
        return sum(row.macs for row in weighted if row.integer) / total if total else 0.0

    @property
    def product_macs(self) -> int:
        """Multiply-accumulates of activations with activations, at the example's sizes."""
        return sum(row.macs for row in self.rows if row.product)

    @property
    def quantized(self) -> int:
        """How many operators compute on integers."""
        return sum(row.integer for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON and for comparing runs."""
        from dataclasses import asdict

        plain = asdict(replace(self, allocation=None))
        return {
            **plain,
            "integer_macs": self.integer_macs,
            "allocation": None if self.allocation is None else self.allocation.to_dict(),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw sensitivity, bits and the Pareto front into a file (``.png``, ``.svg``, ``.pdf``); needs matplotlib.

        Raises:
            ConfigError: the bits were given, not found by an AutoRecipe; or matplotlib is not installed.
        """
        from qfx.sensitivity_plot import plot

        plot(self._found(), path)

    def html(self) -> str:
        """One self-contained page of the same.

        Raises:
            ConfigError: as for :meth:`plot`.
        """
        from qfx.sensitivity_page import page

        return page(self._found())

    def _found(self) -> Allocation:
        if self.allocation is None:
            raise ConfigError(
                "this model's bits were given by its recipe, so there is no search to show",
                hint="quantize with recipe='auto', or plot what qfx.sensitivity returns",
            )
        return self.allocation

    def table(self) -> str:
        """The before/after node table alone."""
        cells, header = self._lines()
        return str(tabulate(cells, header, tablefmt="simple", disable_numparse=True))

    def _repr_html_(self) -> str:
        """For notebooks: the table and its summary; names of the user's are escaped."""
        cells, header = self._lines()
        table = tabulate(cells, header, tablefmt="html", disable_numparse=True)
        summary = tabulate(self._summary().items(), tablefmt="html", disable_numparse=True)
        remarks = "".join(f"<br>{escape(line)}" for line in self.remarks().splitlines())
        return f"{table}\n{summary}\n<p>{remarks.removeprefix('<br>')}</p>"

    def _lines(self) -> tuple[list[list[str]], list[str]]:
        """The cells of the table, and its header."""
        header = ["operator", "layer", "shape", "before → after", "w", "a", "kernel", "SQNR dB", "reason"]
        cells = [_cells(row) for row in self.rows]
        if self.allocation is not None:
            header.insert(6, self.allocation.sensitivity.score)
            for row, line in zip(self.rows, cells, strict=True):
                line.insert(6, "" if row.sensitivity is None else f"{row.sensitivity:.2g}")
        return cells, header

    def summary(self) -> str:
        """The lines below the table."""
        return str(tabulate(self._summary().items(), tablefmt="plain"))

    def _summary(self) -> dict[str, str]:
        lines = {
            "recipe, target": f"{self.recipe}, {self.target}",
            "nodes": f"{self.nodes_before} → {self.nodes_after}, "
            f"{self.quantized} of {len(self.rows)} operators in integers",
            "multiply-accumulates in integer": f"{self.integer_macs:.1%}"
            + (" of those in graphs" if self.float_parts else "")
            + (f" (and {self.product_macs / 1e6:.1f} M of activations with activations)" if self.product_macs else ""),
            "quantize/dequantize crossings": f"{self.crossings}, {self.regions} integer regions, "
            f"{self.share_groups} share groups",
            "weights": f"{_size(self.weight_bytes_before)} → {_size(self.weight_bytes_after)}",
            "SQNR of the output": _db(self.output_sqnr_db) + (" dB" if self.output_sqnr_db is not None else ""),
        }
        if self.allocation is not None:
            costs = self.allocation.costs
            lines["bits found by"] = (
                f"{self.allocation.sensitivity.score}: {costs['average_weight_bits']:.2f} bits a weight, "
                f"{_size(int(costs['weight_bytes']))} of layers' weights"
            )
        if self.agreement:
            worst = max(layer.lsb or 0 for layer in self.agreement)
            lines["agrees with the prepared model"] = f"within {worst} LSB, {len(self.agreement)} comparisons"
        return lines

    def remarks(self) -> str:
        """Notes by topic, each topic cut to its first few lines."""
        lines = [f"float, because capture stopped there: {part}" for part in self.float_parts]
        for topic, count in Counter(topic for topic, _ in self.notes).items():
            texts = [text for t, text in self.notes if t == topic]
            lines += [f"{topic}: {text}" for text in texts[:4]]
            if count > 4:
                lines.append(f"{topic}: … and {count - 4} more (report.notes)")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.table(), self.summary(), self.remarks()) if part)


def _cells(row: NodeRow) -> list[str]:
    bits = ("" if b is None else str(b) for b in (row.weight_bits, row.activation_bits))
    return [
        row.operator,
        _short(row.layer, 32),
        row.shape,
        row.after,
        *bits,
        row.kernel,
        _db(row.sqnr_db),
        _short(row.reason, 60),
    ]


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _db(sqnr: float | None) -> str:
    return "" if sqnr is None else "exact" if sqnr == math.inf else f"{sqnr:.1f}"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


# --- before: rows of an annotated graph -------------------------------------------------------------------------------


def rows_before(gm: fx.GraphModule) -> tuple[NodeRow, ...]:
    """A row for each operator of a graph at ANNOTATED to CALIBRATED."""
    return tuple(_row(n) for n in gm.graph.nodes if n.op == "call_function" and _counts(n))


def _counts(node: fx.Node) -> bool:
    """Sizes and constants are no operators of the model's data flow."""
    return isinstance(value(node), Tensor | tuple | list) and info(node).reason not in ("a constant", "size arithmetic")


def _row(node: fx.Node) -> NodeRow:
    known, row = info(node), lookup(node)
    read = [known.inputs[i] for i in activations(node)] if known.inputs else []
    data = next((spec for spec in read if spec is not None), None)  # a sum in a kernel reads one of its two terms
    return NodeRow(
        name=node.name,
        operator=name_of(node) or str(node.target),
        layer=known.origin,
        shape=show_value(value(node)).partition("[")[2].rstrip("]") if isinstance(value(node), Tensor) else "",
        after="float",
        weight_bits=known.bits,
        activation_bits=data.bits if data is not None else None,
        kernel="",
        sqnr_db=None,
        reason=known.reason,
        macs=macs(node),
        product=row is not None and row.kind is Kind.ANCHOR and row.weight is None,
        integer=False,
        sensitivity=known.sensitivity,
    )


# --- after: what the lowered graph runs -------------------------------------------------------------------------------


def rows_after(
    before: tuple[NodeRow, ...], gm: fx.GraphModule, sqnr: Mapping[str, float]
) -> tuple[NodeRow, ...]:
    """The rows with what lowering made of them."""
    made: dict[str, tuple[str, str, bool]] = {}
    for node in gm.graph.nodes:
        for name in info(node).fused:
            made[name] = _made(gm, node)
    present = {n.name: n for n in gm.graph.nodes}
    rows = []
    for row in before:
        kernel, after, integer = made.get(row.name, ("", "float", False))
        reason = info(present[row.name]).reason if row.name in present and row.name not in made else row.reason
        rows.append(
            replace(
                row,
                kernel=kernel,
                after=after,
                integer=integer,
                reason=reason,
                weight_bits=row.weight_bits if row.name in made else None,
                activation_bits=row.activation_bits if integer else None,
                sqnr_db=sqnr.get(row.name),
            )
        )
    return tuple(rows)


def _made(gm: fx.GraphModule, node: fx.Node) -> tuple[str, str, bool]:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Leaf) and module.storage_only:
        return module.kernel, "float", False
    kernel = module.kernel if isinstance(module, Leaf) else "moves integers"
    first = next((n for n in tensor_inputs(node) if isinstance(value(n), Tensor)), None)
    types = [_type(value(n)) for n in (first, node) if n is not None]
    return kernel, " → ".join(types), True


def _type(val: object) -> str:
    if isinstance(val, tuple | list):
        return _type(val[0]) if val else ""
    return str(val.dtype).removeprefix("torch.") if isinstance(val, Tensor) else ""


def region_graph(gm: fx.GraphModule) -> nx.DiGraph:
    """The lowered graph as networkx: nodes carry ``integer`` (they hold uint8 or int8) and ``operator``."""
    import networkx as nx  # here, since a model that is loaded needs none of it

    graph = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_node(node.name, integer=_integer(node), operator=name_of(node) or node.op)
        graph.add_edges_from((n.name, node.name) for n in tensor_inputs(node))
    return graph


def _integer(node: fx.Node) -> bool:
    return node.op != "placeholder" and _type(value(node)) in ("uint8", "int8")  # a split is a tuple


def crossings(gm: fx.GraphModule) -> int:
    """Quantize and dequantize operators that are left."""
    return sum(n.target in (quantize, dequantize) for n in gm.graph.nodes)


def regions(gm: fx.GraphModule) -> int:
    """Connected parts of the graph that hold integers."""
    left = {node for node in gm.graph.nodes if _integer(node)}
    count = 0
    while left:
        count += 1
        border = [left.pop()]
        while border:
            node = border.pop()
            near = left.intersection((*tensor_inputs(node), *node.users))
            left -= near
            border += near
    return count


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied storage once."""
    return nbytes([*module.parameters(), *module.buffers()])


def build_report(
    model: str,
    before: tuple[NodeRow, ...],
    gm: fx.GraphModule,
    sqnr: Mapping[str, float],
    *,
    nodes_before: int,
    share_groups: int,
    weight_bytes_before: int,
) -> Report:
    """The report of one lowered graph."""
    known, whole, gm = graph_info(gm), gm, inlined(gm)
    return Report(
        model=model,
        recipe=known.recipe,
        target=known.target,
        rows=rows_after(before, gm, sqnr),
        nodes_before=nodes_before,
        nodes_after=len(gm.graph.nodes),
        crossings=crossings(gm),
        regions=regions(gm),
        share_groups=share_groups,
        weight_bytes_before=weight_bytes_before,
        weight_bytes_after=tensor_bytes(whole),
        notes=known.notes,
        allocation=known.allocation,
    )


# --- beside the model -------------------------------------------------------------------------------------------------

_KEY = "_qfx_report"


def keep_report(model: nn.Module, report: Report) -> None:
    model.__dict__[_KEY] = report


def kept_report(model: nn.Module) -> Report | None:
    """What :func:`keep_report` kept; None where nothing was."""
    found = getattr(model, "__dict__", {}).get(_KEY)
    return found if isinstance(found, Report) else None


def before_lowering(made: Report, rows: tuple[NodeRow, ...], sqnr: Mapping[str, float]) -> Report:
    """What of the report ``made`` is true on every machine: of the rows before, what was found of their noise."""
    return replace(made, target="", rows=tuple(replace(row, sqnr_db=sqnr.get(row.name)) for row in rows))
