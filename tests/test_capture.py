"""Capture: the graph is what the model is, at every size that is free, and the model itself is untouched."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qfx.attempt import DataDependentError, UncapturableError
from qfx.capture import FixedSizeWarning, TrainingModeWarning, capture, is_captured
from qfx.errors import CaptureError, ConfigError
from qfx.growth import difference, differences, row_disagreement
from qfx.meta import graph_info
from qfx.structure import flatten


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Tokens(nn.Module):
    """Tied weights, a constant made in the code, a tensor attribute, a position table and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight
        self.scale = torch.full((8,), 0.5)
        self.register_buffer("position", torch.randn(32, 8), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        x = self.emb(ids) * torch.tensor([2.0]) * self.scale + self.position[torch.arange(ids.shape[1])]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if mask is None else ~mask)
        return {"logits": self.head(x), "length": ids.shape[1]}


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, -1] = False
    return {"ids": torch.randint(0, 20, (batch, length)), "mask": mask}


def same(model: nn.Module, graph: nn.Module, inputs: dict[str, Tensor]) -> str:
    with torch.no_grad():
        want, got = model(**inputs), graph(**inputs)
    assert flatten(want)[1] == flatten(got)[1]
    return differences(flatten(want)[0], flatten(got)[0])


def capture_quietly(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return capture(model, *args, **kwargs)


def ops(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


# --- the graph ------------------------------------------------------------------------------------


def test_the_graph_is_flat_aten_with_the_users_names() -> None:
    model = Conv().eval()
    graph = capture_quietly(model, torch.randn(1, 3, 8, 8))
    assert type(graph).__name__ == "Conv" and isinstance(graph, torch.fx.GraphModule)
    assert ops(graph) == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
        "aten.dropout.default",
        "aten.mean.dim",
        "aten.linear.default",
    ]
    names = [n.target for n in graph.graph.nodes if n.op == "get_attr"]
    assert names[:2] == ["conv.weight", "conv.bias"] and "bn.running_var" in names
    assert [n.target for n in graph.graph.nodes if n.op == "placeholder"] == ["x"]
    assert isinstance(graph.graph.output_node().args[0], tuple)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], Tensor) and node.meta["stack_trace"] and node.meta["nn_module_stack"]
    assert graph_info(graph).stage == "CAPTURED" and graph_info(graph).notes == ()
    assert not any(m.training for m in graph.modules())


@pytest.mark.parametrize("batch", [1, 4])
def test_an_image_model_runs_at_other_batches(batch: int) -> None:
    model = Conv().eval()
    graph = capture_quietly(model, torch.randn(batch, 3, 8, 8))
    for other in (1, 3, 8):
        assert not same(model, graph, {"x": torch.randn(other, 3, 8, 8)})


def test_a_token_model_runs_at_other_batches_and_lengths() -> None:
    model = Tokens().eval()
    graph = capture_quietly(model, tokens(1, 6))
    for batch, length in ((1, 6), (3, 6), (8, 9), (2, 3)):
        assert not same(model, graph, tokens(batch, length))


def test_tied_parameters_stay_tied_under_both_names() -> None:
    model = Tokens().eval()
    graph = capture_quietly(model, tokens(2, 6))
    assert graph.emb.weight is graph.head.weight
    assert graph.emb.weight.data_ptr() == model.emb.weight.data_ptr()
    users = {n.target: [u.name for u in n.users] for n in graph.graph.nodes if n.op == "get_attr"}
    assert users["emb.weight"] == ["embedding"] and users["head.weight"][0].startswith("linear")


def test_constants_have_stable_names_and_no_copy_in_front() -> None:
    graph = capture_quietly(Tokens().eval(), tokens(2, 6))
    assert graph._constant_0.tolist() == [2.0]
    assert graph.scale.tolist() == [0.5] * 8
    assert not any("lift_fresh" in op or "detach" in op for op in ops(graph))
    assert "scale" not in graph.state_dict() and "position" not in graph.state_dict()


