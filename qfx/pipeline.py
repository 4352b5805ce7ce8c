"""Passes, and the pipeline that runs them in order and holds each to its contract."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import fx

from qfx.errors import ConfigError, PassError, QfxError, VerifyError
from qfx.meta import NODE_INFO_FIELDS, NodeInfo, info, update_graph
from qfx.stage import Stage, stage_of
from qfx.verify import verify

log = logging.getLogger(__name__)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose options are its fields; its contract is class variables.

    ``stage``: needs a graph at least at the first, and leaves it at the second. ``writes``: the NodeInfo fields that
    it may set. ``run`` rewrites in place and returns the number of rewrites it made: 0 means nothing changed.
    """

    name: ClassVar[str]
    stage: ClassVar[tuple[Stage, Stage]]
    writes: ClassVar[frozenset[str]]

    def run(self, gm: fx.GraphModule) -> int: ...


Hook = Callable[[Pass | None, fx.GraphModule, Pass | None], None]
"""Called before the first pass, between passes and after the last with ``(previous, gm, next)``."""


def check_mode() -> bool:
    """True where ``QFX_CHECK=1`` asks for every contract to be verified after every pass."""
    return os.environ.get("QFX_CHECK", "") not in ("", "0")


@dataclass(frozen=True)
class Pipeline:
    """A tuple of passes whose order is checked at construction; editing methods return a new pipeline."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        names = [p.name for p in self.passes]
        if double := {n for n in names if names.count(n) > 1}:
            raise ConfigError(f"pass names must be unique, {sorted(double)} appear twice")
        stage: Stage | None = None
        for p in self.passes:
            unknown = p.writes - NODE_INFO_FIELDS
            if unknown:
                raise ConfigError(f"pass {p.name!r} writes unknown NodeInfo fields {sorted(unknown)}")
            needs, leaves = p.stage
            if stage is not None and _calibrated(stage) < needs:
                raise ConfigError(
                    f"pass {p.name!r} needs a graph at stage {needs.name}, but the passes before it leave {stage.name}",
                    hint="move it behind the pass that reaches that stage: " + " → ".join(names),
                )
            stage = leaves if stage is None else max(stage, leaves)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def before(self, name: str, new: Pass) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], new, *self.passes[i:]))

    def after(self, name: str, new: Pass) -> Pipeline:
        i = self._index(name) + 1
        return Pipeline((*self.passes[:i], new, *self.passes[i:]))

    def without(self, name: str) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], *self.passes[i + 1 :]))

    def replace(self, name: str, new: Pass) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], new, *self.passes[i + 1 :]))

    def split(self, stage: Stage = Stage.PREPARED) -> tuple[Pipeline, Pipeline]:
        """The passes that leave a graph at ``stage`` at most, and those behind.

        By default: before and behind calibration (or training), which is no pass: it needs data.
        """
        beyond = (i for i, p in enumerate(self.passes) if max(p.stage) > stage)
        i = next(beyond, len(self.passes))
        return Pipeline(self.passes[:i]), Pipeline(self.passes[i:])

    def run(self, gm: fx.GraphModule, *, hook: Hook | None = None) -> fx.GraphModule:
        """Run all passes on ``gm`` in place; returns it.

        Raises:
            PassError: a pass failed, or broke its contract (check mode). A pass's own ``QfxError`` goes through.
        """
        previous: Pass | None = None
        for p in self.passes:
            if hook:
                hook(previous, gm, p)
            run_pass(p, gm)
            previous = p
        if hook:
            hook(previous, gm, None)
        return gm

    def _index(self, name: str) -> int:
        names = [p.name for p in self.passes]
        if name not in names:
            raise ConfigError(f"the pipeline has no pass {name!r}", hint="its passes are " + ", ".join(names))
        return names.index(name)


def _calibrated(stage: Stage) -> Stage:
    """What a pass may count on where the one before it left ``stage``: calibration follows PREPARED."""
    return Stage.CALIBRATED if stage is Stage.PREPARED else stage


def run_pass(p: Pass, gm: fx.GraphModule) -> int:
    """Run one pass, then lint and recompile; in check mode hold it to its contract too."""
    if stage_of(gm) < p.stage[0]:
        raise PassError(f"pass {p.name!r} needs stage {p.stage[0].name}, the graph is at {stage_of(gm).name}")
    checking = check_mode()
    before = _snapshot(gm) if checking else None
    try:
        count = p.run(gm)
        gm.graph.lint()
        gm.recompile()
    except QfxError:
        raise
    except Exception as error:
        raise PassError(f"pass {p.name!r} failed: {type(error).__name__}: {error}") from error
    if p.stage[1] > stage_of(gm):
        update_graph(gm, stage=p.stage[1].name)
    log.debug("%s: %d rewrites", p.name, count)
    if before is not None:
        _check_contract(p, gm, count, before)
    return count


def _snapshot(gm: fx.GraphModule) -> tuple[str, dict[fx.Node, NodeInfo]]:
    return str(gm.graph), {n: info(n) for n in gm.graph.nodes}


def _check_contract(p: Pass, gm: fx.GraphModule, count: int, before: tuple[str, dict[fx.Node, NodeInfo]]) -> None:
    text, infos = before
    if count == 0 and str(gm.graph) != text:
        raise PassError(f"pass {p.name!r} returned 0 but changed the graph", hint="return the number of rewrites")
    for node in gm.graph.nodes:
        old, new = infos.get(node, NodeInfo()), info(node)
        changed = {f.name for f in dataclasses.fields(NodeInfo) if getattr(old, f.name) != getattr(new, f.name)}
        if node in infos and (undeclared := changed - p.writes):
            raise PassError(f"pass {p.name!r} wrote {sorted(undeclared)} of {node.name!r}, which it does not declare")
    try:
        verify(gm, stage_of(gm))
    except VerifyError as error:
        raise VerifyError(f"pass {p.name!r} broke the graph: {error.what}", where=error.where) from error
