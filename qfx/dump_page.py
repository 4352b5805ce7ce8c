"""A dump as one HTML page that needs nothing else: graphs to walk through, values of each node, charts, the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from qfx.dump_model import Dump, NodeView, plain
from qfx.html_page import packaged, render
from qfx.node_table import NodeRow, Report
from qfx.sensitivity_plot import printable

SCHEMA = "qfx-dump-page/1"
DAGRE = "3.1.3"
"""The version of @dagrejs/dagre in ``qfx/vendor``: the file ``dist/dagre.min.js`` of its npm package, unchanged."""

SHARED = (
    *("line", "facts", "kind", "layer", "source", "fused", "covers", "inputs", "output", "group"),
    *("reason", "rule", "refusal", "kernel", "before", "after"),
)
"""Fields of a node whose values are written once and referred to by number: stages repeat them."""

_SCRIPTS = ("dump_model.js", "dump_svg.js", "dump_graph.js", "dump_panel.js", "dump_charts.js", "dump_page.js")
_SOURCE_MAP = "//# sourceMappingURL="  # a browser's debugger would look for that file


def page(dump: Dump) -> str:
    """The page. It loads nothing, and draws with the bundled dagre, whose licence it shows; any name is inert in it."""
    return render(
        "dump_page.html",
        dump=dump,
        facts=_facts(dump),
        report=dump.report,
        summary=_summary(dump.report) if dump.report else {},
        remarks=dump.report.remarks() if dump.report else "",
        rows=[(row, _cells(row)) for row in dump.report.rows] if dump.report else [],
        data=_inert(packed(dump)),
        style=packaged("pages", "dump_page.css"),
        dagre=packaged("vendor", "dagre.min.js").partition(_SOURCE_MAP)[0],
        dagre_version=DAGRE,
        dagre_licence=packaged("vendor", "dagre.LICENSE"),
        script="\n".join(packaged("pages", name) for name in _SCRIPTS),
    )


# --- the data ---------------------------------------------------------------------------------------------------------


def packed(dump: Dump) -> dict[str, Any]:
    """The graphs of a dump as few bytes: plain values, without empty fields, and with those of SHARED by number."""
    places: dict[Any, int] = {}
    known: dict[int, int] = {}  # by the value's id: stages share histograms, which have many numbers to hash
    names = [f.name for f in fields(NodeView)]

    def place(value: Any) -> int:
        if id(value) not in known:
            known[id(value)] = places.setdefault(value, len(places))
        return known[id(value)]

    def short(node: NodeView) -> dict[str, Any]:
        told = ((name, value) for name in names if not _is_empty(value := getattr(node, name)))
        return {name: place(value) if name in SHARED else plain(value) for name, value in told}

    stages = [{"stage": v.stage, "graph": v.graph, "nodes": [short(n) for n in v.nodes]} for v in dump.stages]
    return {"schema": SCHEMA, "shared": list(SHARED), "values": [plain(value) for value in places], "stages": stages}


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", ())  # a zero is a value


def unpacked(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What :func:`packed` packed, but for the empty fields: the stages as :meth:`Dump.to_dict` writes them."""
    values = data["values"]

    def whole(node: dict[str, Any]) -> dict[str, Any]:
        return {key: values[value] if key in data["shared"] else value for key, value in node.items()}

    return [{**view, "nodes": [whole(node) for node in view["nodes"]]} for view in data["stages"]]


def _inert(value: Any) -> str:
    """JSON that no HTML parser sees a tag in; ASCII, so that half characters of names do no harm either."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# --- the words --------------------------------------------------------------------------------------------------------


def _facts(dump: Dump) -> Iterable[tuple[str, str]]:
    """What stands in the page's head."""
    yield "recipe", dump.recipe
    yield "target", dump.target
    if dump.report is not None:
        yield "multiply-accumulates in integer", f"{dump.report.integer_macs:.1%}"
        if dump.report.weight_bytes_after:
            shrunk = dump.report.weight_bytes_before / dump.report.weight_bytes_after
            yield "weights", f"{shrunk:.1f} times smaller"
        if dump.report.output_sqnr_db is not None:
            yield "SQNR of the output", f"{dump.report.output_sqnr_db:.1f} dB"


def _summary(report: Report) -> dict[str, str]:
    """The report's summary as pairs: its text has two columns, with two spaces or more between."""
    lines = (line.partition("  ") for line in report.summary().splitlines())
    return {what: value.strip() for what, _, value in lines}


def _cells(row: NodeRow) -> tuple[str, ...]:
    """One row of the before/after table, with nothing cut off."""
    numbers = (row.weight_bits, row.activation_bits)
    return (
        row.operator,
        printable(row.layer),
        row.shape,
        row.after,
        *("" if n is None else str(n) for n in numbers),
        f"{row.macs / 1e6:,.2f}" if row.macs else "",
        row.kernel,
        "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}".replace("inf", "exact"),
        printable(row.reason),
    )