def test_encoder_layers_are_not_hidden_in_a_fused_kernel() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    graph = capture_quietly(Tokens().eval(), tokens(2, 6))
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("_transformer_encoder_layer_fwd" in op or "native_multi_head" in op for op in ops(graph))
    assert sum(op == "aten.linear.default" for op in ops(graph)) >= 9


def test_the_same_model_gives_the_same_graph() -> None:
    model, inputs = Tokens().eval(), tokens(2, 6)
    assert str(capture_quietly(model, inputs).graph) == str(capture_quietly(model, inputs).graph)


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[0] > 0)
        torch._assert(x.shape[1] > 1, "wide")
        return x.to(torch.float64) + x.shape[0]


def test_assertions_and_what_only_they_read_are_gone() -> None:
    graph = capture_quietly(Asserting().eval(), torch.randn(2, 3))
    assert not any("assert" in op or "check" in op or "constrain" in op for op in ops(graph))
    assert all(n.users for n in graph.graph.nodes if n.op == "call_function")


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x * 2
        with torch.autocast("cpu", enabled=False):
            return x + 1


def test_grad_and_autocast_regions_are_inlined() -> None:
    graph = capture_quietly(Wrapped().eval(), torch.randn(2, 3))
    assert ops(graph) == ["aten.mul.Tensor", "aten.add.Tensor"]


class Vmapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(torch.vmap(lambda row: row * row.sum())(x))


def test_vmap_is_resolved() -> None:
    model = Vmapped().eval()
    graph = capture_quietly(model, torch.randn(2, 3))
    assert all(op.startswith("aten.") for op in ops(graph))
    assert not same(model, graph, {"x": torch.randn(5, 3)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 4, batch_first=True),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ],
)
def test_modules_of_torch(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    width = 4 if isinstance(model, nn.LSTM) else 8
    count = 3 if isinstance(model, nn.MultiheadAttention) else 1
    graph = capture_quietly(model, tuple(torch.randn(1, 5, width) for _ in range(count)))
    for batch in (1, 3):
        inputs = [torch.randn(batch, 5, width) for _ in range(count)]
        with torch.no_grad():
            assert not differences(flatten(model(*inputs))[0], flatten(graph(*inputs))[0])


class Siamese(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b


def test_the_same_tensor_may_come_twice() -> None:
    x = torch.randn(2, 3)
    graph = capture_quietly(Siamese().eval(), (x, x))
    assert torch.equal(graph(x, x + 1), x - 2 * (x + 1))


# --- sizes ----------------------------------------------------------------------------------------


class OneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.reshape(1, 6))


class FixedBatch(OneRow):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * torch.ones([int(x.shape[0]) for _ in range(1)]).sum() if x.shape[0] != 2 else self.lin(x)


class MixesRows(OneRow):
    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).softmax(0)


@pytest.mark.parametrize(
    ("model", "why"), [(OneRow(), "the model itself fails at batch 2"), (MixesRows(), "first row of a batch")]
)
def test_a_batch_that_cannot_grow_is_fixed_and_said(model: nn.Module, why: str) -> None:
    with pytest.warns(FixedSizeWarning, match="x: dimension 0 is fixed at 1"):
        graph = capture(model.eval(), torch.randn(1, 6))
    ((topic, text),) = graph_info(graph).notes
    assert topic == "capture" and why in text
    assert graph(torch.randn(1, 6)).shape == (1, 2)
    with pytest.raises(CaptureError, match=r"argument x should be float32\[1, 6\]; it is float32\[2, 6\]"):
        graph(torch.randn(2, 6))


def test_a_batch_that_the_code_makes_a_constant_is_fixed_as_given() -> None:
    model = FixedBatch().eval()
    with pytest.warns(FixedSizeWarning, match=r"fixed at 1: .*constant.*test_capture.py:\d+"):
        graph = capture(model, torch.randn(1, 6))
    x = torch.randn(1, 6)
    assert torch.equal(graph(x), model(x))


def test_a_length_of_one_is_fixed_and_said() -> None:
    graph = capture_quietly(Tokens().eval(), {"ids": torch.ones(1, 1, dtype=torch.long)})
    assert graph_info(graph).notes == (
        (
            "capture",
            "ids: dimension 1 is fixed at 1: torch.export takes a size below 2 for a constant; "
            "give an example with a greater one",
        ),
    )


