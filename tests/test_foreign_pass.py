"""Passes that know nothing of qfx: what they return, what they leave out, and what they may not do."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import qfx
from qfx.errors import ConfigError, PassError, VerifyError
from qfx.foreign_pass import ForeignPass
from qfx.graph_module import CapturedModule
from qfx.meta import graph_info, info, update, value
from qfx.operators import name_of
from qfx.pipeline import Pass, as_pass, run_pass
from qfx.printer import show
from qfx.stage import Stage, stage_of
from qfx.testing import assert_graph, assert_same_numerics, run_passes

aten = torch.ops.aten
X = torch.randn(4, 3, 6, 6)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = Swish()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.fc(self.act(self.conv(x)).mean((2, 3))) * scale}


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def canonical(net: Net) -> fx.GraphModule:
    return run_passes(net, X, "functionalize", "canonicalize")


@pytest.fixture
def gm(canonical: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(canonical)


# --- the same rewrite in every way that torch knows -------------------------------------------------------------------


def fuse_silu(gm: fx.GraphModule) -> None:
    """In place, in all ignorance: no example values, no recompilation."""
    for mul in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        x, sigmoid = mul.args
        if isinstance(sigmoid, fx.Node) and sigmoid.target is aten.sigmoid.default and sigmoid.args == (x,):
            with gm.graph.inserting_before(mul):
                mul.replace_all_uses_with(gm.graph.call_function(aten.silu.default, (x,)))
            gm.graph.erase_node(mul)
            gm.graph.erase_node(sigmoid)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    new = copy.deepcopy(gm)
    fuse_silu(new)
    return new


def plain(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    new = fx.GraphModule(gm, graph)
    fuse_silu(new)
    return new


def shared(gm: fx.GraphModule) -> fx.GraphModule:
    """Another module around the same graph."""
    fuse_silu(gm)
    return fx.GraphModule(gm, gm.graph)


def swapped(gm: fx.GraphModule) -> None:
    """The module that was given, around another graph."""
    gm.graph = plain(gm).graph
    gm.meta = {}


class FuseSilu(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        fuse_silu(graph_module)
        return PassResult(graph_module, True)


def replaced(gm: fx.GraphModule) -> None:
    def pattern(x: Tensor) -> Tensor:
        return aten.mul.Tensor(x, aten.sigmoid.default(x))

    fx.subgraph_rewriter.replace_pattern(gm, pattern, lambda x: aten.silu.default(x))


WAYS: dict[str, Callable[[fx.GraphModule], Any]] = {
    "in place": fuse_silu,
    "a deep copy": copied,
    "a plain copy": plain,
    "around the same graph": shared,
    "another graph": swapped,
    "PassBase": FuseSilu(),
    "subgraph_rewriter": replaced,
    "PassManager": PassManager([FuseSilu()]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_one_graph(net: Net, canonical: fx.GraphModule, gm: fx.GraphModule, way: str) -> None:
    parameters = dict(gm.named_parameters())
    assert run_pass(ForeignPass(WAYS[way], "fuse-silu"), gm) == 1
    text = show(gm).replace("silu_default", "silu")  # subgraph_rewriter's name of the node
    assert text == """\
%x: f32[*, 3, 6, 6] = input
%conv_weight: f32[8, 3, 3, 3] = @conv.weight  {layer conv}
%conv_bias: f32[8] = @conv.bias  {layer conv}
%conv2d: f32[*, 8, 4, 4] = conv2d(%x, %conv_weight, %conv_bias)  {layer conv}
%silu: f32[*, 8, 4, 4] = silu(%conv2d)  {layer act}
%mean: f32[*, 8] = mean.dim(%silu, [2, 3])
%fc_weight: f32[5, 8] = @fc.weight  {layer fc}
%fc_bias: f32[5] = @fc.bias  {layer fc}
%linear: f32[*, 5] = linear(%mean, %fc_weight, %fc_bias)  {layer fc}
%mul_1: f32[*, 5] = mul.Tensor(%linear, 1.0)
return (%mul_1)
"""
    assert isinstance(gm, CapturedModule) and gm.graph.owning_module is gm
    assert stage_of(gm) is Stage.CANONICAL and graph_info(gm) == graph_info(canonical)
    assert str(inspect.signature(gm.forward)) == "(x, scale=1.0)"
    assert_same_numerics(net, gm, X, tolerance=1e-6)
    assert_same_numerics(net, copy.deepcopy(gm), {"x": X}, tolerance=1e-6)
    assert all(p is parameters[name] for name, p in gm.named_parameters())  # the model's own memory
    (silu,) = gm.graph.find_nodes(op="call_function", target=aten.silu.default)
    assert "Swish" in str(silu.meta["nn_module_stack"])


class ToHardtanh(fx.Transformer):
    """What torch's interpreters make of a graph: every node anew, under other names."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(aten.hardtanh.default if target is aten.relu.default else target, args, kwargs)


