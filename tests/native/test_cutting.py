"""Regions that are cut at what the generator declines: what is around that still runs in programs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import qfx
from qfx import jit
from qfx.targets.native import making, products
from qfx.targets.native.cutting import cut
from qfx.targets.native.declined import Declined
from qfx.targets.native.float_twin import FloatTwin, Times
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.running import programs_of
from qfx.targets.native.target import Native

from .nets import Net, assert_agrees, assert_near, calls_of, linears, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

ROWS = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rolled() -> nn.Module:
    """The samples change places between two layers; a third is beside them."""
    torch.manual_seed(0)
    return Net(lambda s, x: s.b(torch.roll(s.a(x).relu(), 1, 0)) + s.c(x), **linears(a=(6, 8), b=(8, 7), c=(6, 7)))


@pytest.fixture(scope="module")
def model() -> fx.GraphModule:
    with torch.no_grad():
        return native(rolled(), ROWS)


# --- what runs --------------------------------------------------------------------------------------------------------


def test_what_is_around_runs_in_programs(model: fx.GraphModule) -> None:
    region = region_of(model)
    for batch in (4, 1, 3, 0):
        x = ROWS[:batch]
        assert_near(model(x), inlined(model)(x), tolerance=0.02)
    assert len(region.programs) == 2 and region.program(ROWS) is None
    assert len(region.outcomes) == 1, "for every batch"
    (reason,) = region.declined
    assert "mixes samples" in reason and reason.endswith("it is cut there")
    assert_agrees(model, ROWS[:3])
    assert_near(model(ROWS), rolled()(ROWS), tolerance=0.1)


def test_all_programs_are_found_with_what_they_are_called_with(model: fx.GraphModule) -> None:
    ((region, given),) = calls_of(model, ROWS)
    called = programs_of(region, given)
    assert [program for _, program, _ in called] == list(region.programs)
    assert len({part for part, _, _ in called} - {region}) == 2
    for _, program, inputs in called:
        assert len(program(*(x.contiguous() for x in inputs))) >= 1
        assert len(program.profile(*(x.contiguous() for x in inputs))) == len(program.steps)


def test_the_report_tells_what_runs_where(model: fx.GraphModule) -> None:
    model(ROWS)
    report = qfx.report(model)
    kernels = {row.operator: row.kernel for row in report.rows}
    assert kernels["roll"] and "native" not in kernels["roll"]
    linear = [row.kernel for row in report.rows if row.operator == "linear"]
    assert len(linear) == 3 and all(kernel.startswith("native ") and " linear" in kernel for kernel in linear)
    (note,) = [text for topic, text in report.notes if topic == "not native"]
    assert note == f"native: {region_of(model).declined[0]}"


def test_copies_are_cut_anew(model: fx.GraphModule) -> None:
    wanted = model(ROWS)
    made = copy.deepcopy(model)
    assert not region_of(made).programs
    assert torch.equal(made(ROWS), wanted)
    mine, theirs = ({id(p) for p in region_of(m).programs} for m in (made, model))
    assert len(mine) == 2 and not mine & theirs
    assert {*made.state_dict()} == {*model.state_dict()}


def test_weights_that_are_loaded_reach_the_parts(model: fx.GraphModule) -> None:
    torch.manual_seed(1)
    other = native(copy.deepcopy(rolled()).requires_grad_(False).apply(_shuffle), ROWS)
    made = copy.deepcopy(model)
    before = made(ROWS)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(ROWS), other(ROWS)) and not torch.equal(made(ROWS), before)


def _shuffle(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)


def test_compilers_see_one_call(model: fx.GraphModule) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ROWS), model(ROWS))
    torch._dynamo.reset()


def test_sizes_that_are_not_declined_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at a product, where it sums more than it may."""
    net = Net(lambda s, x: s.out(s.a(x).transpose(1, 2) @ s.b(x)), **linears(a=(6, 4), b=(6, 3), out=(3, 2)))
    made = native(net, ROWS, dynamic_shapes={"inputs": ({0: Dim.AUTO, 1: Dim.AUTO},)})
    region = region_of(made)
    monkeypatch.setattr(products, "LONGEST", 7)
    short, long = ROWS[:2], torch.randn(3, 9, 6)
    for x in (short, long, short):
        assert_near(made(x), inlined(made)(x), tolerance=0.02)
    assert region.program(short) is not None and region.program(long) is None
    (reason,) = region.declined
    assert "int32" in reason
    assert len(programs_of(region, (short,))) == 1 and len(programs_of(region, (long,))) == 2
    assert_agrees(made, long)


def test_one_cut_after_another() -> None:
    """Each part finds its own; notes name all of them."""
    net = Net(lambda s, x: s.c(torch.roll(s.b(torch.roll(s.a(x).relu(), 1, 0)).relu(), 2, 0)),
              **linears(a=(6, 5), b=(5, 4), c=(4, 3)))  # fmt: skip
    made = native(net, ROWS)
    region = region_of(made)
    assert_near(made(ROWS), inlined(made)(ROWS), tolerance=0.02)
    assert len(region.programs) == 3
    assert [reason.partition("_int")[0] for reason in region.declined] == ["roll", "roll_1"]
    notes = [text for topic, text in qfx.report(made).notes if topic == "not native"]
    assert len(notes) == 2