def test_dynamic_shapes_by_name_and_by_position() -> None:
    model, x = Conv().eval(), torch.randn(1, 3, 8, 8)
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim("width", max=64)}
    for given in ({"x": free}, (free,)):
        graph = capture_quietly(model, x, dynamic_shapes=given)
        assert not same(model, graph, {"x": torch.randn(3, 3, 12, 10)})
    with pytest.raises(CaptureError, match="at most 64 in dimension 3"):
        graph(torch.randn(1, 3, 8, 65))


def test_without_dynamic_shapes_the_image_size_is_fixed_and_the_error_says_how_to_free_it() -> None:
    graph = capture_quietly(Conv().eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(CaptureError, match=r"dynamic_shapes=\{'x': \{2: torch.export.Dim.AUTO\}\}"):
        graph(torch.randn(1, 3, 9, 8))


def test_dynamic_shapes_may_fix_the_batch() -> None:
    graph = capture_quietly(Conv().eval(), torch.randn(1, 3, 8, 8), dynamic_shapes={"x": None})
    with pytest.raises(CaptureError, match=r"float32\[1, 3, 8, 8\]"):
        graph(torch.randn(2, 3, 8, 8))


def test_bad_dynamic_shapes_are_errors() -> None:
    model, x = Conv().eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="dynamic_shapes names 'y'"):
        capture(model, x, dynamic_shapes={"y": {0: Dim.AUTO}})
    with pytest.raises(ConfigError, match="dynamic_shapes for x is a str"):
        capture(model, x, dynamic_shapes={"x": "batch"})
    with pytest.raises(UncapturableError, match="cannot be free as dynamic_shapes asks"):
        capture(OneRow().eval(), torch.randn(1, 6), dynamic_shapes={"x": {0: Dim.AUTO}})


