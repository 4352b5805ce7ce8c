"""What became of each node between two stages: the same, changed, taken into another, removed or added."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx as nx

from qfx.dump_model import Dump, NodeView, PassView, StageView
from qfx.stage import Stage

_ROUNDING = re.compile(r"_(fake_quant|quantize|dequantize)(_\d+)?$")


@dataclass(frozen=True)
class Hunk:
    """Nodes ``before`` and the nodes ``after`` that stand for them. ``passes``: who touched them in between."""

    layer: str
    before: tuple[NodeView, ...]
    after: tuple[NodeView, ...]
    passes: tuple[str, ...]

    @property
    def same(self) -> bool:
        return [n.text for n in self.before] == [n.text for n in self.after]

    def __str__(self) -> str:
        place = self.layer or (self.before or self.after)[0].name
        by = f": {', '.join(self.passes)}" if self.passes else ""
        return "\n".join([f"@@ {place}{by} @@", *self._lines()])

    def _lines(self) -> Iterator[str]:
        old, new = ({n.name: n for n in nodes} for nodes in (self.before, self.after))
        for node in self.before:
            kept = new.get(node.name)
            if kept is None or kept.line != node.line:
                yield f"- {node.text}"
        for node in self.after:
            was = old.get(node.name)
            if was is None or was.line != node.line:
                yield f"+ {node.text}"
            else:
                yield f"  {node.line}"
                yield from _facts(was.facts, node.facts)


def _facts(old: str, new: str) -> Iterator[str]:
    """The facts of a node that differ, one a line."""
    before, after = (list(filter(None, facts.split("; "))) for facts in (old, new))
    yield from (f"  - {fact}" for fact in before if fact not in after)
    yield from (f"  + {fact}" for fact in after if fact not in before)


@dataclass(frozen=True)
class Difference:
    """Two stages of one graph, hunk by hunk; hunks where nothing differs are left out."""

    before: str
    after: str
    nodes_before: int
    nodes_after: int
    hunks: tuple[Hunk, ...]

    def __str__(self) -> str:
        head = f"{self.before} → {self.after}: {self.nodes_before} nodes → {self.nodes_after}"
        if not self.hunks:
            return f"{head}, no difference"
        return "\n".join([head, f"--- {self.before}", f"+++ {self.after}", *map(str, self.hunks)])


def differences(dump: Dump, before: str, after: str, wanted: Callable[[str], bool]) -> tuple[Difference, ...]:
    """What became of every node from stage ``before`` to stage ``after``; ``wanted`` says which layers to show."""
    return tuple(_difference(dump, view, after, wanted) for view in dump.at(before))


def _difference(dump: Dump, old: StageView, after: str, wanted: Callable[[str], bool]) -> Difference:
    trail = Trail.of(dump, old.graph)
    new = trail.at(after)
    shared = nx.Graph()
    for node in old.nodes:
        shared.add_node((0, node.name))
        shared.add_edges_from(((0, node.name), (1, name)) for name in trail.became(node.name, old.stage, after))
    for name, source in _adopted(old, new).items():
        shared.add_edge((1, name), source)
    touched = _touched(dump, old, after)
    hunks = [_hunk(part, old, new, touched) for part in _in_order(shared, old, new)]
    shown = tuple(h for h in hunks if not h.same and any(wanted(n.layer) for n in (*h.before, *h.after)))
    return Difference(old.title, new.title, len(old.nodes), len(new.nodes), shown)


Place = tuple[int, str]
"""A node's side, 0 before and 1 after, and its name."""


def _adopted(old: StageView, new: StageView) -> dict[str, Place]:
    """Where new nodes belong: a rounding to the value that it rounds, a constant to its first reader."""
    found: dict[str, Place] = {}
    readers: dict[str, str] = {}
    for node in new.nodes:
        for source in node.args:
            readers.setdefault(source, node.name)
    for node in new.nodes:
        stem = _ROUNDING.sub("", node.name)
        if node.name in old.by_name:
            found[node.name] = (0, node.name)
        elif stem != node.name and stem in old.by_name:
            found[node.name] = (0, stem)
        elif node.constant and node.name in readers:
            found[node.name] = (1, readers[node.name])
        else:
            found[node.name] = (1, node.name)
    return found


