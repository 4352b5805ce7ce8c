"""The passes one by one: how often each rewrote, what it did to the number of nodes, how long it took, and a diff."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tabulate import tabulate

from qfx.dump_model import Change, Dump, PassView

SHOWN = 4
"""Changes of a pass that are shown, unless a layer is asked for."""


def passes_text(dump: Dump, wanted: Callable[[str], bool] | None = None) -> str:
    """A table of the passes, and under it of each the first changes; with ``wanted`` all changes of those layers."""
    head = ("pass", "stage", "rewrites", "nodes", "ms")
    rows = [
        (
            p.name + (f" of {p.graph}" if p.graph else ""),
            p.stage,
            str(p.rewrites),
            f"{p.nodes_before} → {p.nodes_after}",
            f"{p.milliseconds:.1f}",
        )
        for p in dump.passes
    ]
    align = ("left", "left", "right", "right", "right")
    table = str(tabulate(rows, head, tablefmt="simple", disable_numparse=True, colalign=align))
    layers = {n.name: n.layer for view in dump.stages for n in view.nodes}
    parts = (_changes(p, layers, wanted) for p in dump.passes)
    return "\n\n".join([table, *filter(None, parts)])


def _changes(p: PassView, layers: dict[str, str], wanted: Callable[[str], bool] | None) -> str:
    changes = [c for c in p.changes if wanted is None or wanted(layers.get(c.name, ""))]
    shown = changes if wanted is not None else changes[:SHOWN]
    if not shown:
        return ""
    lines = [f"@@ {p.name}: {p.rewrites} rewrites, {len(p.changes)} nodes touched @@"]
    lines += [line for c in shown for line in _lines(c)]
    lines += [f"  … and {len(changes) - len(shown)} more"] if len(changes) > len(shown) else []
    lines += [f"  note, {topic}: {text}" for topic, text in p.notes[:SHOWN]]
    return "\n".join(lines)


def _lines(change: Change) -> Iterator[str]:
    if change.before == change.after:
        yield f"  {change.after}  [{', '.join(change.fields)}]"  # a fact that the text does not show
        return
    if change.before:
        yield f"- {change.before}"
    if change.after:
        yield f"+ {change.after}"
