"""Tuning: which choices are measured, kept and used, and that none of them changes a number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx import jit
from qfx.errors import ConfigError
from qfx.targets.native import making, tuning, tuning_cache
from qfx.targets.native.choice import SCALES, Choice, Tune, Vary
from qfx.targets.native.compiled import Compiled, build, emitted
from qfx.targets.native.float_twin import Times
from qfx.targets.native.isa import ISAS, Isa, find
from qfx.targets.native.program import Step
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.target import Native

from .nets import RELATIVE, Net, assert_agrees, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

AVX2 = next(isa for isa in ISAS if isa.name == "avx2")
PORTABLE = next(isa for isa in ISAS if isa.name == "portable")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own for what is tuned; compiled code stays where it is."""
    monkeypatch.setattr(tuning_cache, "cache_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _never_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "compare_times", lambda *args: Times(1.0, 2.0))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net(seed: int = 0) -> nn.Module:
    """Layers of every kernel: 3 x 3 for the panel or Winograd, twice the same; depthwise; 1 x 1; linear."""
    torch.manual_seed(seed)
    return Net(
        lambda s, x: s.e(torch.relu(s.d(s.c(s.b(torch.relu(s.a(x)))))).flatten(1)),
        a=nn.Conv2d(32, 32, 3, padding=1),
        b=nn.Conv2d(32, 32, 3, padding=1),
        c=nn.Conv2d(32, 32, 3, padding=1, groups=32),
        d=nn.Conv2d(32, 20, 1),
        e=nn.Linear(320, 5),
    )


X = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def graph_of(model: nn.Module, *example: Tensor, recipe: str = "int8") -> fx.GraphModule:
    """The graph of a region that has not been compiled."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NativeRegion, "outcome", lambda self, *inputs: making.Declined("not in this test"))
        return region_of(native(model, *example, recipe=recipe)).graph


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return graph_of(net(), X)


def quickly(graph: fx.GraphModule, **options: Any) -> Compiled:
    """Compiled with fewer optimizations, which takes less time."""
    return build(graph, [X], find(None), flags=("-O1",), **options)


@pytest.fixture(scope="module")
def untuned(graph: fx.GraphModule) -> Mapping[str, Tensor]:
    """Every value."""
    return quickly(graph).probe(X)


def tuned(seed: int = 0) -> fx.GraphModule:
    """Linear layers, which compile faster; two of them are alike."""
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    return native(nn.Sequential(*layers), ROWS, target=Native(tune="fast"))


def layers_of(steps: Iterable[Step]) -> dict[str, Step]:
    return {step.source: step for step in steps if step.layer}


def program_of(gm: nn.Module) -> Compiled:
    (program,) = region_of(gm).programs
    return program


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """The layers of each program that is made to measure them."""
    found: list[frozenset[str]] = []

    def recorded(*args: Any, vary: Vary, **options: Any) -> Compiled:
        found.append(vary.layers)
        return build(*args, vary=vary, **options)

    monkeypatch.setattr(tuning, "build", recorded)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The layers that tuning wants to have measured; nothing is, and the answer is always the same."""
    found: list[set[str]] = []

    def measured(gm: Any, inputs: Any, isa: Isa, level: Tune, layers: set[str]) -> Mapping[str, Choice]:
        found.append(layers)
        return dict.fromkeys(layers, Choice("panel", 2.0))

    monkeypatch.setattr(tuning, "_measure", measured)
    return found


# --- numbers ----------------------------------------------------------------------------------------------------------


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Every value of two programs of the same graph: integers exactly."""
    assert one.keys() == other.keys() and any(not value.is_floating_point() for value in one.values())
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(other[name], value, rtol=RELATIVE, atol=RELATIVE)
        else:
            assert torch.equal(other[name], value), name


def test_tuning_is_exact_and_measures_once(builds: list[frozenset[str]]) -> None:
    made = tuned()
    (varied,) = builds
    assert_agrees(made, ROWS)

    kept = tuning_cache.read()
    layers = layers_of(program_of(made).steps)
    assert len(layers) == 4 and varied < layers.keys() and len(varied) == len(kept) == 3, "one of two equal layers"
    choices = {step.choice for step in layers.values()}
    assert choices == {Choice.of(plain) for plain in kept.values()}
    assert all(choice and choice.kernel == "panel" and choice.scale in SCALES["fast"] for choice in choices)
    assert layers["linear_1_leaf"].choice == layers["linear_2_leaf"].choice

    other = tuned(seed=1)  # other weights, the same shapes
    assert len(builds) == 1 and tuning_cache.read() == kept
    assert [s.choice for s in program_of(other).steps] == [s.choice for s in program_of(made).steps]
    assert_agrees(other, ROWS)


@pytest.mark.parametrize(
    ("threads", "choice"),
    [(2, Choice("panel", 4.0, 2)), (1, Choice("winograd", 0.25))],
    ids=str,
)
def test_no_choice_changes_an_integer(
    graph: fx.GraphModule, untuned: Mapping[str, Tensor], threads: int, choice: Choice
) -> None:
    torch.set_num_threads(threads)
    names = layers_of(emitted(graph, [X], find(None))[0].program.steps)
    made = quickly(graph, choices=dict.fromkeys(names, choice))
    assert_same(untuned, made.probe(X))


def test_the_program_that_is_measured_computes_the_same(
    graph: fx.GraphModule, untuned: Mapping[str, Tensor]
) -> None:
    names = frozenset(layers_of(emitted(graph, [X], find(None))[0].program.steps))
    made = quickly(graph, vary=Vary(names, SCALES["fast"], parts=False))
    assert len(made.profile(X)) == len(made.steps) > 3 * len(names)
    assert_same(untuned, made.probe(X))


def test_no_samples_are_tuned_as_one(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take no time whatever the choice, and the program serves all batches."""
    given: list[Tensor] = []
    for name in ("tune", "build"):
        monkeypatch.setattr(making, name, lambda gm, inputs, *args, **options: given.extend(inputs))
    for batch, expected in ((0, 1), (3, 3)):
        making.make(graph, [X.new_zeros(batch, *X.shape[1:])], None, "fast")
        assert [x.shape for x in given] == [(expected, *X.shape[1:])] * 2
        given.clear()


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_measures_nothing(graph: fx.GraphModule, asked: list[set[str]], folder: Path) -> None:
    found = tuning.tune(graph, [X], AVX2, "fast")
    program = f"""
import sys, warnings, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from qfx.targets.native import tuning, tuning_cache
from tests.native import test_tuning as t
torch.set_num_threads(1)
tuning_cache.cache_dir = lambda: Path({str(folder)!r})
tuning._measure = None
print(tuning.tune(t.graph_of(t.net(1), t.X), [t.X], t.AVX2, "fast"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(found) and len(found) == 5 and len(asked) == 1


def test_only_what_is_not_known_is_measured(graph: fx.GraphModule, asked: list[set[str]]) -> None:
    names, isa = {*layers_of(emitted(graph, [X], AVX2)[0].program.steps)}, AVX2
    assert tuning.tune(graph, [X], isa, "fast").keys() == names
    known = tuning_cache.read()
    (measured,) = asked
    assert measured < names and len(measured) == len(known) == 4, "one of two equal layers"
    (linear,) = [key for key in known if "(5, 320)" in key]
    put({key: choice for key, choice in known.items() if key != linear})
    assert tuning.tune(graph, [X], isa, "fast").keys() == names
    assert asked[1:] == [{"linear_leaf"}]
    tuning.tune(graph, [X], isa, "fast")
    assert len(asked) == 2


def test_what_cannot_be_kept_is_used_all_the_same(
    graph: fx.GraphModule, asked: list[set[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a file").touch()
    monkeypatch.setattr(tuning_cache, "cache_dir", lambda: folder / "a file")
    for _ in range(2):
        found = tuning.tune(graph, [X], find(None), "fast")
        assert {*found.values()} == {Choice("panel", 2.0)} and len(found) == 5
    assert len(asked) == 2


def test_the_least_time_of_a_step_decides(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants of two layers one behind the other; a run's outlier counts for nothing."""
    made = [("a", 0.5), ("a", 1.0), ("other", None), ("b", 0.5), ("b", 1.0), ("b", 2.0)]
    steps = [SimpleNamespace(source=name, choice=scale and Choice("panel", scale)) for name, scale in made]
    runs = iter([(90, 20, 1, 5, 9, 7), (10, 80, 1, 6, 4, 99), *[(70, 70, 1, 70, 70, 70)] * 3])
    varied: list[Vary] = []

    def build(gm: Any, inputs: Any, isa: Isa, *, vary: Vary) -> Any:
        varied.append(vary)
        return SimpleNamespace(steps=steps, profile=lambda *inputs: next(runs))

    monkeypatch.setattr(tuning, "build", build)
    found = tuning._measure(graph, [X], AVX2, "fast", {"a", "b"})
    assert found == {"a": Choice("panel", 0.5), "b": Choice("panel", 1.0)}
    assert varied == [Vary(frozenset("ab"), SCALES["fast"], parts=False)]
    assert next(runs, None) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_full_varies_all_that_fast_does(graph: fx.GraphModule, threads: int) -> None:
    torch.set_num_threads(threads)
    every = frozenset(layers_of(emitted(graph, [X], AVX2)[0].program.steps))

    def variants(level: Tune) -> set[tuple[str, str | None, float | None, int | None]]:
        vary = Vary(every, SCALES[level], parts=level == "full")
        steps = emitted(graph, [X], AVX2, vary=vary)[0].program.steps
        found = [(s.source, s.choice.kernel, s.choice.scale, s.choice.parts) for s in steps if s.choice]
        assert len(found) == len({*found})
        return {*found}

    fast, full = variants("fast"), variants("full")
    assert {v[:3] for v in fast} < {v[:3] for v in full}
    assert {kernel for _, kernel, *_ in fast} == {"panel", "winograd", "depthwise"}
    assert {parts for *_, parts in fast} == {None}
    assert {parts for _, kernel, _, parts in full if kernel != "depthwise"} == ({None} if threads == 1 else {1, 2})


# --- keys -------------------------------------------------------------------------------------------------------------


def keys_of(graph: fx.GraphModule, x: Tensor = X, isa: Isa = AVX2, level: Tune = "fast") -> set[str]:
    tuning_cache.path().unlink(missing_ok=True)
    tuning.tune(graph, [x], isa, level)
    return {*tuning_cache.read()}


def test_keys_tell_apart_what_the_speed_depends_on(graph: fx.GraphModule, asked: list[set[str]]) -> None:
    found = [
        keys_of(graph),
        keys_of(graph, isa=PORTABLE),
        keys_of(graph, level="full"),
        keys_of(graph, torch.cat([X, X])),
    ]
    torch.set_num_threads(2)
    found.append(keys_of(graph))
    assert all(len(keys) == 4 for keys in found)
    assert len(set.union(*found)) == 20


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Conv2d(32, 16, 3), nn.Conv2d(32, 16, 3, stride=2)),
        (nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=2, dilation=2)),
        (nn.Conv2d(32, 16, 1), nn.Conv2d(32, 16, 1, groups=2)),
        (nn.Conv2d(32, 16, 1), nn.Conv2d(32, 17, 1)),
        (nn.Conv2d(32, 16, 1), nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), nn.MaxPool2d(2))),
        (nn.Conv2d(32, 16, 1), nn.Sequential(nn.Conv2d(32, 16, 1), nn.Hardswish())),
    ],
    ids=["stride", "dilation", "groups", "channels", "integers out", "function"],
)
def test_keys_tell_layers_apart(one: nn.Module, other: nn.Module, asked: list[set[str]]) -> None:
    assert keys_of(graph_of(one, X)).isdisjoint(keys_of(graph_of(other, X)))


