"""One node explained: what it became, which rule and which passes decided, what nearly happened, and its history."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qfx.dump_diff import Trail
from qfx.dump_model import Change, Dump, Edit, NodeView, StageView, shown_db
from qfx.errors import ConfigError
from qfx.recipe import QuantRule, Subject
from qfx.stage import Stage


@dataclass(frozen=True)
class Story:
    """The explanation of one node of one graph.

    ``facts``: ``(what, text)`` pairs. ``history``: ``(stage or pass, text)`` pairs in the order of the compiler.
    """

    name: str
    layer: str
    source: str
    facts: tuple[tuple[str, str], ...]
    history: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        place = ", ".join(filter(None, (f"layer {self.layer}" if self.layer else "", self.source)))
        width = max(len(what) for what, _ in (*self.facts, *self.history))
        lines = [f"{self.name}" + (f"  [{place}]" if place else "")]
        lines += [f"  {what:<{width}}  {text}" for what, text in self.facts]
        lines += ["  history", *(f"  {what:<{width}}  {text}" for what, text in self.history)]
        return "\n".join(lines)


def explain(dump: Dump, what: str) -> tuple[Story, ...]:
    """The stories of the node ``what``, or of every operator of the layer ``what`` (a path, or a pattern of paths).

    Raises:
        ConfigError: there is neither; the text lists the nearest names.
    """
    found: dict[tuple[str, str], StageView] = {}
    for view in dump.stages:
        if what in view.by_name:
            found.setdefault((view.graph, what), view)
    for view in dump.stages if not found else ():
        if not any(graph == view.graph for graph, _ in found):
            found |= {(view.graph, n.name): view for n in view.nodes if _operator(n) and in_layer(n.layer, what)}
    if not found:
        names = {n.name for view in dump.stages for n in view.nodes if _operator(n)} | layers_of(dump)
        raise ConfigError(f"there is no node and no layer {what!r}", hint=nearest(what, names))
    return tuple(_story(dump, Trail.of(dump, graph), name, view) for (graph, name), view in found.items())


def _operator(node: NodeView) -> bool:
    return node.op in ("call_function", "call_module") and not node.constant and not node.crossing


def in_layer(path: str, pattern: str) -> bool:
    """Whether a layer is meant by a pattern, as in a recipe's rule: the path itself or any parent of it."""
    return QuantRule(None, layer=pattern).matches(Subject("", path))


def layers_of(dump: Dump) -> set[str]:
    """All paths of layers that bear nodes, and their parents."""
    paths = {n.layer for view in dump.stages for n in view.nodes if n.layer}
    return {path[: m.start()] for path in paths for m in re.finditer(r"\.", path)} | paths


def nearest(wanted: str, names: Iterable[str]) -> str:
    """A hint that lists the names nearest to ``wanted``."""
    known = sorted(names)
    near = difflib.get_close_matches(wanted.rstrip(".*"), known, n=4, cutoff=0.3) or known[:4]
    return "the nearest names are " + ", ".join(map(repr, near)) if near else "there are no names at all"


# --- facts ------------------------------------------------------------------------------------------------------------


def _story(dump: Dump, trail: Trail, name: str, first: StageView) -> Story:
    seen = [view.by_name[name] for view in trail.views if name in view.by_name]
    node = seen[-1]
    start = seen[0]
    facts = (
        ("operator", _operator_text(node)),
        ("became", _became(dump, trail, name, first.stage)),
        *(("rule", n.rule) for n in _last(seen, "rule")),
        *(("reason", n.reason) for n in _last(seen, "reason")),
        *_machine(dump, seen),
        *_specs(seen),
        *(("sensitivity", f"{n.sensitivity:.3g}") for n in _last(seen, "sensitivity")),
        *_measures(dump, trail, seen, first.stage),
        *_near_misses(dump, name),
    )
    return Story(name, start.layer, start.source, facts, tuple(_history(dump, trail, name, first.stage)))


def _last(seen: list[NodeView], field: str) -> list[NodeView]:
    """The last of the node's views that has ``field``, if any."""
    return [n for n in seen if getattr(n, field)][-1:]


