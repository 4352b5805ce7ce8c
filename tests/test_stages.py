"""Every stage of every reference model: the verifier passes, and the numerics are what the stage table promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import qfx
from qfx.calling import flat_inputs
from qfx.capture import capture
from qfx.errors import VerifyError
from qfx.examples import as_example
from qfx.fake_quant import FakeQuantize
from qfx.meta import NodeInfo, info, update
from qfx.models import MODELS_SMALL
from qfx.ops import dequantize, quantize
from qfx.pipeline import check_mode, run_pass
from qfx.stage import Stage, stage_of
from qfx.targets import TARGETS, Leaf
from qfx.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

# Not native, which compiles for seconds: tests/native has its own.
AVAILABLE = [name for name, target in TARGETS.items() if name != "native" and target.unavailable() is None]

FUSED = 1e-5
"""The greatest difference that fusing may make, relative to the greatest value. All else keeps the bits."""


def test_the_verifier_is_on() -> None:
    assert check_mode()


def run(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in fx.Interpreter(gm).run(*inputs, enable_io_processing=False)]


def error(want: list[Tensor], got: list[Tensor]) -> float:
    """The greatest difference, relative to each tensor's greatest value."""
    pairs = zip(want, got, strict=True)
    return max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def float_outputs(model: Any, example: Any) -> list[Tensor]:
    call = as_example(example)
    with torch.no_grad():
        out = model(*call.args, **call.kwargs)
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.mark.parametrize("recipe", ["int8", "w4a16"])
@pytest.mark.parametrize("name", MODELS_SMALL)
def test_every_stage_of_a_model(name: str, recipe: str) -> None:
    model, example = MODELS_SMALL[name]()
    call = as_example(example)
    before, behind = qfx.Pipeline.default(recipe, "reference").split()
    gm = capture(model, example)
    inputs = flat_inputs(gm, call.args, dict(call.kwargs))
    verify(gm, Stage.CAPTURED)
    truth = float_outputs(model, example)
    assert error(truth, run(gm, inputs)) == 0.0

    reached = {Stage.CAPTURED}
    fused: list[Tensor] = []
    for p in before:
        run_pass(p, gm)
        stage = stage_of(gm)
        verify(gm, stage)
        reached.add(stage)
        outputs = run(gm, inputs)
        if stage <= Stage.FUSED:
            assert error(truth, outputs) <= (FUSED if p.stage[0] >= Stage.CANONICAL else 0.0), p.name
            fused = outputs
        else:
            assert same(outputs, fused), f"{p.name} changed values"

    prepared = qfx.prepare(model, example, recipe=recipe, target="reference")
    assert isinstance(prepared, fx.GraphModule)
    qfx.calibrate(prepared, [example])
    verify(prepared, Stage.CALIBRATED)
    reached.add(stage_of(prepared))
    assert same(run(prepared, inputs), fused), "calibration changed values"

    for p in behind:
        run_pass(p, prepared)
        verify(prepared, stage_of(prepared))
        reached.add(stage_of(prepared))
        assert error(truth, run(prepared, inputs)) < 0.5, p.name
    assert reached == set(Stage)


@pytest.mark.parametrize("target", AVAILABLE)
@pytest.mark.parametrize("name", ["resnet20", "bert_base"])
def test_stages_hold_what_they_promise(name: str, target: str) -> None:
    """What the table says of the nodes, spelled once more and apart from the verifier."""
    model, example = MODELS_SMALL[name]()
    prepared = qfx.prepare(model, example, target=target)
    assert isinstance(prepared, fx.GraphModule)
    graph = prepared.graph
    assert not any(n.op == "call_method" for n in graph.nodes)
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert {str(n.target) for n in graph.nodes if n.op == "get_attr"} & names, "parameters keep the user's names"
    if name == "resnet20":
        assert not any("batch_norm" in str(n.target) for n in graph.nodes), "batch norms are folded"
    for n in graph.nodes:
        if n.op == "call_function":
            assert info(n).quantized or info(n).reason, f"{n.name} stays float without a reason"

    qfx.calibrate(prepared, [example])
    observers = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    assert observers and all(m.scale.numel() and not m.quantizing and not m.observing for m in observers)

    _, behind = qfx.Pipeline.default("int8", target).split()
    converted = copy.deepcopy(prepared)
    for p in behind:
        if p.name == "lower":
            break
        run_pass(p, converted)
    assert not any(n.op == "call_module" for n in converted.graph.nodes), "the portable form calls no modules"
    assert any(n.target is quantize for n in converted.graph.nodes)
    dtypes = {b.dtype for b in converted.buffers()}
    assert torch.int8 in dtypes and torch.int32 in dtypes
    qmodel = qfx.convert(prepared)
    leaves = [m for m in qmodel.modules() if isinstance(m, Leaf)]
    assert leaves and all(leaf.kernel for leaf in leaves)
    assert sum(n.target is dequantize for n in qmodel.graph.nodes) <= sum(
        n.target is dequantize for n in converted.graph.nodes
    )


def test_the_portable_form_holds_integers_and_no_observer() -> None:
    model, example = MODELS_SMALL["resnet20"]()
    passes = tuple(p for p in qfx.Pipeline.default() if p.stage[1] < Stage.LOWERED)
    portable = qfx.quantize(model, example, target="reference", pipeline=qfx.Pipeline(passes), verbose=False)
    assert not any(isinstance(m, FakeQuantize) for m in portable.modules())
    kept = {n for n, _ in portable.named_parameters()}
    assert not kept & {n for n, p in model.named_parameters() if p.ndim == 4}, "a float weight is left"


# --- the verifier has teeth -----------------------------------------------------------------------------------------


def prepared_net() -> fx.GraphModule:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
    made = qfx.prepare(model, torch.randn(2, 3, 8, 8), target="reference")
    assert isinstance(made, fx.GraphModule)
    return made


def test_a_node_without_a_reason_is_found() -> None:
    gm = prepared_net()
    node = next(n for n in gm.graph.nodes if n.op == "call_function" and n.name.startswith("conv2d"))
    update(node, inputs=(), output=None, reason="")
    with pytest.raises(VerifyError, match=r"no reason[\s\S]*conv2d"):
        verify(gm, Stage.PREPARED)


def test_a_missing_observer_is_found() -> None:
    gm = prepared_net()
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(VerifyError, match="no FakeQuantize"):
        verify(gm, Stage.PREPARED)


def test_a_range_that_is_not_known_is_found() -> None:
    gm = prepared_net()
    verify(gm, Stage.PREPARED)
    with pytest.raises(VerifyError, match="no scale"):
        verify(gm, Stage.CALIBRATED)


def test_an_observer_that_is_left_is_found() -> None:
    with pytest.raises(VerifyError, match="observer is left"):
        verify(prepared_net(), Stage.CONVERTED)


def test_info_is_a_value() -> None:
    """Copies of a graph share it: one that could be changed would leak from the copy into the original."""
    gm = prepared_net()
    twin = copy.deepcopy(gm)
    node = next(n for n in twin.graph.nodes if info(n) != NodeInfo())
    original = next(n for n in gm.graph.nodes if n.name == node.name)
    kept = info(original)
    update(node, reason="another")
    assert info(original) == kept
    with pytest.raises(AttributeError):
        info(node).reason = "no"  # type: ignore[misc]