def test_a_transformer_keeps_names_and_places() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()).eval()
    gm = run_passes(model, X, "functionalize", "canonicalize", lambda gm: ToHardtanh(gm).transform())
    assert_graph(gm, """
        %input_1: f32[*, 3, 6, 6] = input
        %_0_weight: f32[8, 3, 3, 3] = @0.weight  {layer 0}
        %_0_bias: f32[8] = @0.bias  {layer 0}
        %conv2d: f32[*, 8, 4, 4] = conv2d(%input_1, %_0_weight, %_0_bias)  {layer 0}
        %hardtanh_default: f32[*, 8, 4, 4] = hardtanh(%conv2d)  {layer 1}
        %flatten: f32[*, 128] = flatten.using_ints(%hardtanh_default, 1)  {layer 2}
        return (%flatten)
    """)


def test_torchs_own_pass_base() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + torch.relu(x)

    gm = run_passes(Twice().eval(), X)
    assert run_pass(as_pass(CSEPass()), gm) == 1
    assert [name_of(n) for n in gm.graph.nodes if n.op == "call_function"] == ["relu", "add"]
    assert run_pass(as_pass(CSEPass), gm) == 0


def test_a_pass_that_changes_nothing_counts_0(gm: fx.GraphModule) -> None:
    before = show(gm)
    for nothing in (lambda gm: None, lambda gm: gm, copy.deepcopy, lambda gm: PassResult(gm, False)):
        assert run_pass(as_pass(nothing), gm) == 0
        assert show(gm) == before


def test_what_it_says_counts_too(gm: fx.GraphModule) -> None:
    def change_a_weight(gm: fx.GraphModule) -> PassResult:
        with torch.no_grad():
            gm.get_parameter("fc.bias").zero_()
        return PassResult(gm, True)

    assert run_pass(as_pass(change_a_weight), gm) == 1


# --- names --------------------------------------------------------------------------------------------------------


def fold_that(gm: fx.GraphModule, much: int = 0) -> None:
    assert much in (0, 3)


class FoldConvBN2d(PassBase):
    def call(self, graph_module: fx.GraphModule) -> None:
        return None


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (fold_that, "fold-that"),
        (functools.partial(fold_that, much=3), "fold-that"),
        (FoldConvBN2d, "fold-conv-bn2d"),
        (FoldConvBN2d(), "fold-conv-bn2d"),
        (PassManager([]), "pass-manager"),
        (lambda gm: None, "lambda"),
    ],
)
def test_names(given: Any, name: str, gm: fx.GraphModule) -> None:
    made = as_pass(given)
    assert isinstance(made, ForeignPass) and isinstance(made, Pass) and made.name == name
    run_pass(made, gm)


def test_a_pipeline_takes_them_as_they_are() -> None:
    base = qfx.Pipeline.default(target="reference")
    for edited in (base.after("fuse-conv-bn", fold_that), base.before("fuse-linear-bn", FoldConvBN2d)):
        assert [p.name for p in edited][3] in ("fold-that", "fold-conv-bn2d")
    assert [p.name for p in base.replace("fuse-conv-bn", fold_that)][2] == "fold-that"
    with pytest.raises(ConfigError, match=r"\['lambda'\] appear twice"):
        base.after("convert", lambda gm: None).after("convert", lambda gm: None)


@pytest.mark.parametrize("what", [3, None, object(), [fold_that], object, int])
def test_what_is_no_pass_is_refused(what: Any) -> None:
    with pytest.raises(ConfigError, match=r"what is to be a pass is a|int cannot be made without arguments"):
        qfx.Pipeline.default().after("convert", what)


# --- what passes leave out ----------------------------------------------------------------------------------------


def insert(gm: fx.GraphModule, after: str, target: Any, *args: Any) -> fx.Node:
    """``target(node, *args)`` between the node called ``after`` and its readers."""
    (node,) = (n for n in gm.graph.nodes if n.name == after)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(target, (node, *args))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def test_values_of_what_follows_are_found_anew(gm: fx.GraphModule) -> None:
    """A change of dtype in the middle, and of an old node's target: what they gave before is stale."""

    def in_double(gm: fx.GraphModule) -> None:
        insert(gm, "mean", aten.to.dtype, torch.float64)
        insert(gm, "fc_weight", aten.to.dtype, torch.float64)
        insert(gm, "fc_bias", aten.to.dtype, torch.float64)
        (mean,) = gm.graph.find_nodes(op="call_function", target=aten.mean.dim)
        mean.args = (mean.args[0], [2, 3], True)
        insert(gm, "to_dtype", aten.flatten.using_ints, 1)

    run_pass(as_pass(in_double), gm)
    kinds = {n.name: str(show(gm).split(f"%{n.name}: ")[1].split(" =")[0]) for n in gm.graph.nodes if n.op != "output"}
    assert (kinds["mean"], kinds["to_dtype"], kinds["mul_1"]) == ("f32[*, 8, 1, 1]", "f64[*, 8, 1, 1]", "f64[*, 5]")
    assert gm(X)["logits"].dtype == torch.float64


