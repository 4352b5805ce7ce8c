"""The formats of a dump, as a table: a new one is one more row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tabulate import tabulate

from qfx.dump_bisect import Bisection
from qfx.dump_diff import Difference
from qfx.dump_dot import dot
from qfx.dump_model import Dump, Integers, NodeView, StageView, plain, shown_db
from qfx.dump_page import page
from qfx.dump_passes import passes_text
from qfx.dump_why import Story, in_layer


@dataclass(frozen=True)
class Shown:
    """What is to be written: ``dump`` holds the stages and passes of the whole, ``stages`` those to be shown.

    ``layer``: a pattern of the layers to be shown, or None. ``passes``: whether they are to be shown one by one.
    """

    dump: Dump
    stages: tuple[str, ...]
    layer: str | None = None
    diff: tuple[Difference, ...] = ()
    why: tuple[Story, ...] = ()
    passes: bool = False
    bisection: Bisection | None = None

    def wanted(self, layer: str) -> bool:
        """Whether a layer is to be shown."""
        return self.layer is None or in_layer(layer, self.layer)

    @property
    def selected(self) -> Dump:
        """The dump with the stages and layers that are to be shown."""
        views = (v for v in self.dump.stages if v.stage in self.stages)
        report = self.dump.report
        if self.layer is None:
            return replace(self.dump, stages=tuple(views))
        rows = tuple(row for row in report.rows if self.wanted(row.layer)) if report else ()
        return replace(
            self.dump,
            stages=tuple(replace(v, nodes=tuple(n for n in v.nodes if self.wanted(n.layer))) for v in views),
            report=replace(report, rows=rows) if report else None,
        )


@dataclass(frozen=True)
class Format:
    """``every``: shows all stages by default, not the last alone. ``measures``: has a place for measurements.

    ``sections``: has one for differences, explanations, passes and a bisection.
    """

    write: Callable[[Shown], str]
    every: bool
    measures: bool
    sections: bool


def _text(shown: Shown) -> str:
    return _sections(shown, [(v.title, "\n".join(n.text for n in v.nodes)) for v in shown.selected.stages])


def _table(shown: Shown) -> str:
    return _sections(shown, [(view.title, _stage_table(shown, view)) for view in shown.selected.stages])


def _sections(shown: Shown, stages: list[tuple[str, str]]) -> str:
    """Stages, then all else that was asked for; a stage bears a title where it is not alone."""
    parts = list(_others(shown))
    titled = len(stages) + len(parts) > 1
    parts = [f"== {title}\n{text}" if titled else text for title, text in stages] + parts
    return "\n\n".join(parts) + "\n"


def _others(shown: Shown) -> Iterator[str]:
    yield from (f"== {d}" for d in shown.diff)
    yield from map(str, shown.why)
    if shown.passes:
        yield passes_text(shown.dump, None if shown.layer is None else shown.wanted)
    if shown.bisection is not None:
        yield str(shown.bisection)


def _stage_table(shown: Shown, view: StageView) -> str:
    """The before/after table of a lowered model; of any other stage, its operators."""
    report = shown.selected.report
    if view.stage == "lowered" and report is not None:
        return report.table() if shown.layer else str(report)
    rows = [_row(n) for n in view.nodes if not n.constant and n.op != "output"]
    head = ("node", "operator", "layer", "value", "reads", "gives", "w", "SQNR", "kernel, or reason")
    used = [i for i, _ in enumerate(head) if any(row[i] for row in rows)]
    cells = [[row[i] for i in used] for row in rows]
    return str(tabulate(cells, [head[i] for i in used], tablefmt="simple", disable_numparse=True))


def _row(node: NodeView) -> tuple[str, ...]:
    reads = [i for i in node.inputs if i is not None]
    return (
        node.name,
        node.target or node.op,
        node.layer,
        node.kind,
        _spec(reads[0] if reads else None),
        _spec(node.output),
        "" if node.bits is None else str(node.bits),
        "" if node.sqnr_db is None else shown_db(node.sqnr_db),
        node.kernel or node.reason,
    )


def _spec(known: Integers | None) -> str:
    """Type and scale in few words."""
    if known is None:
        return ""
    one = known.scales == 1 and known.scale is not None and known.zero_point is not None
    return known.spec + (f" {known.scale[0]:.3g}@{known.zero_point[0]}" if one else "")  # type: ignore[index]


def _json(shown: Shown) -> str:
    made = shown.selected.to_dict()
    made["diff"] = [
        {
            **{key: getattr(d, key) for key in ("before", "after", "nodes_before", "nodes_after")},
            "hunks": [
                {
                    "layer": h.layer,
                    "before": [n.name for n in h.before],
                    "after": [n.name for n in h.after],
                    "passes": list(h.passes),
                }
                for h in d.hunks
            ],
        }
        for d in shown.diff
    ]
    made["why"] = plain(shown.why)
    made["bisection"] = plain(shown.bisection)
    return json.dumps(made, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Format] = {
    "table": Format(_table, every=False, measures=False, sections=True),
    "text": Format(_text, every=False, measures=False, sections=True),
    "dot": Format(lambda shown: dot(shown.selected), every=False, measures=False, sections=False),
    "json": Format(_json, every=True, measures=True, sections=True),
    "html": Format(lambda shown: page(shown.selected), every=True, measures=True, sections=False),
}
