"""Plug-ins by name: who owns a name, what is loaded when, and what is said of those that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import qfx
from qfx.errors import ConfigError
from qfx.foreign_pass import ForeignPass
from qfx.passes import EliminateDeadCode
from qfx.pipeline import PASSES_BY_NAME
from qfx.recipe import PRESETS, RECIPES_BY_NAME
from qfx.registry import PluginWarning, Registry
from qfx.stage import Stage
from qfx.targets import TARGETS, TARGETS_BY_NAME, Reference, choose

REGISTRIES: tuple[Registry[Any], ...] = (PASSES_BY_NAME, RECIPES_BY_NAME, TARGETS_BY_NAME)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers is gone behind it."""
    kept = [dict(registry._registered) for registry in REGISTRIES]
    yield
    for registry, registered in zip(REGISTRIES, kept, strict=True):
        registry._registered = registered


@dataclass(frozen=True)
class Idle:
    """Does nothing, ``times`` times."""

    times: int = 1
    name: ClassVar[str] = "idle"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CAPTURED, Stage.CAPTURED)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        return 0


@dataclass(frozen=True)
class Late(Idle):
    name: ClassVar[str] = "late"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CONVERTED, Stage.CONVERTED)


@dataclass(frozen=True)
class Toy(Reference):
    name: ClassVar[str] = "toy"


def names(pipeline: qfx.Pipeline) -> list[str]:
    return [p.name for p in pipeline]


# --- qfx's own --------------------------------------------------------------------------------------------------------


def test_qfx_s_own_go_through_the_registry() -> None:
    assert RECIPES_BY_NAME.names() == tuple(PRESETS)
    assert TARGETS_BY_NAME.names() == tuple(TARGETS)
    assert set(names(qfx.Pipeline.default())) <= set(PASSES_BY_NAME.names())
    assert set(names(qfx.Pipeline.default(mode="qat"))) <= set(PASSES_BY_NAME.names())
    assert set(names(qfx.Pipeline.default(qfx.AutoRecipe(latency_ms=1.0)))) <= set(PASSES_BY_NAME.names())
    assert PASSES_BY_NAME.find("eliminate-dead-code") == EliminateDeadCode()
    assert choose("reference") is TARGETS["reference"]


def test_a_pass_of_qfx_can_be_named() -> None:
    pipeline = qfx.Pipeline.default("int8", "reference")
    moved = pipeline.without("fuse-bn-conv").before("fuse-conv-bn", "fuse-bn-conv")
    assert sorted(names(moved)) == sorted(names(pipeline)) and names(moved)[2] == "fuse-bn-conv"
    with pytest.raises(ConfigError, match=r"Annotate cannot be made without arguments: .*'recipe'") as raised:
        pipeline.before("annotate", "annotate")
    assert "give an instance" in raised.value.hint


def test_modes() -> None:
    with pytest.raises(ConfigError, match="there is no mode 'training'") as raised:
        qfx.Pipeline.default(mode="training")
    assert raised.value.hint == "choose one of ptq, qat"
    with pytest.raises(ConfigError, match="training needs the bits beforehand"):
        qfx.Pipeline.default("auto", mode="qat")
    assert "allocate-bits" in names(qfx.Pipeline.default("auto"))


# --- registered by running code ---------------------------------------------------------------------------------------


def test_a_pass() -> None:
    assert qfx.register_pass(Idle) is Idle
    pipeline = qfx.Pipeline.default("int8", "reference")
    assert pipeline.after("fuse-conv-bn", "idle").passes[3] == Idle()
    assert names(pipeline.before("fuse-conv-bn", "idle"))[2] == "idle"
    assert names(pipeline.replace("fuse-conv-bn", "idle"))[2] == "idle"


def test_a_function_and_a_pass_base() -> None:
    @qfx.register_pass
    def look_around(gm: fx.GraphModule) -> None: ...

    @qfx.register_pass
    class LookAway(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return PassResult(graph_module, False)

    assert PASSES_BY_NAME.find("look-around") == ForeignPass(look_around, "look-around")
    assert names(qfx.Pipeline.default().after("convert", "look-away"))[11] == "look-away"


def test_a_recipe_and_what_a_function_gives() -> None:
    edge = replace(qfx.Recipe.int8(), name="edge")
    assert qfx.register_recipe(edge) is edge

    @qfx.register_recipe
    def of_tomorrow() -> qfx.Recipe:
        return replace(edge, name="edge-2")

    assert qfx.Recipe.preset("edge") is edge
    assert qfx.Recipe.preset("edge-2") == of_tomorrow()
    assert qfx.Pipeline.default("edge", "reference").passes[6].recipe is edge  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [Toy, Toy()])
def test_a_target(given: Any) -> None:
    assert qfx.register_target(given) is given
    assert choose("toy") == Toy()
    assert choose("auto").name in TARGETS  # which does not depend on what else there is