def test_a_size_that_varies_stays_one(gm: fx.GraphModule) -> None:
    run_pass(as_pass(lambda gm: insert(gm, "conv2d", aten.relu.default) and None), gm)
    (relu,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert value(relu).shape == value(relu.args[0]).shape
    assert gm(X[:3])["logits"].shape == (3, 5)


def test_new_tensors_come_along(net: Net, gm: fx.GraphModule) -> None:
    def scale_the_weight(gm: fx.GraphModule) -> fx.GraphModule:
        new = copy.deepcopy(gm)
        new.register_buffer("factor", torch.full((), 2.0))
        new.fc.bias = nn.Parameter(new.fc.bias * 2)
        (weight,) = (n for n in new.graph.nodes if n.target == "fc.weight")
        with new.graph.inserting_after(weight):
            factor = new.graph.get_attr("factor")
        with new.graph.inserting_after(factor):
            scaled = new.graph.call_function(aten.mul.Tensor, (weight, factor))
        weight.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return new

    conv, float_fc = gm.get_parameter("conv.weight"), net.fc.bias.clone()
    run_pass(as_pass(scale_the_weight), gm)
    assert torch.equal(gm.get_buffer("factor"), torch.tensor(2.0))
    assert isinstance(gm.get_parameter("fc.bias"), nn.Parameter)
    assert gm.get_parameter("conv.weight") is conv
    assert {str(value(n).shape) for n in gm.graph.nodes if n.target == "factor"} == {"torch.Size([])"}
    assert [info(n).origin for n in gm.graph.nodes if n.target == "factor"] == ["fc"]
    assert torch.equal(net.fc.bias, float_fc)  # the user's model is as it was
    torch.testing.assert_close(gm(X)["logits"], 2 * net(X)["logits"])


def test_what_qfx_knows_of_a_node_survives(gm: fx.GraphModule) -> None:
    def forget(gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            node.meta = {}

    def claim(gm: fx.GraphModule) -> None:
        """The idiom of copying the meta of a node to another one, and writing into what is not one's own."""
        new = insert(gm, "conv2d", aten.relu.default)
        new.meta = dict(new.args[0].meta)
        update(new.args[0], reason="mine")

    (conv,) = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    before = show(gm)
    assert run_pass(as_pass(forget), gm) == 0 and show(gm) == before
    update(conv, fused=("conv2d", "relu"))
    assert run_pass(as_pass(claim), gm) == 1
    (relu,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert (info(conv).fused, info(conv).reason) == (("conv2d", "relu"), "")
    assert (info(relu).fused, info(relu).origin) == ((), "conv")


def test_a_single_output_may_lose_its_tuple(net: Net, gm: fx.GraphModule) -> None:
    def unpack(gm: fx.GraphModule) -> None:
        output = gm.graph.output_node()
        output.args = (output.args[0][0],)

    run_pass(as_pass(unpack), gm)
    assert_same_numerics(net, gm, X)


# --- at every stage -----------------------------------------------------------------------------------------------


def detached(gm: fx.GraphModule) -> None:
    """Something harmless behind the first operator of the user's (in integers, where there are some)."""
    first = next(n for n in gm.graph.nodes if n.op == "placeholder")
    insert(gm, first.name, aten.clone.default)


@pytest.mark.parametrize("target", ["reference", "auto"])
def test_it_runs_wherever_it_is_put(net: Net, target: str) -> None:
    pipeline = qfx.Pipeline.default("int8", target)
    for p in pipeline:
        pipeline = pipeline.after(p.name, ForeignPass(detached, f"behind-{p.name}"))
    qmodel = qfx.quantize(net, X, calibration=[X] * 8, pipeline=pipeline, target=target, verbose=False)
    expected = net(X)["logits"]
    assert (qmodel(X)["logits"] - expected).norm() < 0.1 * expected.norm()


def made_anew(gm: fx.GraphModule) -> fx.GraphModule:
    return fx.Transformer(gm).transform()


def forgotten(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        node.meta = {}


@pytest.mark.parametrize("same", [copy.deepcopy, made_anew, forgotten])
def test_passes_that_change_nothing_change_nothing(net: Net, same: Callable[[fx.GraphModule], Any]) -> None:
    """Behind every pass: the nodes are others, what is known of them is not."""
    default = qfx.Pipeline.default("int8", "reference")
    edited = default
    for p in default.split(Stage.CONVERTED)[0]:
        edited = edited.after(p.name, ForeignPass(same, f"behind-{p.name}"))
    a, b = (
        qfx.quantize(net, X, calibration=[X], pipeline=pipeline, target="reference", verbose=False)
        for pipeline in (default, edited)
    )
    assert_same_numerics(a, b, X)
    assert str(qfx.report(a)) == str(qfx.report(b))


def test_it_runs_in_training_too(net: Net) -> None:
    pipeline = qfx.Pipeline.default("int8", "reference", mode="qat").after("canonicalize", plain)
    prepared = qfx.prepare(net, X, pipeline=pipeline, target="reference", mode="qat")
    prepared(X)["logits"].sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    assert_same_numerics(net, qfx.prepare(net, X, pipeline=pipeline, mode="qat").eval(), X, tolerance=1e-6)


def test_behind_annotation_it_says_why_it_is_float(net: Net) -> None:
    pipeline = qfx.Pipeline.default("int8", "reference").after("annotate", detached)
    report = qfx.report(qfx.quantize(net, X, pipeline=pipeline, target="reference", verbose=False))
    (row,) = (r for r in report.rows if r.operator == "clone")
    assert row.reason == "pass detached inserted it behind annotation"


# --- what passes may not do ---------------------------------------------------------------------------------------


def one_output_more(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = ((*output.args[0], output.args[0][0]),)


def one_input_more(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("y")


def call_method(gm: fx.GraphModule) -> None:
    (conv,) = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    with gm.graph.inserting_after(conv):
        gm.graph.call_method("relu", (conv,))


def call_module(gm: fx.GraphModule) -> None:
    gm.add_submodule("mine", nn.ReLU())
    (conv,) = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    with gm.graph.inserting_after(conv):
        gm.graph.call_module("mine", (conv,))


def out_of_order(gm: fx.GraphModule) -> None:
    list(gm.graph.nodes)[-2].append(next(iter(gm.graph.nodes)))


def no_such_tensor(gm: fx.GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.op == "get_attr").target = "nowhere"


def wrong_shapes(gm: fx.GraphModule) -> None:
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    linear.args = (linear.args[0], linear.args[2], linear.args[1])


def fails(gm: fx.GraphModule) -> None:
    raise KeyError("what it looked for")


def another_model(gm: fx.GraphModule) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Bilinear(2, 2, 2))


GARBAGE: dict[str, tuple[Callable[[fx.GraphModule], Any], str]] = {
    "a number": (lambda gm: 3, "'lambda' returned a int"),
    "a list": (lambda gm: [gm], "'lambda' returned a list"),
    "a module": (lambda gm: nn.ReLU(), "'lambda' returned a ReLU"),
    "a result without a graph": (lambda gm: PassResult(nn.ReLU(), True), "'lambda' returned a ReLU"),
    "an output more": (one_output_more, "'one-output-more' changed how the model is called: it returns 2 tensors"),
    "an input more": (one_input_more, "'one-input-more' changed how the model is called: it takes 2 tensors, not 1"),
    "a method": (call_method, "'call-method' inserted a call_method of 'relu'"),
    "a module called": (call_module, "'call-module' inserted a call_module of 'mine'"),
    "no order": (out_of_order, "'out-of-order' failed: RuntimeError"),
    "no such tensor": (no_such_tensor, "'no-such-tensor' failed"),
    "wrong shapes": (wrong_shapes, "'wrong-shapes' failed"),
    "an error": (fails, "'fails' failed: KeyError: 'what it looked for'"),
    "another model": (another_model, "'another-model' changed how the model is called"),
}


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.parametrize("checking", ["0", "1"])
def test_garbage_names_the_pass(
    gm: fx.GraphModule, case: str, checking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFX_CHECK", checking)
    function, text = GARBAGE[case]
    with pytest.raises(PassError, match=text):
        run_pass(as_pass(function), gm)


def test_the_stage_verifier_holds_it_to_the_stage(gm: fx.GraphModule) -> None:
    def spell_it_matmul(gm: fx.GraphModule) -> None:
        (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        x, weight, _ = linear.args
        with gm.graph.inserting_before(linear):
            turned = gm.graph.call_function(aten.t.default, (weight,))
            linear.replace_all_uses_with(gm.graph.call_function(aten.matmul.default, (x, turned)))

    with pytest.raises(VerifyError, match="pass 'spell-it-matmul' broke the graph: stage CANONICAL, one spelling"):
        run_pass(as_pass(spell_it_matmul), gm)
