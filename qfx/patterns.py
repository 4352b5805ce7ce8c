"""Rewrite rules as data: a pattern to find, a check that may decline with a reason, and a rewrite.

Rules are tried one after the other, each on the whole graph, so that an earlier rule wins over a later one. What a
check declines is kept as a :class:`NoMatch`, so that a near miss can be told to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from qfx.meta import add_notes
from qfx.operators import name_of

Match = dict[str, fx.Node]


@dataclass(frozen=True)
class NoMatch:
    """Why a rule did not apply, and at which node."""

    reason: str
    node: fx.Node | None = None

    def __str__(self) -> str:
        return f"{self.node.name}: {self.reason}" if self.node else self.reason


@dataclass(frozen=True)
class Pattern:
    """A call of one of the ATen ops ``ops`` whose arguments at the given positions match patterns themselves.

    The node is bound to ``name`` in the match.
    """

    name: str
    ops: frozenset[str]
    inputs: tuple[tuple[int, Pattern], ...] = ()

    def match(self, node: object) -> Match | None:
        if not isinstance(node, fx.Node) or name_of(node) not in self.ops:
            return None
        found: Match = {self.name: node}
        for position, pattern in self.inputs:
            inner = pattern.match(node.args[position]) if position < len(node.args) else None
            if inner is None:
                return None
            found |= inner
        return found


def op(name: str, ops: str | Iterable[str], **inputs: Pattern) -> Pattern:
    """``op("bn", "batch_norm", _0=op("conv", "conv1d conv2d"))``: ``_0`` is argument 0."""
    names = frozenset(ops.split()) if isinstance(ops, str) else frozenset(ops)
    return Pattern(name, names, tuple((int(key[1:]), pattern) for key, pattern in inputs.items()))


@dataclass(frozen=True)
class Rule:
    """One row of a pass's table. ``check`` returns None where the rewrite is right, else why it is not."""

    name: str
    pattern: Pattern
    check: Callable[[Match], NoMatch | None]
    rewrite: Callable[[fx.GraphModule, Match], None]


@dataclass
class Report:
    """What a table of rules did to a graph: rewrites made, and near misses as ``(rule, NoMatch)``."""

    rewrites: int = 0
    misses: list[tuple[str, NoMatch]] = field(default_factory=list)


def apply(rules: Iterable[Rule], gm: fx.GraphModule, *, notes: str) -> Report:
    """Apply every rule in order to all nodes of ``gm``, in place.

    Misses that name a node become notes of the graph under the topic ``notes``; one without a node is no near miss.
    """
    report = Report()
    for rule in rules:
        for node in list(gm.graph.nodes):
            if node._erased or (match := rule.pattern.match(node)) is None:
                continue
            miss = rule.check(match)
            if miss is None:
                rule.rewrite(gm, match)
                report.rewrites += 1
            else:
                report.misses.append((rule.name, miss))
    add_notes(gm, notes, [f"{name}: {miss}" for name, miss in report.misses if miss.node])
    return report


def second_user(node: fx.Node, expected: fx.Node) -> NoMatch | None:
    """A NoMatch where anyone but ``expected`` reads ``node``."""
    others = [user for user in node.users if user is not expected]
    if not others:
        return None
    what = "the model's output" if others[0].op == "output" else f"{others[0].name}"
    return NoMatch(f"it has a second user, {what}", node)