def _in_order(shared: nx.Graph, old: StageView, new: StageView) -> list[set[Place]]:
    """The connected parts in the order of the graph behind; what is gone stands where it was."""
    order = {name: i for i, name in enumerate(new.by_name)}
    part_of = {place: number for number, part in enumerate(nx.connected_components(shared)) for place in part}
    parts: list[set[Place]] = [set() for _ in range(max(part_of.values(), default=-1) + 1)]
    for place, number in part_of.items():
        parts[number].add(place)
    keys = [min((order[name] for side, name in part if side), default=-1) for part in parts]
    last = 0
    for node in old.nodes:
        number = part_of[0, node.name]
        if keys[number] < 0:
            keys[number] = last
        last = keys[number]
    return [parts[number] for number in sorted(range(len(parts)), key=keys.__getitem__)]


def _hunk(part: set[Place], old: StageView, new: StageView, touched: Mapping[str, Collection[str]]) -> Hunk:
    before = tuple(n for n in old.nodes if (0, n.name) in part)
    after = tuple(n for n in new.nodes if (1, n.name) in part)
    names = {name for _, name in part}
    passes = (p for p, edited in touched.items() if names.intersection(edited))
    layer = next((n.layer for n in (*after, *before) if n.layer), "")
    return Hunk(layer, before, after, tuple(passes))


def _touched(dump: Dump, old: StageView, after: str) -> dict[str, set[str]]:
    """The nodes that each pass between two stages touched."""
    between = passes_between(dump, old.graph, old.stage, after)
    return {p.name: {change.name for change in p.changes} for p in between}


def passes_between(dump: Dump, graph: str, before: str, after: str) -> list[PassView]:
    """The passes over a graph that ran behind the view of one stage and before that of another."""
    low, high = Stage[before.upper()], Stage[after.upper()]
    return [p for p in dump.passes if p.graph == graph and low < Stage[p.stage.upper()] <= high]


# --- from stage to stage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trail:
    """The views of one graph, from stage to stage: who stands for whom."""

    views: tuple[StageView, ...]

    @classmethod
    def of(cls, dump: Dump, graph: str) -> Trail:
        return cls(tuple(view for view in dump.stages if view.graph == graph))

    def at(self, stage: str) -> StageView:
        return next(view for view in self.views if view.stage == stage)

    def became(self, name: str, before: str, after: str) -> tuple[str, ...]:
        """The nodes at stage ``after`` that the node ``name`` of stage ``before`` is now, or is part of."""
        names = [name]
        for step, stage in self.steps:
            if Stage[before.upper()] < Stage[stage.upper()] <= Stage[after.upper()]:
                names = list(dict.fromkeys(now for n in names for now in step.get(n, ())))
        return tuple(names)

    @cached_property
    def steps(self) -> tuple[tuple[Mapping[str, tuple[str, ...]], str], ...]:
        """For neighbouring stages: by name, what a node is in the later one; and the name of that."""
        return tuple((successors(old, new), new.stage) for old, new in pairwise(self.views))


def successors(old: StageView, new: StageView) -> dict[str, tuple[str, ...]]:
    """By the name of a node of ``old``: the nodes of ``new`` that it is, or is part of."""
    covered = {name: node.name for node in new.nodes for name in node.covers}
    stands_in = stand_ins(old, new)
    found: dict[str, tuple[str, ...]] = {}
    for node in reversed(old.nodes):  # readers first: what is absorbed goes where they go
        stem = _ROUNDING.sub("", node.name)
        for known in (
            node.name if node.name in new.by_name else None,
            covered.get(node.name),
            stem if stem != node.name and stem in new.by_name else None,
            covered.get(stem),
            stands_in.get(node.name),
        ):
            if known is not None:
                found[node.name] = (known,)
                break
        else:
            readers = {now for reader in old.readers.get(node.name, ()) for now in found.get(reader, ())}
            found[node.name] = tuple(readers) if node.constant and len(readers) == 1 else ()
    return found


def stand_ins(old: StageView, new: StageView) -> dict[str, str]:
    """Nodes that are gone, and what their readers read now: a batch norm, and the convolution that took it in."""
    found: dict[str, str] = {}
    for node in new.nodes:
        was = old.by_name.get(node.name)
        if was is None or len(was.args) != len(node.args):
            continue
        for before, now in zip(was.args, node.args, strict=True):
            gone = before not in new.by_name and now in old.by_name
            if gone and old.by_name[before].kind == new.by_name[now].kind:
                found.setdefault(before, now)
    return found
