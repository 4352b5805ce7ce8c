"""Regions as modules: copies, files, compilers, threads, forks, and what happens when a program cannot be made."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import qfx
from qfx import jit
from qfx.errors import NativeError
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.region import MOST_PROGRAMS, NativeRegion

from .nets import Net, assert_near, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


def net() -> nn.Module:
    """Two regions, of which the second reads the first one's result by way of what is not native."""
    return Net(
        lambda s, x: s.b(s.a(x).cumsum(1)),
        a=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)),
        b=nn.Linear(6, 4),
    )


def rows_as_images() -> nn.Module:
    """One layer, which the generator declines: each sample has several images."""
    return Net(lambda s, x: s.a(x.flatten(0, 1)), a=nn.Conv2d(3, 2, 3))


@pytest.fixture(scope="module")
def model() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return native(net(), torch.randn(4, 5, 6))


@pytest.fixture(scope="module")
def free() -> torch.fx.GraphModule:
    """The second dimension may be any; one region."""
    torch.manual_seed(0)
    simple = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return native(simple, torch.randn(4, 5, 6), dynamic_shapes={"input": {0: Dim.AUTO, 1: Dim.AUTO}})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 6)


@contextmanager
def compiles() -> Iterator[list[str]]:
    """Texts of the units that are loaded meanwhile."""
    from qfx.targets.native import making as module

    found: list[str] = []
    real = module.build

    def build(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        found.append(made.text)
        return made

    module.build = build  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        module.build = real  # type: ignore[attr-defined]


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_serves_every_batch_and_another_size_makes_another(free: torch.fx.GraphModule) -> None:
    region = region_of(free)
    region._forget()
    with compiles() as found:
        for batch in (1, 7, 0, 2):
            assert free(torch.randn(batch, 5, 6)).shape == (batch, 5, 3)
        assert len(found) == 1
        assert free(torch.randn(2, 4, 6)).shape == (2, 4, 3)
        assert len(found) == 2
        free(torch.randn(2, 5, 6))
        assert len(found) == 2


def test_most_programs(free: torch.fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that number, sizes run as the graph does; those that have a program keep it."""
    assert MOST_PROGRAMS >= 2
    region = region_of(free)
    region._forget()
    monkeypatch.setattr("qfx.targets.native.region.MOST_PROGRAMS", 1)
    one, other = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    first = free(one)
    with compiles() as found:
        assert_near(free(other), region.graph(other))
        assert region.program(other) is None and region.program(one) is not None
        assert torch.equal(free(one), first) and not found
    region._forget()


def test_what_is_declined_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    """The region runs as the graph does, and says why once."""
    made = native(rows_as_images(), x := torch.randn(4, 5, 3, 6, 6))
    region = region_of(made)
    with caplog.at_level(logging.INFO, logger="qfx"):
        first, second = made(x), made(x)
    assert torch.equal(first, second) and torch.equal(first, inlined(made)(x))
    (reason,) = region.declined
    assert "rows of all samples" in reason and "cut" not in reason
    assert sum("runs as the lowered graph does" in r.getMessage() for r in caplog.records) <= 1


def test_the_report_tells_what_runs(model: torch.fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    """Of programs the kernels; of a model that was only loaded, what runs in their place until it is called."""

    def kernels(gm: torch.fx.GraphModule) -> list[str]:
        return [row.kernel for row in qfx.report(gm).rows if row.operator == "linear"]

    assert len(kernels(model)) == 3 and all(" linear" in k and k.startswith("native ") for k in kernels(model))
    qfx.save(model, tmp_path / "model.qfx")
    loaded = qfx.load(tmp_path / "model.qfx", target="native")
    assert isinstance(loaded, torch.fx.GraphModule)
    assert not any("native" in kernel for kernel in kernels(loaded))
    loaded(x)
    assert kernels(loaded) == kernels(model)


def test_the_report_of_what_is_declined(x: Tensor) -> None:
    made = native(rows_as_images(), x := torch.randn(4, 5, 3, 6, 6))
    report = qfx.report(made)
    assert "native" not in next(row.kernel for row in report.rows if row.operator == "conv2d")
    made(x), made(x)
    (note,) = [text for topic, text in qfx.report(made).notes if topic == "not native"]
    assert note.startswith("native: ") and "rows of all samples" in note
    assert qfx.report(made).notes == report.notes


def test_inputs_of_different_batches() -> None:
    """One value for all samples, which no program takes: it must not be read as if there were as many."""
    net = Net(lambda s, x: s.b(x.cumsum(0)[:1]) + s.a(x), a=nn.Linear(6, 8), b=nn.Linear(6, 8))
    made = native(net, torch.randn(4, 5, 6))
    for batch in (1, 2, 5, 4, 1):
        y = torch.randn(batch, 5, 6)
        assert_near(made(y), inlined(made)(y))
    assert region_of(made).declined == ("inputs have different numbers of samples",)


def test_what_is_computed_of_parameters_alone() -> None:
    """Every program holds it, in place of the layers that give it; it stands for any number of samples."""
    net = Net(
        lambda s, x: s.b(s.e(torch.arange(x.shape[1]))[None]) + s.a(x),
        a=nn.Linear(6, 8),
        b=nn.Linear(6, 8),
        e=nn.Embedding(9, 6),
    )
    made = native(net, torch.randn(4, 5, 6))
    for batch in (1, 3):
        y = torch.randn(batch, 5, 6)
        assert_near(made(y), inlined(made)(y))
    assert not region_of(made).declined
    (program,) = region_of(made).programs
    assert sum("linear" in step.kernel for step in program.steps) == 1


def test_scalars_and_other_types_run_as_the_graph_does() -> None:
    made = native(Net(lambda s, x, y: s.a(x) * y.cumsum(0).sum(), a=nn.Linear(6, 3)), torch.randn(4, 6), torch.randn(4))
    x, y = torch.randn(3, 6), torch.randn(3)
    assert_near(made(x, y), inlined(made)(x, y))


def test_inference_mode_and_no_grad(model: torch.fx.GraphModule, x: Tensor) -> None:
    wanted = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
        assert torch.equal(model(x.clone()), wanted)
    assert torch.equal(model(x), wanted)


# --- as a module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies(model: torch.fx.GraphModule, x: Tensor, way: str, tmp_path: Path) -> None:
    wanted = model(x)
    if way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        made = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        made = copy.deepcopy(model) if way == "deepcopy" else copy.copy(model)
    assert torch.equal(made(x), wanted)
    if way != "copy":
        regions = regions_of(made)
        assert len(regions) == 2 and not {*regions.values()} & {*regions_of(model).values()}


def test_state_dict(model: torch.fx.GraphModule, x: Tensor) -> None:
    """Weights that are loaded are packed anew."""
    torch.manual_seed(1)
    other = native(net(), torch.randn(4, 5, 6))
    mine, theirs = model(x), other(x)
    assert not torch.equal(mine, theirs)
    made = copy.deepcopy(model)
    made(x)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), theirs)
    assert {*made.state_dict()} == {*model.state_dict()}
    assert torch.equal(model(x), mine)


def test_moves_and_modes(model: torch.fx.GraphModule, x: Tensor) -> None:
    wanted = model(x)
    made = copy.deepcopy(model)
    for same in (made.eval(), made.to("cpu"), made.train(False)):
        assert torch.equal(same(x), wanted)
    assert all(not r.programs for r in regions_of(copy.deepcopy(model)).values())


def test_saved_and_loaded(model: torch.fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    qfx.save(model, tmp_path / "model.qfx")
    again = qfx.load(tmp_path / "model.qfx", target="native")
    assert len(regions_of(again)) == 2  # type: ignore[arg-type]
    assert torch.equal(again(x), model(x))
    plain = qfx.load(tmp_path / "model.qfx", target="x86")
    assert_near(plain(x), model(x))


def test_compiled(model: torch.fx.GraphModule, x: Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(x), model(x))
    torch._dynamo.reset()


def test_exported(model: torch.fx.GraphModule, x: Tensor) -> None:
    exported = torch.export.export(model, (x,), dynamic_shapes=(({0: Dim.DYNAMIC},),))
    y = torch.randn(7, 5, 6)
    assert_near(exported.module()(y), model(y))


def test_fake_tensors(model: torch.fx.GraphModule, x: Tensor) -> None:
    region = next(iter(regions_of(model).values()))
    region._forget()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (3, 5, 4)
    assert not region.programs
    assert torch.equal(model(x), model(x)) and region.programs


# --- threads and processes --------------------------------------------------------------------------------------------


def test_calls_from_many_threads(model: torch.fx.GraphModule) -> None:
    """Also the first call, which compiles."""
    for region in regions_of(model).values():
        region._forget()
    inputs = [torch.randn(n + 1, 5, 6) for n in range(8)]
    found: dict[int, list[Tensor]] = {}

    def work(n: int) -> None:
        found[n] = [model(inputs[n]) for _ in range(20)]

    with compiles() as made:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 2
    for n, results in found.items():
        wanted = model(inputs[n])
        assert len(results) == 20 and all(torch.equal(y, wanted) for y in results)


def test_the_number_of_threads_changes_no_bit(model: torch.fx.GraphModule) -> None:
    before = torch.get_num_threads()
    x = torch.randn(33, 5, 6)
    try:
        found = []
        for threads in (1, 3, 2, 5, 1):
            torch.set_num_threads(threads)
            found.append(model(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_after_a_fork(model: torch.fx.GraphModule, x: Tensor) -> None:
    """In the child of a process whose threads have run already."""
    wanted = model(x)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_in_child, args=(model, x, wanted))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def _in_child(model: nn.Module, x: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        os._exit(0 if torch.equal(model(x), wanted) else 1)


FORK = """
import multiprocessing, os, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
import qfx
torch.set_num_threads(2)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
model = qfx.quantize(net, torch.randn(4, 3, 32, 32), target="native", verbose=False)
x = torch.randn(8, 3, 32, 32)
wanted = model(x).numpy().tobytes()
def child():  # torch's own loops would hang here
    os._exit(0 if model(x).numpy().tobytes() == wanted else 1)
made = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
[m.start() for m in made]
[m.join(20) for m in made]
[m.kill() for m in made if m.is_alive()]
assert [m.exitcode for m in made] == [0, 0], [m.exitcode for m in made]
assert model(x).numpy().tobytes() == wanted
print("same")
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_forked_children_of_a_parallel_process() -> None:
    assert run(FORK, OMP_NUM_THREADS="2") == "same\n"


# --- compilers --------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_x86(no_jit: Any) -> None:
    program = """
        import warnings
        warnings.simplefilter("ignore")
        import torch
        from torch import nn
        import qfx
        from qfx.targets.native.region import NativeRegion
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        x = torch.randn(4, 6)
        made, plain = (qfx.quantize(net, x, target=t, verbose=False) for t in ("native", "x86"))
        assert not any(isinstance(m, NativeRegion) for m in made.modules())
        assert torch.equal(made(x), plain(x))
        print("QFX_NO_JIT" in str(qfx.report(made)))
    """
    assert no_jit(textwrap.dedent(program)) == "True\n"


def test_a_model_goes_to_where_there_is_no_compiler(
    model: torch.fx.GraphModule, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made where there was one, unpickled where there is none."""
    made = pickle.loads(pickle.dumps(model))
    monkeypatch.setenv("QFX_NO_JIT", "1")
    assert_near(made(x), inlined(model)(x))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache"


def test_an_empty_or_damaged_cache_is_filled_again(free: torch.fx.GraphModule, cache: Path) -> None:
    y = torch.randn(2, 5, 6)
    wanted = free(y)
    region = region_of(free)
    region._forget()
    assert torch.equal(free(y), wanted)
    (library,) = cache.glob("*.so")
    content = library.read_bytes()
    library.unlink()  # a mapped file is not to be written
    library.write_bytes(content[:1000])
    region._forget()
    assert torch.equal(free(y), wanted)
    assert library.stat().st_size > 1000
    region._forget()


def test_a_compiler_that_fails(
    free: torch.fx.GraphModule, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, and not another way: the user has a compiler, and would wonder."""
    broken = tmp_path / "g++-broken"
    version = '[ "$1" = --version ] && echo "g++ 1.0, Free Software Foundation" && exit 0'
    broken.write_text(f'#!/bin/sh\n{version}\necho "no space"; exit 4\n')
    broken.chmod(0o755)
    y = torch.randn(2, 5, 6)
    wanted = free(y)
    region = region_of(free)
    region._forget()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(broken))
        for _ in range(2):
            with pytest.raises(NativeError, match="exit status 4") as caught:
                free(y)
    assert "no space" in str(caught.value) and str(broken) in str(caught.value) and ".log" in str(caught.value)
    assert isinstance(region, NativeRegion) and not region.programs
    assert torch.equal(free(y), wanted), "nothing is kept of the failure"
    region._forget()


def test_unknown_instructions_are_refused() -> None:
    from qfx.errors import ConfigError
    from qfx.targets.native import Native

    with pytest.raises(ConfigError, match="choose one of"):
        Native(isa="z80")