def test_most_programs_counts_cut_ones(model: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    made = native(rolled(), ROWS, dynamic_shapes={"inputs": ({0: Dim.AUTO, 1: Dim.AUTO},)})
    region = region_of(made)
    made(ROWS)
    monkeypatch.setattr("qfx.targets.native.region.MOST_PROGRAMS", 1)
    assert_near(made(ROWS[:, :2]), inlined(made)(ROWS[:, :2]), tolerance=0.02)
    assert len(region.outcomes) == 1 and len(region.programs) == 2


# --- tuned ------------------------------------------------------------------------------------------------------------


def test_parts_are_tuned_and_never_slower_than_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part wins, the second loses."""
    levels: list[Any] = []
    times = iter([Times(1.0, 2.0), Times(2.0, 1.0)])
    twins: list[FloatTwin] = []

    def compare(program: Any, twin: FloatTwin, inputs: Any) -> Times:
        twins.append(twin)
        return next(times)

    def tune(gm: fx.GraphModule, inputs: Any, isa: Any, level: Any) -> dict[str, Any]:
        levels.append(level)
        return {}

    monkeypatch.setattr(making, "tune", tune)
    monkeypatch.setattr(making, "compare_times", compare)
    made = native(rolled(), ROWS, target=Native(tune="full"))
    region = region_of(made)
    assert_near(made(ROWS), inlined(made)(ROWS))
    assert levels == ["full"] * 3 and len(twins) == 2
    assert len(region.programs) == 1
    cut_, lost = region.declined
    assert "it is cut there" in cut_ and "runs in float" in lost
    (declined,) = region.outcomes
    assert isinstance(declined, Declined) and [part.tune for part in declined.parts] == ["full", "full"]
    kernels = [row.kernel for row in qfx.report(made).rows if row.operator == "linear"]
    assert sum(kernel.startswith("native") for kernel in kernels) == 2


# --- where it is cut --------------------------------------------------------------------------------------------------


def graph_of(net: nn.Module, *example: Tensor, monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    """Of the only region, for which nothing is compiled."""
    with monkeypatch.context() as patch:
        patch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))
        return region_of(native(net, *example)).graph


def named(gm: fx.GraphModule, *prefixes: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.name.startswith(prefixes) and node.op.startswith("call")]


def parts(made: fx.GraphModule) -> list[list[str]]:
    ends = ("placeholder", "output", "get_attr")
    return [[n.name for n in r.graph.graph.nodes if n.op not in ends] for r in regions_of(made).values()]


def test_every_part_is_smaller_and_the_graph_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(rolled(), ROWS, monkeypatch=monkeypatch)
    before, layers = str(graph.graph), set(graph.modules())
    made = cut(graph, named(graph, "roll"), [ROWS], None, None)
    assert made is not None and str(graph.graph) == before and set(graph.modules()) == layers
    first, second = parts(made)
    assert not {*first} & {*second} and not any(name.startswith("roll") for name in (*first, *second))
    made.graph.lint()


@pytest.mark.parametrize("prefixes", [(), ("linear",), ("relu",)], ids=["nothing", "all layers", "no such node"])
def test_not_cut_where_that_is_no_way(prefixes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(rolled(), ROWS, monkeypatch=monkeypatch)
    assert cut(graph, named(graph, *prefixes), [ROWS], None, None) is None


def test_nodes_that_are_no_calls_are_no_places_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(rolled(), ROWS, monkeypatch=monkeypatch)
    ends = [node for node in graph.graph.nodes if not node.op.startswith("call")]
    assert len(ends) > 3 and cut(graph, ends, [ROWS], None, None) is None


def test_parts_get_samples_in_the_first_dimension_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that reads turned rows, or rows of another number, would be compiled for each batch, or never run."""

    def forward(s: Net, x: Tensor) -> Tensor:
        turned = torch.roll(s.a(x).transpose(0, 1), 1, 0)  # [5, N, 6]
        return s.b(turned.transpose(0, 1)) + s.c(x)

    graph = graph_of(Net(forward, **linears(a=(6, 6), b=(6, 6), c=(6, 6))), ROWS, monkeypatch=monkeypatch)
    made = cut(graph, named(graph, "roll"), [ROWS], None, None)
    assert made is not None
    calls = [node for node in made.graph.nodes if str(node.target) in regions_of(made)]
    assert len(calls) == 2
    runner = _Shapes(made)
    for batch in (2, 3):
        runner.run(ROWS[:batch])
        assert all(shape[0] == batch and batch not in shape[1:] for shape in runner.found)


class _Shapes(fx.Interpreter):
    """What regions are called with."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[tuple[int, ...]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.found = []
        return super().run(*args, **kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, NativeRegion):
            self.found += [tuple(x.shape) for x in args]
            return module.graph(*args)
        return super().call_module(target, args, kwargs)
