"""Passes, and the pipeline that runs them in order and holds each to its contract."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import fx

from qfx.auto_recipe import AutoRecipe, as_recipe
from qfx.errors import ConfigError, PassError, QfxError, VerifyError
from qfx.foreign_pass import ForeignPass, Function
from qfx.graph_module import CapturedModule
from qfx.meta import NODE_INFO_FIELDS, NodeInfo, info, update_graph
from qfx.recipe import Recipe
from qfx.registry import Registry, instance_of
from qfx.stage import Stage, stage_of
from qfx.targets import Target, choose
from qfx.verify import verify

log = logging.getLogger(__name__)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose options are its fields; its contract is class variables.

    ``stage``: needs a graph at least at the first, and leaves it at the second. ``writes``: the NodeInfo fields that
    it may set. ``run`` rewrites in place and returns the number of rewrites it made: 0 means nothing changed.
    """

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> tuple[Stage, Stage]: ...

    @property
    def writes(self) -> frozenset[str]: ...

    def run(self, gm: fx.GraphModule) -> int: ...


PassLike = Pass | Function | str
"""What edits of a pipeline take: a pass, a function or ``PassBase`` of torch.fx, or the name of a registered one."""


def as_pass(given: PassLike | type) -> Pass:
    """The pass itself, that of a name, or a foreign one in its adapter; of a class, an instance.

    Raises:
        ConfigError: there is none of that name, or it is no pass.
    """
    if isinstance(given, str):
        return PASSES_BY_NAME.find(given)
    made = instance_of(given)
    if isinstance(made, Pass):
        return made
    if callable(made):
        return ForeignPass.of(made)
    raise ConfigError(
        f"what is to be a pass is a {type(made).__name__}",
        hint="give a pass with name, stage, writes and run, a function of a GraphModule, or a registered name",
    )


PASSES_BY_NAME: Registry[Pass] = Registry("pass", "qfx.passes", as_pass)

P = TypeVar("P", bound=type | Pass | Function)


def register_pass(plugin: P) -> P:
    """Let a pass be asked for by its name, as in ``pipeline.after("fuse-conv-bn", "my-pass")``; returns it.

    Args:
        plugin: a pass or a class of one, which is made without arguments; or a function or ``PassBase`` of torch.fx,
            whose name in kebab-case is the pass's.

    Raises:
        ConfigError: it is no pass, or its name is taken.
    """
    PASSES_BY_NAME.register(plugin)
    return plugin


ORDERS: dict[str, Callable[[Recipe | AutoRecipe, Target], tuple[Pass, ...]]] = {}
"""The default order of each mode; ``qfx.passes``, which this module does not know, puts them in."""

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

    @classmethod
    def default(
        cls, recipe: str | Recipe | AutoRecipe = "int8", target: str | Target = "auto", *, mode: str = "ptq"
    ) -> Pipeline:
        """The passes that ``qfx.quantize`` runs (``mode="qat"``: ``qfx.quantize_qat``), to be edited.

        Raises:
            ConfigError: there is no such recipe, target or mode, or they do not fit.
        """
        if mode not in ORDERS:
            raise ConfigError(f"there is no mode {mode!r}", hint="choose one of " + ", ".join(ORDERS))
        return cls(ORDERS[mode](as_recipe(recipe), choose(target)))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def before(self, name: str, new: PassLike) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], as_pass(new), *self.passes[i:]))

    def after(self, name: str, new: PassLike) -> Pipeline:
        i = self._index(name) + 1
        return Pipeline((*self.passes[:i], as_pass(new), *self.passes[i:]))

    def without(self, name: str) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], *self.passes[i + 1 :]))

    def replace(self, name: str, new: PassLike) -> Pipeline:
        i = self._index(name)
        return Pipeline((*self.passes[:i], as_pass(new), *self.passes[i + 1 :]))

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
            run_pass(p, gm, last=p is self.passes[-1])
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


def run_pass(p: Pass, gm: fx.GraphModule, *, last: bool = True) -> int:
    """Run one pass, then lint and recompile; in check mode hold it to its contract too.

    ``last``: no pass follows; where one does, the graph is recompiled only if somebody asks for its code.
    """
    if stage_of(gm) < p.stage[0]:
        raise PassError(f"pass {p.name!r} needs stage {p.stage[0].name}, the graph is at {stage_of(gm).name}")
    checking = check_mode()
    before = _snapshot(gm) if checking else None
    try:
        count = p.run(gm)
        gm.graph.lint()
        if last or not isinstance(gm, CapturedModule):
            gm.recompile()
        else:
            gm.recompile_later()
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