def test_a_class_of_a_target_serves_as_one() -> None:
    assert choose(Toy) == Toy()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Elsewhere(Reference):
    name: ClassVar[str] = "elsewhere"

    def unavailable(self, device: str = "cpu") -> str | None:
        return "this is not that machine"


def test_a_target_that_cannot_run_here() -> None:
    qfx.register_target(Elsewhere)
    with pytest.raises(ConfigError, match="target 'elsewhere' cannot run here: this is not that machine"):
        choose("elsewhere")


@pytest.mark.parametrize(
    ("register", "what", "text"),
    [
        (qfx.register_pass, 3, "what is to be a pass is a int"),
        (qfx.register_recipe, 3, "what is to be a recipe is a int"),
        (qfx.register_recipe, lambda: 3, "what is to be a recipe returns a int"),
        (qfx.register_target, 3, "target is a int"),
        (qfx.register_target, Idle, "target is a Idle"),
    ],
)
def test_what_is_of_another_kind(register: Callable[[Any], Any], what: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        register(what)


# --- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_gives_the_nearest() -> None:
    qfx.register_pass(Idle)
    for call, text in (
        (lambda: qfx.Pipeline.default().after("convert", "idel"), "there is no pass 'idel'; did you mean 'idle'?"),
        (lambda: choose("refrence"), "there is no target 'refrence'; did you mean 'reference'?"),
        (lambda: qfx.Recipe.preset("int_8"), "there is no recipe 'int_8'; did you mean 'int8'?"),
    ):
        with pytest.raises(ConfigError) as raised:
            call()
        assert raised.value.what == text and raised.value.hint.startswith("choose one of ")
    with pytest.raises(ConfigError, match="there is no recipe 'auto'"):
        qfx.Recipe.preset("auto")


def test_a_name_taken_twice_names_both_owners() -> None:
    qfx.register_pass(Idle)

    @dataclass(frozen=True)
    class Other(Idle):
        pass

    here = __name__
    with pytest.raises(ConfigError) as raised:
        qfx.register_pass(Other)
    assert raised.value.what == (
        f"the pass name 'idle' is taken twice: by {here}.Idle, "
        f"and by {here}.test_a_name_taken_twice_names_both_owners.<locals>.Other"
    )
    assert PASSES_BY_NAME.find("idle") == Idle()

    edge = replace(qfx.Recipe.int8(), name="edge")
    qfx.register_recipe(edge)
    with pytest.raises(ConfigError, match=r"test_registry.py:\d+, and by .*test_registry.py:\d+"):
        qfx.register_recipe(edge.skip("head"))


@pytest.mark.parametrize(
    ("register", "what"),
    [
        (qfx.register_pass, ForeignPass(lambda gm: None, "convert")),
        (qfx.register_recipe, qfx.Recipe.int8().skip("head")),
        (qfx.register_recipe, replace(qfx.Recipe.int8(), name="auto")),
        (qfx.register_target, Reference()),
    ],
)
def test_a_name_of_qfx_is_taken(register: Callable[[Any], Any], what: Any) -> None:
    with pytest.raises(ConfigError, match="is taken twice: by qfx, and by"):
        register(what)


def test_the_same_may_be_registered_again() -> None:
    """As when a module is reloaded, or a cell of a notebook run again: the newer one counts."""

    def make(answer: int) -> type:
        @qfx.register_pass
        @dataclass(frozen=True)
        class Again(Idle):
            name: ClassVar[str] = "again"
            times: int = answer

        return Again

    make(1), make(2)
    assert PASSES_BY_NAME.find("again").times == 2  # type: ignore[attr-defined]
    for _ in range(2):
        qfx.register_recipe(replace(qfx.Recipe.int8(), name="edge"))


def test_a_named_pass_put_where_its_stage_does_not_fit() -> None:
    qfx.register_pass(Late)
    with pytest.raises(ConfigError, match="pass 'late' needs a graph at stage CONVERTED"):
        qfx.Pipeline.default().before("annotate", "late")


# --- packages ---------------------------------------------------------------------------------------------------------

PLUGIN = """
from dataclasses import dataclass, replace
from typing import ClassVar
import qfx
from qfx.targets.reference import Reference

print("imported", __name__)
edge = replace(qfx.Recipe.int8(), name="edge")
also_edge = edge
misnamed = replace(edge, name="other")
no_recipe = 3

def look(gm):
    pass

def fails():
    raise OSError("no disk")

@qfx.register_target
class Toy(Reference):
    name: ClassVar[str] = "toy"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a package ``name`` with that code and entry points ``{group: {name: value}}``, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, code: str, **groups: dict[str, str]) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        tables = (f"[qfx.{kind}]\n" + "".join(f"{k} = {v}\n" for k, v in t.items()) for kind, t in groups.items())
        (info / "entry_points.txt").write_text("\n".join(tables))
        sys.modules.pop(name, None)

    return put


def test_entry_points(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "plug_a", PLUGIN, recipes={"edge": "plug_a:edge"}, targets={"toy": "plug_a:Toy"}, passes={"look": "plug_a:look"}
    )
    assert "edge" in RECIPES_BY_NAME.names() and "toy" in TARGETS_BY_NAME.names() and "look" in PASSES_BY_NAME.names()
    assert qfx.Recipe.preset("int8") and choose("reference") and not capsys.readouterr().out  # nothing is imported yet
    assert qfx.Recipe.preset("edge").name == "edge"
    assert capsys.readouterr().out == "imported plug_a\n"
    assert choose("toy").name == "toy"  # registered by the module too: it is one thing
    assert names(qfx.Pipeline.default().after("convert", "look"))[11] == "look"
    with pytest.raises(ConfigError, match=r"did you mean 'edge'\?"):
        qfx.Recipe.preset("edg")


BROKEN: dict[str, tuple[str, str]] = {
    "no such module": ("nowhere_at_all:edge", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "no such name": ("plug_b:nothing", "AttributeError: module 'plug_b' has no attribute 'nothing'"),
    "an error when it is made": ("plug_b:fails", "OSError: no disk"),
    "another kind of thing": ("plug_b:no_recipe", "what is to be a recipe is a int"),
    "an error when it is imported": ("plug_bad:edge", "ZeroDivisionError: division by zero"),
    "not even Python": ("plug_worse:edge", "SyntaxError: "),
    "not even an entry point": ("plug b edge", "cannot be used"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one_harms_nobody_else(install: Callable[..., None], case: str) -> None:
    value, text = BROKEN[case]
    install("plug_bad", "1 / 0")
    install("plug_worse", "def def")
    install("plug_b", PLUGIN, recipes={"mine": value, "edge": "plug_b:edge"})
    assert {"mine", "edge", "int8"} <= set(RECIPES_BY_NAME.names())
    assert qfx.Recipe.preset("int8") and qfx.Recipe.preset("edge")
    with pytest.raises(ConfigError) as raised:
        qfx.Recipe.preset("mine")
    owner = f"plug_b 1.2 (entry point qfx.recipes: mine = {value})"
    assert raised.value.what.startswith(f"the recipe 'mine' of {owner} cannot be used: ") and text in raised.value.what
    assert "uninstall" in raised.value.hint
    with pytest.raises(ConfigError, match="did you mean 'mine'"):  # and others hear only that it is there
        qfx.Recipe.preset("mime")


def test_a_package_that_offers_a_name_which_another_has(install: Callable[..., None]) -> None:
    install("plug_c", PLUGIN, recipes={"edge": "plug_c:edge"})
    other = "import qfx; edge = qfx.Recipe('edge', qfx.Recipe.w8a16().default)"
    install("plug_d", other, recipes={"edge": "plug_d:edge"})
    with pytest.raises(ConfigError, match="'edge' is taken twice") as raised:
        qfx.Recipe.preset("edge")
    assert "plug_c 1.2" in raised.value.what and "plug_d 1.2" in raised.value.what
    assert qfx.Recipe.preset("int8")


def test_a_package_and_running_code(install: Callable[..., None]) -> None:
    install("plug_e", PLUGIN, recipes={"edge": "plug_e:edge"})
    qfx.register_recipe(replace(qfx.Recipe.w8a16(), name="edge"))
    with pytest.raises(ConfigError, match=r"'edge' is taken twice: by .*test_registry.py:\d+, and by plug_e 1.2"):
        qfx.Recipe.preset("edge")


def test_a_package_cannot_take_a_name_of_qfx(install: Callable[..., None]) -> None:
    install("plug_f", PLUGIN, recipes={"int8": "plug_f:edge", "auto": "plug_f:edge"})
    assert qfx.Recipe.preset("int8") is PRESETS["int8"]
    with pytest.warns(PluginWarning, match="the recipe 'int8' is qfx's own; that of plug_f 1.2 .* is never used"):
        assert RECIPES_BY_NAME.names().count("int8") == 1
    assert isinstance(qfx.Pipeline.default("auto"), qfx.Pipeline)


def test_one_thing_has_one_name(install: Callable[..., None]) -> None:
    install("plug_g", PLUGIN, recipes={"mine": "plug_g:misnamed"})
    with pytest.raises(ConfigError, match="the recipe 'mine' calls itself 'other'") as raised:
        qfx.Recipe.preset("mine")
    assert "plug_g 1.2" in raised.value.hint


def test_importing_qfx_looks_at_no_package(install: Callable[..., None], tmp_path: Path) -> None:
    install("plug_h", PLUGIN, recipes={"edge": "plug_h:edge"})
    program = """
        import importlib.metadata
        look = importlib.metadata.entry_points
        def refuse(**asked):
            if asked["group"].startswith("qfx"):
                raise SystemExit("the packages were looked at")
            return look(**asked)
        importlib.metadata.entry_points = refuse
        import sys, qfx
        pipeline = qfx.Pipeline.default("int8", "reference")
        pipeline.without("cancel-pairs").after("fold-weights", "cancel-pairs")
        assert "plug_h" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
