"""Small random models through the whole pipeline in check mode, compared node by node on identical inputs.

Between two stages every value of the later graph is compared with its counterpart in the earlier one, and then replaced
by it: a difference is that node's alone, and no rounding of an earlier layer is carried along. CONVERTED must be
fake-quantization within float rounding, a LOWERED graph must be CONVERTED within 1 of its integers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qfx
from qfx.fake_quant import FakeQuantize
from qfx.meta import info
from qfx.metrics import sqnr_db
from qfx.ops import dequantize, quantize
from qfx.pipeline import run_pass
from qfx.spec import UINT8, IntType
from qfx.stage import Stage, stage_of
from qfx.targets import TARGETS, Leaf

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

EXAMPLES = settings.default.max_examples  # 25, and many in `make nightly`
# Not native, which compiles for seconds: tests/native has its own.
AVAILABLE = [name for name, target in TARGETS.items() if name != "native" and target.unavailable() is None]

# --- random models --------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.7, 1.3),
}
"""Element-wise operators of one input."""

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max_ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "avg": lambda x: F.avg_pool2d(x, 2, 1),
    "avg_padded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
}
"""Pooling of images of at least 2 by 2."""

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(2, 3),
    "slice": lambda x: x[:, :, 1:] if x.shape[2] > 3 else x,
    "flip": lambda x: x.flip(3),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2)),
    "pad_value": lambda x: F.pad(x, (0, 1), value=0.5),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest") if x.shape[2] < 8 else x,
    "split_cat": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "view": lambda x: x.flatten(2).unflatten(2, (x.shape[2], x.shape[3])),
    "permute_back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
}
"""Operators that keep the channels and move or select elements."""


@dataclass(frozen=True)
class Step:
    """One operator of a random model: its kind, a choice among variants, and which earlier value joins (for binary)."""

    kind: str
    choice: int
    other: int = 0


class Random(nn.Module):
    """Runs ``steps`` on ``[N, 3, 7, 6]``, then pools and classifies; every step maps one image to one image."""

    def __init__(self, steps: tuple[Step, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        self.layers = nn.ModuleList()
        channels = [4]
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for step in steps:
            self.layers.append(layer(step, channels))
        self.head = nn.Linear(channels[-1], 5)
        for module in self.modules():  # statistics that change something
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for step, module in zip(self.steps, self.layers, strict=True):
            values.append(self.apply_step(step, module, values))
        return self.head(values[-1].mean((2, 3)))

    def apply_step(self, step: Step, module: nn.Module, values: list[Tensor]) -> Tensor:
        x = values[-1]
        if step.kind == "activation":
            return pick(ACTIVATIONS, step.choice)(x)
        if step.kind == "pool":
            return pick(POOLS, step.choice)(x)
        if step.kind == "move":
            return pick(MOVES, step.choice)(x)
        if step.kind in ("add", "mul", "cat"):
            other = values[step.other % len(values)]
            if step.kind == "cat":
                return torch.cat([x, fitted(other, x)], 1) if x.shape[1] <= 16 else x
            joined = fitted(other, x)
            if joined.shape[1] != x.shape[1]:
                joined = joined.mean(1, keepdim=True)
            return x + joined if step.kind == "add" else x * joined
        if step.kind == "linear":
            return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return module(x)


def fitted(other: Tensor, x: Tensor) -> Tensor:
    """``other`` with the height and width of ``x``."""
    return other if other.shape[2:] == x.shape[2:] else F.adaptive_avg_pool2d(other, x.shape[2:])


def pick(table: dict[str, Any], choice: int) -> Any:
    return list(table.values())[choice % len(table)]


def layer(step: Step, channels: list[int]) -> nn.Module:
    """The step's module; notes how many channels its result has."""
    n, choice = channels[-1], step.choice
    out = n
    made: nn.Module = nn.Identity()
    if step.kind in ("conv", "conv_bn", "conv_bn_relu"):
        kernel, groups, bias = (1, 3)[choice % 2], (1, n)[choice // 2 % 2], bool(choice // 4 % 2)
        out = n if groups > 1 else (4, 6, 8)[choice % 3]
        conv = nn.Conv2d(n, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        tail = [nn.BatchNorm2d(out)] * (step.kind != "conv") + [nn.ReLU()] * step.kind.endswith("relu")
        made = nn.Sequential(conv, *tail)
    elif step.kind == "deconv":
        out = 4
        made = nn.ConvTranspose2d(n, out, 3, padding=1, bias=bool(choice % 2))
    elif step.kind == "linear":
        out = 6
        made = nn.Linear(n, out, bias=bool(choice % 2))
    elif step.kind == "bn":
        made = nn.BatchNorm2d(n)
    elif step.kind == "cat" and n <= 16:
        out = n + channels[step.other % len(channels)]
    channels.append(out)
    return made


KINDS = (
    "conv", "conv_bn", "conv_bn_relu", "deconv", "linear", "bn", "activation", "activation", "pool", "move", "add",
    "add", "mul", "cat",
)  # fmt: skip
any_step = st.builds(Step, st.sampled_from(KINDS), st.integers(0, 35), st.integers(0, 5))
any_steps = st.lists(any_step, min_size=1, max_size=7).map(tuple)
any_recipe = st.sampled_from(
    (
        qfx.Recipe.int8(),
        qfx.Recipe.int8().set(op="conv2d", weight=4),
        qfx.Recipe("a6", qfx.QConfig(qfx.QuantSpec(IntType(6, False)), qfx.Recipe.int8().default.weight)),
        qfx.Recipe("minmax", qfx.QConfig(qfx.QuantSpec(UINT8), qfx.Recipe.int8().default.weight)),
    )
)


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """One model as far as three stages, with the inputs that are compared."""

    fused: fx.GraphModule
    prepared: fx.GraphModule
    converted: fx.GraphModule
    inputs: tuple[Tensor, ...]


def stages(model: nn.Module, example: Any, recipe: qfx.Recipe | str = "int8", target: str = "reference") -> Stages:
    """The pipeline by hand: every pass is held to its contract, for ``QFX_CHECK`` is set."""
    from qfx.calling import flat_inputs
    from qfx.capture import capture

    pipeline = qfx.Pipeline.default(recipe, target)
    before, behind = pipeline.split()
    gm = capture(model, example)
    fused = gm
    for p in before:
        if p.name == "annotate":
            fused = copy.deepcopy(gm)
        run_pass(p, gm)
    assert stage_of(gm) is Stage.PREPARED
    prepared = qfx.prepare(model, example, recipe=recipe, target=target)
    qfx.calibrate(prepared, [example])
    assert isinstance(prepared, fx.GraphModule)
    assert [n.name for n in prepared.graph.nodes] == [n.name for n in gm.graph.nodes]
    converted = copy.deepcopy(prepared)
    for p in behind:
        if p.name == "lower":
            break
        run_pass(p, converted)
    assert stage_of(converted) is Stage.CONVERTED
    call = (example,) if isinstance(example, Tensor) else example
    given = ((), call) if isinstance(call, dict) else (call, {})
    return Stages(fused, prepared, converted, flat_inputs(prepared, *given))


def lowered(converted: fx.GraphModule, target: str) -> fx.GraphModule:
    gm = copy.deepcopy(converted)
    _, behind = qfx.Pipeline.default("int8", target).split()
    names = [p.name for p in behind]
    for p in list(behind)[names.index("lower") :]:
        run_pass(p, gm)
    assert stage_of(gm) is Stage.LOWERED
    return gm


class Recorder(fx.Interpreter):
    """Keeps the value of every node; those that are in ``instead`` are judged by ``compare`` and then replaced."""

    def __init__(
        self,
        gm: fx.GraphModule,
        instead: Callable[[fx.Node], Any] = lambda n: None,
        compare: Callable[[fx.Node, Any, Any], None] = lambda n, want, got: None,
    ) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}
        self.instead, self.compare = instead, compare
        self.compared = 0

    def run_node(self, n: fx.Node) -> Any:
        got = super().run_node(n)
        want = self.instead(n)
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            self.compare(n, want, got)
            self.compared += 1
            got = want.clone()
        self.values[n.name] = got
        return got

    def go(self, inputs: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return self.run(*inputs, enable_io_processing=False)


def fake_quantized(prepared: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Recorder:
    modules = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    for m in modules:
        m.quantizing = True
    recorder = Recorder(prepared)
    try:
        recorder.go(inputs)
    finally:
        for m in modules:
            m.quantizing = False
    return recorder


def compare_converted(made: Stages) -> int:
    """CONVERTED against fake-quantization: the same grid, and the rest within float rounding and half a bias unit."""
    truth = fake_quantized(made.prepared, made.inputs).values
    units = bias_units(made.converted)

    def instead(n: fx.Node) -> Any:
        if n.target is dequantize:
            source = n.name.removesuffix("_dequantize")
            return truth.get(f"{source}_fake_quant") if n.name.endswith("_dequantize") else None
        return truth.get(n.name) if n.op == "call_function" else None

    def compare(n: fx.Node, want: Tensor, got: Tensor) -> None:
        assert want.shape == got.shape and want.dtype == got.dtype, n.name
        if not want.is_floating_point():
            assert torch.equal(want, got), n.name
            return
        error = (want.double() - got.double()).abs()
        largest = float(want.abs().max()) if want.numel() else 0.0
        allowed = torch.full_like(error, 2e-6 * largest)
        if n in units:
            allowed = allowed + 0.5 * units[n]
        if n.target is dequantize:
            allowed = torch.zeros_like(error)
        assert (error <= allowed).all(), f"{n.name}: {float(error.max()):.3g}, allowed {float(allowed.max()):.3g}"

    judge = Recorder(made.converted, instead, compare)
    judge.go(made.inputs)
    return judge.compared


def bias_units(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The unit of each layer's int32 bias, by output channel, shaped to broadcast."""
    found = {}
    for n in gm.graph.nodes:
        bias = n.args[2] if n.op == "call_function" and len(n.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.target is dequantize:
            scale = gm.get_buffer(str(bias.args[1].target)).double()  # type: ignore[union-attr]
            linear = "linear" in str(n.target)
            found[n] = scale if linear else scale.reshape(-1, *[1] * (n.meta["val"].ndim - 2))
    return found


def compare_lowered(made: Stages, target: str) -> int:
    """A LOWERED graph against CONVERTED: integers within 1, floats within 1e-5, layer by layer."""
    gm = lowered(made.converted, target)
    recorder = Recorder(made.converted)
    recorder.go(made.inputs)
    truth, nodes = recorder.values, {n.name: n for n in made.converted.graph.nodes}
    quantized_of = {
        n.args[0].name: n.name for n in made.converted.graph.nodes if n.target is quantize and len(n.args[0].users) == 1
    }

    def instead(n: fx.Node) -> Any:
        leaf = n.op == "call_module" and isinstance(gm.get_submodule(str(n.target)), Leaf)
        if not leaf:
            return truth.get(n.name) if n.name in nodes and n.op == "call_function" else None
        last = info(n).fused[-1]
        integers = n.meta["val"].dtype in (torch.uint8, torch.int8)
        return truth[quantized_of[last]] if integers else truth[last]

    def compare(n: fx.Node, want: Tensor, got: Tensor) -> None:
        assert want.shape == got.shape and want.dtype == got.dtype, n.name
        if want.is_floating_point():
            scale = float(want.abs().max()) if want.numel() else 0.0
            error = float((want - got).abs().max()) if want.numel() else 0.0
            assert error <= 1e-5 * scale + 1e-30, f"{n.name}: {error:.3g} at {scale:.3g}"
        elif want.numel():
            apart = int((want.int() - got.int()).abs().max())
            assert apart <= 1, f"{n.name}: {apart} apart"

    judge = Recorder(gm, instead, compare)
    judge.go(made.inputs)
    return sum(isinstance(gm.get_submodule(str(n.target)), Leaf) for n in gm.graph.nodes if n.op == "call_module")


def everything(model: nn.Module, example: Any, recipe: qfx.Recipe | str) -> None:
    """All comparisons for one model."""
    for target in AVAILABLE:
        made = stages(model, example, recipe, target)
        float_out, prepared_out = (Recorder(gm).go(made.inputs) for gm in (made.fused, made.prepared))
        for a, b in zip(float_out, prepared_out, strict=True):
            assert torch.equal(a, b), "a prepared graph computes what the fused one does"
        assert compare_converted(made) > 0
        assert compare_lowered(made, "reference") > 0
        if target != "reference":
            compare_lowered(made, target)


# --- tests ----------------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES // 2)
@given(any_steps, any_recipe, st.integers(0, 3))
def test_random_models(steps: tuple[Step, ...], recipe: qfx.Recipe, seed: int) -> None:
    model = Random(steps, seed).eval()
    everything(model, torch.randn(4, 3, 7, 6, generator=torch.Generator().manual_seed(seed)), recipe)


@settings(max_examples=EXAMPLES // 4)
@given(any_steps, st.sampled_from(AVAILABLE), st.integers(0, 3))
def test_random_models_are_close_to_float_from_end_to_end(steps: tuple[Step, ...], target: str, seed: int) -> None:
    model = Random(steps, seed).eval()
    x = torch.randn(64, 3, 7, 6, generator=torch.Generator().manual_seed(seed))
    qmodel = qfx.quantize(model, x, target=target, verbose=False)
    with torch.no_grad():
        assert sqnr_db(model(x), qmodel(x)) > 15
        for batch in (1, 3):
            assert qmodel(x[:batch]).shape == (batch, 5)


@settings(max_examples=EXAMPLES // 6)
@given(st.lists(st.sampled_from(("linear", "relu", "gelu", "norm", "add")), min_size=1, max_size=6), st.booleans())
@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic", "w8a16", "w4a16"])
def test_random_transformer_like_models(recipe: str, kinds: list[str], bias: bool) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(24, 24, bias),
        "norm": lambda: nn.LayerNorm(24),
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "add": nn.Identity,
    }

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(made[kind]() for kind in kinds)
            self.head = nn.Linear(24, 10, bias)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for kind, module in zip(kinds, self.layers, strict=True):
                y = x + y if kind == "add" else module(y)
            return self.head(y)

    everything(Tokens().eval(), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)), recipe)


EVERY = [Step("activation", i) for i in range(len(ACTIVATIONS))]
EVERY += [Step("pool", i) for i in range(len(POOLS))] + [Step("move", i) for i in range(len(MOVES))]


@pytest.mark.parametrize("step", EVERY, ids=lambda s: list({**ACTIVATIONS, **POOLS, **MOVES})[EVERY.index(s)])
def test_every_operator_between_convolutions(step: Step) -> None:
    steps = (Step("conv", 1), step, Step("conv", 1), step)
    everything(Random(steps, 0).eval(), torch.randn(4, 3, 7, 6, generator=torch.Generator().manual_seed(0)), "int8")
