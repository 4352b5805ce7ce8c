"""The float computation that a region stands for, and that no tuned region is slower than it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx
from qfx import jit
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.targets.native import float_twin, making
from qfx.targets.native.declined import Declined
from qfx.targets.native.float_twin import FloatTwin, Times, compare_times
from qfx.targets.native.inlined import regions_of
from qfx.targets.native.region import NativeRegion
from qfx.targets.native.target import Native
from qfx.targets.reference import AnchorLeaf

from .nets import Branches, Net, assert_near, flat, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a compiler whose code it does not run."""
    monkeypatch.setattr(NativeRegion, "outcome", lambda self, *inputs: Declined("not in this test"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- what it computes -------------------------------------------------------------------------------------------------


def with_rounded_weights(model: nn.Module, gm: fx.GraphModule) -> nn.Module:
    """The float model, each weight and each bias that became an integer replaced by what the integer stands for."""
    made = copy.deepcopy(model)
    for path, leaf in region_of(gm).graph.named_modules():
        if not isinstance(leaf, AnchorLeaf):
            continue
        layer = made.get_submodule(path)
        q = leaf.weight_qparams
        shape = (-1, *[1] * (layer.weight.ndim - 1))  # type: ignore[operator, union-attr]
        if q.layout["group_size"] is None:
            weight = (leaf.integers().float() - q.zero_point.float().reshape(shape)) * q.scale.reshape(shape)
        else:
            weight = q.dequantize(leaf.integers())
        assert (weight - layer.weight).abs().max() <= 0.51 * q.scale.max() and not torch.equal(weight, layer.weight)  # type: ignore[operator]
        layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
        if leaf.bias is not None and leaf.integer_bias:
            assert leaf.data is not None and not leaf.bias.is_floating_point()
            step = leaf.data.scale * q.scale
            assert (leaf.bias * step - layer.bias).abs().max() <= 0.51 * step.max()  # type: ignore[operator]
            layer.bias.copy_(leaf.bias * step)  # type: ignore[operator, union-attr]
    return made


def check(model: nn.Module, x: Tensor, recipe: Any = "int8") -> fx.GraphModule:
    """The only region of the quantized model as its twin, against the float model with weights as the integers say."""
    made = native(model, x, recipe=recipe)
    region = region_of(made)
    region.forward = FloatTwin(region.graph)  # type: ignore[method-assign]
    assert_near(made(x), with_rounded_weights(model, made)(x), tolerance=1e-5)
    return made


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


IMAGES = {
    "relu": nn.Sequential(conv(), nn.ReLU(), conv(bias=False), nn.ReLU6()),
    "sum": Net(lambda s, x: torch.relu(s.a(x) + s.b(x)), a=conv(), b=conv(groups=2)),
    "shortcut": Net(lambda s, x: s.b(y := s.a(x)) + y, a=conv(), b=conv()),
    "cat": Net(lambda s, x: s.c(torch.cat([y := s.a(x), s.b(y)], 1)), a=conv(), b=conv(), c=nn.Conv2d(8, 3, 1)),
    "pool": nn.Sequential(conv(), nn.MaxPool2d(2), conv(), nn.AvgPool2d(2, padding=1), conv()),
    "table": nn.Sequential(conv(), nn.Hardswish(), conv(groups=4), nn.SiLU(), conv(stride=2)),
    "gate": Net(lambda s, x: (y := s.a(x)) * torch.sigmoid(s.b(y.mean((2, 3), keepdim=True))), a=conv(), b=conv()),
    "pad": Net(lambda s, x: s.b(F.pad(s.a(x), (1, 0, 2, 1))), a=conv(), b=conv()),
}
ROWS = {
    "sum": Net(lambda s, x: s.b(s.a(x) + x), a=nn.Linear(8, 8), b=nn.Linear(8, 3)),
    "norm": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2, bias=False)),
    "attention": Attention(),
    "product": Net(lambda s, x: s.a(x) @ s.b(x).transpose(1, 2) + x[..., :5], a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
    "split": Net(lambda s, x: (p := s.a(x).chunk(2, -1))[0] * p[1], a=nn.Linear(8, 12)),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("recipe", ["int8", "xnnpack", "openvino"])
def test_images(recipe: str) -> None:
    """Data with a zero point, signed ones, narrow weights."""
    check(Branches(**IMAGES), torch.randn(3, 4, 6, 6), recipe=recipe)


@pytest.mark.usefixtures("uncompiled")
def test_rows() -> None:
    check(Branches(**ROWS), torch.randn(3, 5, 8), recipe="int8")


@pytest.mark.usefixtures("uncompiled")
def test_weight_only() -> None:
    layers = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 3, bias=False))
    check(layers, torch.randn(3, 5, 64), recipe=Recipe.w4a16(32))