def test_comparisons_see_what_they_should() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert not difference(a, a.clone())
    assert not difference(a, a * (1 + 1e-6))
    assert "values differ" in difference(torch.ones(2), torch.tensor([1.0, 1.1]))
    assert "in place of" in difference(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert "integers differ" in difference(torch.arange(3), torch.zeros(3, dtype=torch.long))
    assert "result 1" in differences([a, 3], [a, 4])
    assert not row_disagreement([torch.ones(1, 2), torch.ones(1, 1)], [torch.ones(2, 2), torch.ones(2, 2)])
    assert "shape" in row_disagreement([torch.ones(3)], [torch.ones(2)])


# --- the model is left as it is -------------------------------------------------------------------


class Writes(nn.Module):
    """Writes to a buffer, to its input, to itself, and draws random numbers."""

    def __init__(self, *, fail: bool = False) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.lin = nn.Linear(3, 3)
        self.calls: list[int] = []
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.calls.append(1)
        x.add_(1)
        if self.fail and float(x.sum()) > 0:
            raise ValueError("no")
        return self.lin(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_of_the_users_changes(fail: bool) -> None:
    model, x = Writes(fail=fail), torch.ones(1, 3)
    model.lin.eval()
    model.register_forward_hook(lambda module, args, output: output)
    before = copy.deepcopy(model.state_dict())
    identities = {name: (id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers())}
    flags = {name: m.training for name, m in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if fail:
            with pytest.raises(CaptureError, match="itself fails on example_inputs: ValueError: no"):
                capture(model, x)
        else:
            capture(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert identities == {name: (id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert flags == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert model.calls == [] and len(model._forward_hooks) == 1 and torch.equal(x, torch.ones(1, 3))


def test_a_buffer_that_the_graph_writes_is_its_own() -> None:
    model = Writes().eval()
    graph = capture_quietly(model, torch.ones(2, 3))
    graph(torch.ones(2, 3))
    assert graph.count.item() > 0 and model.count.item() == 0
    assert graph.lin.weight.data_ptr() == model.lin.weight.data_ptr()


def test_converting_the_graph_leaves_the_model() -> None:
    model = Conv().eval()
    graph = capture_quietly(model, torch.randn(2, 3, 8, 8)).double()
    assert model.conv.weight.dtype is torch.float32
    assert graph(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype is torch.float64


def test_training_mode_warns_and_is_captured_as_eval() -> None:
    model = Conv()
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(TrainingModeWarning, match=r"forgotten eval\(\)"):
        graph = capture(model, x)
    assert model.training and not graph.training
    assert torch.equal(graph(x), copy.deepcopy(model).eval()(x))


class Config:
    def __init__(self) -> None:
        self.use_cache = True


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.lin(x), x) if self.config.use_cache else (self.lin(x),)


def test_caches_are_turned_off_in_the_copy_and_noted() -> None:
    model = Caching().eval()
    graph = capture_quietly(model, torch.randn(2, 3))
    assert model.config.use_cache and not graph.config.use_cache
    assert len(graph(torch.randn(2, 3))) == 1
    assert [t for _, t in graph_info(graph).notes] == [
        "config.use_cache is off in the captured graph: it returns no key-value cache"
    ]


def test_device_constants_move_with_the_graph() -> None:
    graph = capture_quietly(Tokens().eval(), tokens(2, 6)).to("meta")
    devices = [n.kwargs["device"] for n in graph.graph.nodes if n.kwargs.get("device") is not None]
    assert devices and all(d.type == "meta" for d in devices)


# --- what is refused ------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if y.sum() > 0:  # the line that stops it
            y = y * 2
        return y


def test_data_dependent_control_flow_tells_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataDependentError) as caught:
        capture(Branches().eval(), torch.randn(2, 3))
    file, _, line = caught.value.source.rpartition(":")
    with open(file) as source:
        assert "the line that stops it" in source.read().splitlines()[int(line) - 1]
    assert capfd.readouterr() == ("", "")


def test_meta_tensors_are_refused() -> None:
    with torch.device("meta"):
        model = Conv().eval()
    with pytest.raises(CaptureError, match=r"conv\.weight is on the meta device"):
        capture(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(CaptureError, match="example input x has no values"):
        capture(Conv().eval(), torch.randn(1, 3, 8, 8, device="meta"))


def test_what_is_no_model_or_was_captured_is_refused() -> None:
    with pytest.raises(CaptureError, match="the model is a function"):
        capture(lambda x: x, torch.ones(1))  # type: ignore[arg-type]
    graph = capture_quietly(Conv().eval(), torch.randn(2, 3, 8, 8))
    assert is_captured(graph) and is_captured(nn.Sequential(graph)) and not is_captured(Conv())
    with pytest.raises(CaptureError, match=r"already captured or quantized by qfx \[layer 1\]"):
        capture(nn.Sequential(nn.ReLU(), graph), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"argument 'ids' is missing(.|\n)*call it as Tokens\(ids, mask=None\)"),
        ((torch.ones(1, 2, dtype=torch.long),) * 3, "3 positional arguments are too many"),
        ({"idz": torch.ones(1, 2, dtype=torch.long), "ids": 3}, "there is no argument 'idz'; did you mean 'ids'"),
        ({"ids": 3}, "example_inputs holds no tensor"),
        ({"ids": torch.ones(1, 2, dtype=torch.long), "mask": object()}, "argument mask is a object"),
        (3, "example_inputs is a int"),
        (torch.ones(2, 3), "Tokens itself fails on example_inputs"),
    ],
)
def test_examples_that_do_not_fit_are_refused(inputs: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture(Tokens().eval(), inputs)


class ReturnsObject(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        return x, Config()


def test_a_result_that_is_no_data_is_refused() -> None:
    with pytest.raises(UncapturableError, match=r"its result\[1\] is a Config"):
        capture(ReturnsObject().eval(), torch.ones(2, 3))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Conv().eval()
    model.generator = (i for i in range(3))
    with pytest.raises(CaptureError, match="Conv cannot be copied"):
        capture(model, torch.randn(1, 3, 8, 8))


def test_a_compiled_model_is_captured_as_what_it_wraps() -> None:
    model = Conv().eval()
    graph = capture_quietly(torch.compile(model), torch.randn(1, 3, 8, 8))
    assert type(graph).__name__ == "Conv" and hasattr(graph, "conv")
