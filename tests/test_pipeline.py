"""Order, editing, hooks, and the contract that passes are held to."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from qfx.capture import capture
from qfx.errors import ConfigError, PassError, VerifyError
from qfx.graph_module import CapturedModule
from qfx.meta import graph_info, update, update_graph
from qfx.pipeline import Pass, Pipeline, run_pass
from qfx.recipe import Recipe
from qfx.stage import Stage, stage_of
from qfx.targets import Reference

aten = torch.ops.aten

Action = Callable[[fx.GraphModule], int]


def nothing(gm: fx.GraphModule) -> int:
    return 0


def make(
    name: str,
    needs: Stage = Stage.CAPTURED,
    leaves: Stage | None = None,
    action: Action = nothing,
    writes: frozenset[str] = frozenset(),
) -> Pass:
    """A pass of that contract whose ``run`` is ``action``."""
    title, span, fields = name, (needs, needs if leaves is None else leaves), writes

    @dataclass(frozen=True)
    class Made:
        name: ClassVar[str] = title
        stage: ClassVar[tuple[Stage, Stage]] = span
        writes: ClassVar[frozenset[str]] = fields

        def run(self, gm: fx.GraphModule) -> int:
            return action(gm)

    return Made()


def graph() -> fx.GraphModule:
    g = fx.Graph()
    relu = g.create_node("call_function", torch.ops.aten.relu.default, (g.placeholder("x"),), name="relu")
    g.output((relu,))
    return fx.GraphModule(torch.nn.Module(), g)


def names(pipeline: Pipeline) -> list[str]:
    return [p.name for p in pipeline]


@pytest.fixture(autouse=True)
def _checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_CHECK", "1")


# --- order and editing ------------------------------------------------------------------------------------------------


def test_the_default_order() -> None:
    pipeline = Pipeline.default(Recipe.int8(), Reference())
    assert names(pipeline) == [
        "functionalize",
        "canonicalize",
        "fuse-conv-bn",
        "fuse-linear-bn",
        "fuse-bn-conv",
        "fuse-epilogues",
        "annotate",
        "store-embeddings",
        "share-scales",
        "insert-observers",
        "convert",
        "fold-weights",
        "cancel-pairs",
        "lower",
        "reuse-memory",
        "eliminate-dead-code",
    ]
    before, behind = pipeline.split()
    assert names(before)[-1] == "insert-observers" and names(behind)[0] == "convert"
    assert len(before) + len(behind) == len(pipeline)


def test_editing_returns_a_new_pipeline() -> None:
    base, new = Pipeline((make("a"), make("b"))), make("new")
    assert names(base.before("b", new)) == ["a", "new", "b"]
    assert names(base.after("b", new)) == ["a", "b", "new"]
    assert names(base.replace("a", new)) == ["new", "b"]
    assert names(base.without("a")) == ["b"]
    assert names(base) == ["a", "b"]


def test_an_unknown_name_lists_those_there_are() -> None:
    base = Pipeline((make("a"), make("b")))
    for edit in (lambda: base.without("c"), lambda: base.before("c", make("d")), lambda: base.replace("c", make("d"))):
        with pytest.raises(ConfigError, match="no pass 'c'") as raised:
            edit()
        assert raised.value.hint == "its passes are a, b"


def test_names_are_unique() -> None:
    with pytest.raises(ConfigError, match=r"\['a'\] appear twice"):
        Pipeline((make("a"), make("b"), make("a")))


def test_a_pass_too_early_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="'late' needs a graph at stage FUSED, but the passes before it leave CANON"):
        Pipeline((make("early", Stage.CAPTURED, Stage.CANONICAL), make("late", Stage.FUSED)))
    full = Pipeline.default(Recipe.int8(), Reference())
    with pytest.raises(ConfigError, match="'convert' needs a graph at stage CALIBRATED"):
        full.without("insert-observers")


def test_calibration_is_counted_on_behind_prepared() -> None:
    Pipeline((make("p", Stage.ANNOTATED, Stage.PREPARED), make("c", Stage.CALIBRATED, Stage.CONVERTED)))


def test_a_pass_for_any_stage_may_stand_anywhere() -> None:
    full = Pipeline.default(Recipe.int8(), Reference())
    assert names(full.after("fuse-conv-bn", make("mine")))[3] == "mine"
    assert names(full.after("cancel-pairs", make("mine")))[13] == "mine"


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"writes unknown NodeInfo fields \['colour'\]"):
        Pipeline((make("a", writes=frozenset({"colour"})),))


# --- running ----------------------------------------------------------------------------------------------------------


def test_the_stage_rises_and_never_falls() -> None:
    gm = graph()
    Pipeline((make("a", Stage.CAPTURED, Stage.FUSED), make("b", Stage.CAPTURED))).run(gm)
    assert stage_of(gm) is Stage.FUSED and graph_info(gm).stage == "FUSED"


def test_a_graph_below_the_needed_stage_is_refused() -> None:
    with pytest.raises(PassError, match="pass 'late' needs stage FUSED, the graph is at CAPTURED"):
        run_pass(make("late", Stage.FUSED), graph())


def test_the_hook_sees_every_step() -> None:
    seen: list[tuple[str | None, str | None]] = []
    Pipeline((make("a"), make("b"))).run(
        graph(), hook=lambda before, gm, after: seen.append((before and before.name, after and after.name))
    )
    assert seen == [(None, "a"), ("a", "b"), ("b", None)]


def test_a_failing_pass_names_itself_and_its_cause() -> None:
    def fail(gm: fx.GraphModule) -> int:
        raise ValueError("no such thing")

    with pytest.raises(PassError, match="pass 'broken' failed: ValueError: no such thing") as raised:
        run_pass(make("broken", action=fail), graph())
    assert isinstance(raised.value.__cause__, ValueError)


def test_an_error_of_qfx_goes_through() -> None:
    def refuse(gm: fx.GraphModule) -> int:
        raise ConfigError("not like this", where="layer1")

    with pytest.raises(ConfigError, match=r"^not like this"):
        run_pass(make("strict", action=refuse), graph())


def test_a_graph_that_does_not_lint_names_the_pass() -> None:
    def turn_around(gm: fx.GraphModule) -> int:
        placeholder, relu, _ = gm.graph.nodes
        relu.append(placeholder)
        return 1

    with pytest.raises(PassError, match="pass 'messy' failed"):
        run_pass(make("messy", action=turn_around), graph())


# --- the contract -----------------------------------------------------------------------------------------------------


def rename(gm: fx.GraphModule) -> int:
    list(gm.graph.nodes)[1].target = torch.ops.aten.sin.default
    return 0


def write_reason(gm: fx.GraphModule) -> int:
    update(list(gm.graph.nodes)[1], reason="because")
    return 1


def leave_method(gm: fx.GraphModule) -> int:
    relu = list(gm.graph.nodes)[1]
    relu.op, relu.target = "call_method", "relu"
    return 1


def test_a_pass_that_returns_0_and_changes_something_lies() -> None:
    with pytest.raises(PassError, match="pass 'liar' returned 0 but changed the graph"):
        run_pass(make("liar", action=rename), graph())


def test_a_pass_writes_only_what_it_declares() -> None:
    with pytest.raises(PassError, match=r"pass 'sneaky' wrote \['reason'\] of 'relu', which it does not declare"):
        run_pass(make("sneaky", action=write_reason), graph())
    run_pass(make("honest", action=write_reason, writes=frozenset({"reason"})), graph())


def test_a_pass_that_breaks_its_stage_is_named() -> None:
    with pytest.raises(VerifyError, match="pass 'breaker' broke the graph: stage CAPTURED, plain calls"):
        run_pass(make("breaker", action=leave_method), graph())


def test_without_check_mode_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_CHECK", "0")
    for action in (rename, write_reason, leave_method):
        run_pass(make("quick", action=action), graph())


def test_a_stage_can_be_set_by_hand() -> None:
    gm = graph()
    update_graph(gm, stage="CONVERTED")
    assert stage_of(gm) is Stage.CONVERTED


# --- code that is made when it is asked for ---------------------------------------------------------------------------


def turn(gm: fx.GraphModule) -> int:
    """From relu to sin, and from sin to cos."""
    (n,) = (n for n in gm.graph.nodes if n.op == "call_function")
    n.target = aten.sin.default if n.target is aten.relu.default else aten.cos.default
    return 1


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def test_code_between_passes_is_made_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, made = capture(nn.ReLU(), X), list[str]()
    recompile = CapturedModule.recompile

    def counted(self: CapturedModule) -> PythonCode:
        made.append("")
        return recompile(self)

    monkeypatch.setattr(CapturedModule, "recompile", counted)
    Pipeline((make("one", action=turn), make("two", action=nothing), make("three", action=turn))).run(gm)
    assert len(made) == 1 and torch.equal(gm(X), X.cos())


LOOKS: dict[str, Callable[[fx.GraphModule], bool]] = {
    "a call": lambda gm: torch.equal(gm(X), X.sin()),
    "forward": lambda gm: torch.equal(gm.forward(X), X.sin()),
    "the class": lambda gm: torch.equal(type(gm).forward(gm, X), X.sin()),
    "the signature": lambda gm: list(inspect.signature(gm.forward).parameters) == ["input"] and "sin" in gm.code,
    "code": lambda gm: "aten.sin" in gm.code and "aten.relu" not in gm.code,
    "text": lambda gm: "aten.sin" in str(gm),
    "a copy": lambda gm: torch.equal(copy.deepcopy(gm)(X), X.sin()),
    "a shallow copy": lambda gm: torch.equal(copy.copy(gm)(X), X.sin()),
    "a file": lambda gm: torch.equal(pickle.loads(pickle.dumps(gm))(X), X.sin()),
    "a trace": lambda gm: "sin" in str(torch.export.export(gm, (X,)).graph),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_between_passes_sees_the_graph_as_it_is(look: str) -> None:
    seen: list[bool] = []

    def check(gm: fx.GraphModule) -> int:
        seen.append(LOOKS[look](gm))
        return 0

    gm = capture(nn.ReLU(), X)
    Pipeline((make("one", action=turn), make("check", action=check), make("two", action=turn))).run(gm)
    assert seen == [True] and torch.equal(gm(X), X.cos())


def test_a_graph_that_a_pass_left_broken_still_runs() -> None:
    def fail(gm: fx.GraphModule) -> int:
        raise ValueError("no")

    gm = capture(nn.ReLU(), X)
    with pytest.raises(PassError):
        Pipeline((make("one", action=turn), make("two", action=fail))).run(gm)
    assert torch.equal(gm(X), X.sin())
