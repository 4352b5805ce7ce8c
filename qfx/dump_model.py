"""What can be shown of a model's way through the compiler, as plain frozen values: no tensor, no graph node.

Every format of ``qfx.dump`` is written from a :class:`Dump` alone, and :func:`plain` makes JSON of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from qfx.node_table import Report

SCHEMA = "qfx-dump/1"
"""Of the JSON; a change that a reader could stumble on changes the number."""


@dataclass(frozen=True)
class Integers:
    """How a tensor stands as integers.

    ``spec``: the words of its QuantSpec. ``scale`` and ``zero_point``: the least and the greatest of ``scales`` ones
    that are constant; None where they are not known yet, or are found at run time.
    """

    spec: str
    bits: int
    scales: int = 0
    scale: tuple[float, float] | None = None
    zero_point: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.scale is None or self.zero_point is None:
            return self.spec
        if self.scales == 1:
            return f"{self.spec}, scale {self.scale[0]:.5g}, zero point {self.zero_point[0]}"
        low, high = self.zero_point
        points = f"zero point {low}" if low == high else f"zero points {low} to {high}"
        return f"{self.spec}, {self.scales} scales {self.scale[0]:.5g} to {self.scale[1]:.5g}, {points}"


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each of equally wide bins from ``low`` to ``high``."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class NodeView:
    """One node of one graph.

    ``line``: the node in the text format, without its facts; ``facts``: what stands in its braces. ``args``: names of
    the nodes it reads, in order and with repetitions; ``inputs`` says of each how it comes as integers (None: float),
    ``output`` how its own value does; both may be empty. ``kind``: dtype and sizes, as ``f32[*, 3, 224, 224]``.
    ``layer``: the user's module path; ``source``: ``file:line`` of the user's code. ``covers``: operators of the
    prepared graph that a node of the lowered one stands for; ``fused``: the fusion group of others. ``rule``: which
    rule of the recipe decides, in words. ``refusal``: why the target takes no such operator.

    ``constant``: a weight, or made of weights only. ``integer``: it computes on integers or holds them. ``crossing``:
    it turns data from float to integers or back. ``region``: which connected part of the graph that is in integers.

    ``sqnr_db`` (of the float value against the same with rounding), ``milliseconds`` (of the lowered graph), ``before``
    and ``after`` (values in the float graph and in the quantized one) are measured, if asked for.
    """

    name: str
    op: str
    target: str
    line: str
    facts: str
    args: tuple[str, ...]
    kind: str
    layer: str
    source: str
    constant: bool
    integer: bool
    crossing: bool
    region: int | None
    fused: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()
    inputs: tuple[Integers | None, ...] = ()
    output: Integers | None = None
    group: str = ""
    bits: int | None = None
    sensitivity: float | None = None
    reason: str = ""
    rule: str = ""
    refusal: str = ""
    kernel: str = ""
    macs: int = 0
    sqnr_db: float | None = None
    milliseconds: float | None = None
    before: Histogram | None = None
    after: Histogram | None = None

    @property
    def text(self) -> str:
        """The node's line in the text format."""
        return f"{self.line}  {{{self.facts}}}" if self.facts else self.line


@dataclass(frozen=True)
class StageView:
    """A graph as it left a stage, in graph order. ``graph``: its path where it is a part of the model, else ``""``."""

    stage: str
    graph: str
    nodes: tuple[NodeView, ...]

    @cached_property
    def by_name(self) -> Mapping[str, NodeView]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """By name: who reads a node, in graph order."""
        found: dict[str, dict[str, None]] = {}
        for source, reader in self.edges:
            found.setdefault(source, {})[reader] = None
        return {name: tuple(readers) for name, readers in found.items()}

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Who is read by whom, once each."""
        return tuple(dict.fromkeys((source, node.name) for node in self.nodes for source in node.args))

    @property
    def title(self) -> str:
        """``lowered``, or ``lowered of encoder``."""
        return self.stage + (f" of {self.graph}" if self.graph else "")


class Edit(Enum):
    """What a pass did to a node."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True)
class Change:
    """One node that a pass touched, with its text before and after; ``fields``: which of its facts differ."""

    edit: Edit
    name: str
    before: str
    after: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassView:
    """One pass over one graph. ``notes``: ``(topic, text)`` of what it tells, near misses of its rules included."""

    name: str
    graph: str
    stage: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    milliseconds: float
    changes: tuple[Change, ...]
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dump:
    """A model at some of its stages, in order, and the passes between them.

    ``passes`` is empty where they did not run just now: of a saved or a finished model. ``measured``: whether the
    optional measurements are on the nodes.
    """

    model: str
    recipe: str
    target: str
    stages: tuple[StageView, ...]
    passes: tuple[PassView, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    report: Report | None = None
    measured: bool = False

    @property
    def reached(self) -> tuple[str, ...]:
        """Names of the stages that there are."""
        return tuple(dict.fromkeys(view.stage for view in self.stages))

    def at(self, stage: str) -> tuple[StageView, ...]:
        """The graphs of a stage: one, or one for each part that was captured."""
        return tuple(view for view in self.stages if view.stage == stage)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the edges of every graph."""
        made = {"schema": SCHEMA, **plain(self)}
        for view, written in zip(self.stages, made["stages"], strict=True):
            written["edges"] = plain(view.edges)
        return {**made, "report": None if self.report is None else plain(self.report.to_dict())}


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it; numbers that are not finite become ``"inf"``, ``"-inf"`` and ``"nan"``."""
    if type(value) in (str, int, bool):  # most are
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, Report):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return None if isinstance(value, Report) else value


def shown_db(sqnr: float) -> str:
    """``38.2 dB``, or ``exact`` where there is no noise."""
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"