def _operator_text(node: NodeView) -> str:
    macs = f"{node.macs:,} multiply-accumulates" if node.macs else ""
    return ", ".join(filter(None, (node.target or node.op, node.kind, macs)))


def _became(dump: Dump, trail: Trail, name: str, start: str) -> str:
    last = trail.views[-1]
    now = [last.by_name[n] for n in trail.became(name, start, last.stage)]
    if not now:
        by = next((p.name for p in dump.passes for c in p.changes if c.name == name and c.edit is Edit.REMOVED), "")
        return "removed" + (f" by {by}" if by else "")
    node = now[0]
    if node.name == name and not node.covers:
        stays = "it computes on integers" if node.integer else "it stays float"
        return f"{stays}: %{node.name}"
    others = [n for n in node.covers if n != name]
    kernel = f", kernel {node.kernel!r}" if node.kernel else ""
    together = f", together with {', '.join(others)}" if others else ""
    how = "" if name in node.covers else "part of "
    return f"{how}%{node.name} = {node.line.partition(' = ')[2]}{kernel}{together}"


def _machine(dump: Dump, seen: list[NodeView]) -> Iterator[tuple[str, str]]:
    refused = _last(seen, "refusal")
    if refused:
        yield "target", f"{dump.target} refuses it: {refused[0].refusal}"
    elif _last(seen, "rule") and any(n.inputs for n in seen):
        yield "target", f"{dump.target} takes it"


def _specs(seen: list[NodeView]) -> Iterator[tuple[str, str]]:
    """How it reads and what it gives, from the stage where scales are known best."""
    known = [n for n in seen if any(n.inputs) or n.output]
    if not known:
        return
    best = max(known, key=lambda n: (sum(i is not None and i.scale is not None for i in (*n.inputs, n.output))))
    for source, how in zip(known[0].args, best.inputs, strict=False):  # names from before there were roundings
        yield "reads", f"{source}: {how or 'float'}"
    if best.output is not None:
        group = f"; group {best.group}" if best.group else ""
        yield "gives", f"{best.output}{group}"


def _measures(dump: Dump, trail: Trail, seen: list[NodeView], start: str) -> Iterator[tuple[str, str]]:
    rows = dump.report.rows if dump.report else ()
    reported = next((row.sqnr_db for row in rows if row.name == seen[-1].name), None)
    measured = next((n.sqnr_db for n in reversed(seen) if n.sqnr_db is not None), reported)
    if measured is not None:
        yield "SQNR", f"{shown_db(measured)} of its value, rounded, against float"
    last = trail.views[-1]
    for name in trail.became(seen[0].name, start, last.stage)[:1]:
        time = last.by_name[name].milliseconds
        if time is not None:
            yield "time", f"{time:.3f} ms in %{name}"


def _near_misses(dump: Dump, name: str) -> Iterator[tuple[str, str]]:
    """What passes told of the node: rules that nearly applied, what could not be lowered."""
    named = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")
    for topic, text in dump.notes:
        if named.search(text):
            yield "note", f"{topic}: {text}"


# --- history ----------------------------------------------------------------------------------------------------------


def _history(dump: Dump, trail: Trail, name: str, start: str) -> Iterator[tuple[str, str]]:
    """The stages, each with the node's line there, and before it the passes that touched it."""
    before = ""
    for view in trail.views:
        if Stage[view.stage.upper()] < Stage[start.upper()]:
            continue
        names = trail.became(name, start, view.stage)
        for p in dump.passes:
            if view.stage == p.stage and p.graph == view.graph and view.stage != start:
                touched = [c for c in p.changes if c.name in (name, *names)]
                yield from ((p.name, text) for text in map(_edit, touched))
        text = "; ".join(view.by_name[n].text for n in names) or "it is gone"
        yield view.stage, "the same" if text == before else text
        before = text


def _edit(change: Change) -> str:
    if change.edit is not Edit.CHANGED:
        return f"  {change.edit.value} %{change.name}"
    wrote = f"wrote {', '.join(change.fields)}" if change.fields else "changed its call"
    return f"  %{change.name}: {wrote}"