@pytest.mark.usefixtures("uncompiled")
def test_integer_biases_are_taken_for_what_they_stand_for() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(96, 3))
    for layer in model:
        if getattr(layer, "bias", None) is not None:
            nn.init.uniform_(layer.bias, -3, 3)  # type: ignore[arg-type]
    made = check(model, torch.randn(3, 4, 4, 4))
    leaves = [m for m in region_of(made).graph.modules() if isinstance(m, AnchorLeaf)]
    assert len(leaves) == 3 and all(leaf.integer_bias for leaf in leaves)


# --- integers at a region's ends --------------------------------------------------------------------------------------


def between(first: nn.Module, last: nn.Module) -> nn.Module:
    """Two regions with integers between them and a transposed convolution, which has no native kernel."""
    return nn.Sequential(first, nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.ReLU(), last)


ENDS = {
    "layers": between(conv(), conv()),
    "moves": between(
        nn.Sequential(conv(), nn.Flatten(2), nn.Unflatten(2, (4, 16))),
        nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (16, 16)), conv()),
    ),
    "pools": between(nn.Sequential(conv(), nn.MaxPool2d(2)), nn.Sequential(nn.MaxPool2d(2), conv())),
    "joins": between(
        Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1)),
        Net(lambda s, x: s.b(torch.cat([s.a(x), x], 1)), a=conv(), b=nn.Conv2d(8, 3, 1)),
    ),
    "sums": between(conv(), Net(lambda s, x: s.a(x) + x, a=conv())),
    "floats out": between(Net(lambda s, x: F.gelu(s.a(x)), a=conv()), Net(lambda s, x: (s.a(x), x.sin()), a=conv())),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "recipe"), [*((name, "int8") for name in ENDS), ("joins", "xnnpack")])
def test_integers_come_in_and_go_out_as_such(name: str, recipe: str) -> None:
    """What a region hands on in place of its graph has the same types and, but for a few roundings, the same values."""
    torch.manual_seed(0)
    made = native(ENDS[name], x := torch.randn(2, 4, 8, 8), recipe=recipe)
    regions = regions_of(made)
    assert len(regions) >= 2
    seen: list[bool] = []

    def compared(region: Any, args: tuple[Tensor, ...], result: Any) -> None:
        got, want = flat(FloatTwin(region.graph)(*args)), flat(result)
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            if not one.is_floating_point():
                assert (one.int() - other.int()).abs().max() <= 8
        seen.append(any(not t.is_floating_point() for t in (*args, *want)))
        assert_near([t.float() for t in got], [t.float() for t in want])

    for region in regions.values():
        region.register_forward_hook(compared)
    made(x)
    assert seen.count(True) >= 2


