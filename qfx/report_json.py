"""The report of a CONVERTED graph as values that JSON can say, and back: what is true of it on every machine."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from qfx.agreement import LayerAgreement
from qfx.errors import ArtifactError
from qfx.json_values import Keys, decode, encode, listed, typed
from qfx.node_table import NodeRow, Report

_OPTIONAL = (int, float, dict, type(None))
_ROW: Keys = {
    **dict.fromkeys(("name", "operator", "layer", "shape", "after", "kernel", "reason"), (str,)),
    **dict.fromkeys(("weight_bits", "activation_bits"), (int, type(None))),
    **dict.fromkeys(("sqnr_db", "sensitivity"), _OPTIONAL),
    "macs": (int,),
    **dict.fromkeys(("product", "integer"), (bool,)),
}
_LAYER: Keys = {
    **dict.fromkeys(("node", "layer"), (str,)),
    "lsb": (int, type(None)),
    "relative": _OPTIONAL,
    "allowed": (int, float),
}
_REPORT: Keys = {
    **dict.fromkeys(("model", "recipe"), (str,)),
    **dict.fromkeys(("nodes_before", "share_groups", "weight_bytes_before"), (int,)),
    "output_sqnr_db": _OPTIONAL,
}


def write_report(report: Report) -> dict[str, Any]:
    """A table for all of it but what lowering counts anew; rows and comparisons of layers are tables in columns."""
    return {
        **{name: encode(getattr(report, name)) for name in _REPORT},
        "rows": _write_columns(report.rows, _ROW),
        "agreement": _write_columns(report.agreement, _LAYER),
        "notes": [list(note) for note in report.notes],
        "calibration": list(report.calibration),
    }


def read_report(value: Any) -> Report:
    """What :func:`write_report` wrote.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    given = dict(typed(value, "the report", dict))
    rows = _read_columns(given.pop("rows", None), "the rows", _ROW)
    layers = _read_columns(given.pop("agreement", None), "the agreement", _LAYER)
    notes = [listed(note, "a note", str) for note in listed(given.pop("notes", None), "the notes", list)]
    calibration = listed(given.pop("calibration", []), "the calibration", str)
    if any(len(note) != 2 for note in notes) or given.keys() != _REPORT.keys():
        raise ArtifactError("the report has other keys than a report has")
    counted = {f.name: 0 for f in fields(Report) if f.default is MISSING and f.default_factory is MISSING}
    plain = {name: _number(given[name], name, types) for name, types in _REPORT.items()}
    return Report(
        **{
            **counted,
            **plain,
            "target": "",
            "rows": tuple(NodeRow(**row) for row in rows),
            "agreement": tuple(LayerAgreement(**layer) for layer in layers),
            "notes": tuple((topic, text) for topic, text in notes),
            "calibration": tuple(calibration),
        }
    )


def _write_columns(items: Any, columns: Keys) -> dict[str, list[Any]]:
    return {name: [encode(getattr(item, name)) for item in items] for name in columns}


def _read_columns(value: Any, what: str, columns: Keys) -> list[dict[str, Any]]:
    table = typed(value, what, dict)
    if table.keys() != columns.keys():
        raise ArtifactError(f"{what} have other columns than they should")
    found = {name: listed(table[name], name, *types) for name, types in columns.items()}
    if len({len(column) for column in found.values()}) > 1:
        raise ArtifactError(f"{what} have columns of several lengths")
    lines = zip(*found.values(), strict=True)
    return [{name: _number(v, name, columns[name]) for name, v in zip(found, line, strict=True)} for line in lines]


def _number(value: Any, name: str, types: tuple[type, ...]) -> Any:
    """``value``; of numbers that may be infinite, what was written for one."""
    typed(value, name, *types)
    found = decode(value, name) if type(value) is dict else value
    return typed(found, name, int, float) if type(value) is dict else found