def test_keys_tell_signed_data_apart(asked: list[set[str]]) -> None:
    """Whose bytes a kernel must flip."""
    layer = nn.Conv2d(32, 16, 3, padding=1)
    assert keys_of(graph_of(layer, X, recipe="xnnpack")).isdisjoint(keys_of(graph_of(layer, X)))


# --- caches that somebody edited --------------------------------------------------------------------------------------


def put(choices: Mapping[str, Any]) -> None:
    text = json.dumps({"version": tuning_cache.VERSION, "choices": choices})
    tuning_cache.path().write_text(text)


@pytest.mark.parametrize(
    "entry",
    [
        {"kernel": "warp"},
        {"kernel": "winograd"},
        {"kernel": "amx"},
        {"kernel": ""},
        {"kernel": 3},
        {"scale": float("nan")},
        {"scale": 1e12},
        {"parts": 0},
        {"parts": True},
        {"unroll": 4},
        "panel",
        None,
        [],
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_is_ignored(graph: fx.GraphModule, asked: list[set[str]], entry: Any) -> None:
    """Every layer is computed as if nothing had been tuned."""
    tuning.tune(graph, [X], AVX2, "fast")
    put(dict.fromkeys(tuning_cache.read(), entry))
    found = tuning.tune(graph, [X], AVX2, "fast")
    assert len(asked) == 1
    plain, made = (emitted(graph, [X], AVX2, choices=choices)[0].program for choices in ({}, found))
    assert made.source() == plain.source()


def test_layers_take_the_kernels_that_fit_them(graph: fx.GraphModule, asked: list[set[str]]) -> None:
    tuning.tune(graph, [X], AVX2, "fast")
    put({key: {"kernel": "panel", "scale": 0.5} for key in tuning_cache.read()})
    steps = emitted(graph, [X], AVX2, choices=tuning.tune(graph, [X], AVX2, "fast"))[0].program.steps
    chosen = {step.source: step.choice for step in steps if step.choice}
    depthwise = chosen.pop("conv2d_2_leaf")
    assert depthwise is not None and depthwise.kernel == "depthwise"
    assert len(chosen) == 4 and {*chosen.values()} == {Choice("panel", 0.5)}


def test_there_is_no_other_level() -> None:
    with pytest.raises(ConfigError, match="tune is 'quick'"):
        Native(tune="quick")  # type: ignore[arg-type]