# --- as a function ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_it_may_be_called_from_many_threads() -> None:
    twin = FloatTwin(region_of(native(Branches(**ROWS), torch.randn(3, 5, 8))).graph)
    inputs = [torch.randn(n + 1, 5, 8) for n in range(6)]
    want = [twin(x) for x in inputs]
    failed: list[object] = []

    def work(n: int) -> None:
        try:
            for _ in range(15):
                got = twin(inputs[n])
                if not all(torch.equal(a, b) for a, b in zip(got, want[n], strict=True)):
                    failed.append(n)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class Clock:
    """Time passes where somebody lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_times_are_the_least_of_turns_behind_a_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(float_twin, "time", clock)
    log: list[str] = []

    def taking(name: str, *seconds: float) -> Any:
        each = iter(seconds)

        def run(x: Tensor) -> None:
            assert x.is_contiguous() and not torch.is_grad_enabled()
            log.append(name)
            clock.now += next(each)

        return run

    native, float_ = taking("native", 1, 5, 3, 4), taking("float", 2, 9, 8, 7)
    with torch.enable_grad():
        times = compare_times(native, float_, [torch.randn(4, 6).t()], rounds=3)
    assert log == ["native", "float"] * 4
    assert (times.native, times.float_) == (pytest.approx(3), pytest.approx(7))
    assert str(Times(0.0021, 0.00125)) == "1.25 ms in float, 2.1 ms as a native program"


# --- never slower than float ------------------------------------------------------------------------------------------


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def measuring(monkeypatch: pytest.MonkeyPatch, native: float, float_: float) -> list[tuple[Any, FloatTwin]]:
    """Nothing is measured: these are the times. What would have been compared."""
    found: list[tuple[Any, FloatTwin]] = []

    def compare(program: Any, twin: FloatTwin, inputs: Any) -> Times:
        assert [x.shape for x in inputs] == [X.shape]
        found.append((program, twin))
        return Times(native, float_)

    monkeypatch.setattr(making, "tune", lambda *args: {})
    monkeypatch.setattr(making, "compare_times", compare)
    return found


def test_a_region_that_loses_runs_in_float(layers: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = measuring(monkeypatch, 0.004, 0.0015)
    made = native(layers, X, target=Native(tune="fast"))
    region = region_of(made)
    ((program, twin),) = compared
    assert region.programs == () and region.program(X) is None
    (reason,) = region.declined
    assert "runs in float" in reason and "1.5 ms in float" in reason and "4 ms as a native program" in reason
    assert f"native: {reason}" in [text for topic, text in qfx.report(made).notes if topic == "not native"]
    assert torch.equal(made(X), twin(X)) and not torch.equal(made(X), program(X)[0])
    assert_near(made(X), with_rounded_weights(layers, made)(X), tolerance=1e-5)
    other = torch.randn(7, 6)  # another batch is no other decision
    assert torch.equal(made(other), twin(other))
    with torch.enable_grad():
        assert made(X).shape == (4, 3)
    for again in (copy.deepcopy(made), made.to("cpu")):
        assert torch.equal(again(X), made(X))
    assert len(compared) >= 2  # neither the copy nor what has moved knows of the decision


@pytest.mark.parametrize("float_", [1.0, 2.0], ids=["as fast", "faster"])
def test_a_region_that_wins_runs_its_program(
    layers: nn.Module, monkeypatch: pytest.MonkeyPatch, float_: float
) -> None:
    compared = measuring(monkeypatch, 1.0, float_)
    made = native(layers, X, target=Native(tune="full"))
    region = region_of(made)
    ((program, twin),) = compared
    assert region.programs == (program,) and region.declined == ()
    assert torch.equal(made(X), program(X)[0]) and not torch.equal(made(X), twin(X))
    assert not [topic for topic, _ in qfx.report(made).notes if topic == "not native"]


def test_only_tuned_regions_are_compared(layers: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = measuring(monkeypatch, 2.0, 1.0)
    made = native(layers, X)
    assert len(region_of(made).programs) == 1 and not compared


@pytest.mark.usefixtures("uncompiled")
def test_where_there_is_no_compiler_nothing_is_tuned(layers: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = region_of(native(layers, X)).graph
    compared = measuring(monkeypatch, 2.0, 1.0)
    monkeypatch.setenv("QFX_NO_JIT", "1")
    assert making.make(graph, [X], None, "fast") == Declined("turned off by QFX_NO_JIT")
    assert not compared


@pytest.mark.usefixtures("uncompiled")
def test_an_instruction_set_that_is_not_there(layers: nn.Module) -> None:
    graph = region_of(native(layers, X)).graph
    with pytest.raises(ConfigError, match="no instruction set"):
        making.make(graph, [X], "sse9", "fast")
