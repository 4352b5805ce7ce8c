"""A captured graph is called like the model: its signature, its results, its errors; and all of it survives."""

from __future__ import annotations

import copy
import inspect
import io
import multiprocessing
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from qfx.calling import codegen_of, flat_inputs
from qfx.capture import capture
from qfx.errors import CaptureError
from qfx.examples import Example
from qfx.graph_module import CapturedModule
from qfx.meta import graph_info, info, update
from qfx.origin import layer_path
from qfx.structure import ClassMissingWarning, flatten, rebuild

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None
    rows: int = field(init=False, default=0)


@dataclass
class Record(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a dataclass that is a dict of its fields that are not None."""

    logits: Tensor | None = None
    states: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "states"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Model(nn.Module):
    """Every kind of argument, and results of every kind."""

    kind = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.num_labels = 4
        self.config = {"hidden": [4, 4]}
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.kept_tensors = [torch.ones(1)]

    @property
    def dtype(self) -> torch.dtype:
        return self.lin.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lin.weight.device

    def forward(
        self,
        x: Tensor,
        batch: dict[str, Any] | None = None,
        *more: Tensor,
        flag: bool = True,
        scale: float = 2.0,
        **extra: Tensor,
    ) -> dict[str, Any]:
        y = self.act(self.lin(x)) * (scale if flag else 1.0)
        if batch is not None:
            y = y + batch["bias"] * batch["parts"][0]
        for term in more:
            y = y + term
        for name in sorted(extra):
            y = y - extra[name]
        made = Output(y, (x, y + 1))
        made.rows = x.shape[0]
        record = Record(logits=y * 3)
        return {"output": made, "pair": Pair(y, [None, "text", x.shape[0]]), "record": record}


def arguments(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    make = lambda: torch.randn(batch, 4)  # noqa: E731
    nested = {"bias": make(), "parts": [make(), 7]}
    return (make(), nested, make(), make()), {"scale": 3.0, "extra_term": make()}


@pytest.fixture
def pair() -> tuple[Model, fx.GraphModule]:
    user = Model().eval()
    args, kwargs = arguments(2)
    return user, capture(user, Example(args, kwargs))


def assert_same(want: Any, got: Any) -> None:
    flat_want, structure_want = flatten(want)
    flat_got, structure_got = flatten(got)
    assert structure_want == structure_got
    for a, b in zip(flat_want, flat_got, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def in_worker(data: bytes, args: Any, kwargs: Any, queue: Any) -> None:
    with torch.no_grad():
        queue.put(pickle.dumps(pickle.loads(data)(*args, **kwargs)))


def saved_and_loaded(graph: fx.GraphModule) -> Any:
    buffer = io.BytesIO()
    torch.save(graph, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def edited(graph: fx.GraphModule) -> fx.GraphModule:
    relu = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.clamp_min.default
    relu.args = (relu.args[0], 0.0)
    graph.graph.lint()
    graph.recompile()
    return graph


SURVIVES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda g: g,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "torch.save": saved_and_loaded,
    "both": lambda g: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(g)))),
    "edited": edited,
    "compile": lambda g: torch.compile(g, fullgraph=True, backend="eager"),
}


@pytest.mark.parametrize("how", SURVIVES)
def test_it_is_called_like_the_model(how: str, pair: tuple[Model, fx.GraphModule]) -> None:
    user, graph = pair
    made = SURVIVES[how](graph)
    for batch in (1, 3):
        args, kwargs = arguments(batch)
        with torch.no_grad():
            assert_same(user(*args, **kwargs), made(*args, **kwargs))
            assert_same(
                user(args[0], args[1], *args[2:], **kwargs, flag=True),
                made(args[0], args[1], *args[2:], **kwargs, flag=True),
            )
    result = made(*args, **kwargs)
    assert type(result["output"]) is Output and type(result["record"]) is Record and type(result["pair"]) is Pair
    assert result["record"].states is None and result["output"].rows == 3


@pytest.mark.parametrize("how", [k for k in SURVIVES if k != "compile"])
def test_attributes_hooks_and_notes_are_kept(how: str, pair: tuple[Model, fx.GraphModule]) -> None:
    _, graph = pair
    update(graph.graph.output_node(), reason="kept")
    graph.register_forward_hook(Count())
    made = SURVIVES[how](graph)
    made(*arguments(2)[0], **arguments(2)[1])
    assert (made.num_labels, made.kind, made.config) == (4, "toy", {"hidden": [4, 4]})
    assert made.dtype is torch.float32 and made.device == torch.device("cpu")
    assert not hasattr(made, "act") and not hasattr(made, "kept_tensors")
    assert isinstance(made, CapturedModule) and type(made).__name__ == "Model" and not made.training
    assert graph_info(made).stage == "CAPTURED" and info(made.graph.output_node()).reason == "kept"
    assert next(iter(made._forward_hooks.values())).calls == 1
    assert [layer_path(n) for n in made.graph.nodes if "linear" in n.name] == ["lin"]
    if how not in ("itself", "edited", "copy"):
        assert made.config is not graph.config
        assert made.lin.weight is not graph.lin.weight


class Count:
    calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1


def test_a_worker_process_can_call_it(pair: tuple[Model, fx.GraphModule]) -> None:
    user, graph = pair
    args, kwargs = arguments(3)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_worker, args=(pickle.dumps(graph), args, kwargs, queue))
    process.start()
    got = pickle.loads(queue.get(timeout=120))
    process.join()
    with torch.no_grad():
        assert_same(user(*args, **kwargs), got)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, flag: bool = True, *, z: Tensor) -> dict[str, Tensor]:
        return {"out": self.lin(x) - z}


def test_it_can_be_exported_again_with_keywords_and_free_sizes() -> None:
    user = TwoInputs().eval()
    graph = capture(user, {"x": torch.randn(2, 4), "z": torch.randn(2, 4)})
    x, z = torch.randn(2, 4), torch.randn(2, 4)
    free = {0: Dim.AUTO}
    program = torch.export.export(graph, (x,), {"z": z}, dynamic_shapes={"x": free, "z": free})
    x, z = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(program.module()(x, z=z)["out"], user(x, z=z)["out"])


def test_inside_another_module_it_can_be_exported_and_compiled() -> None:
    outer = nn.Sequential(nn.Linear(4, 4), capture(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)))
    x = torch.randn(2, 4)
    want = outer(x)
    assert torch.allclose(torch.export.export(outer, (x,)).module()(x), want)
    assert torch.allclose(torch.compile(outer, fullgraph=True, backend="eager")(x), want)


def test_inductor_compiles_it() -> None:
    graph = capture(TwoInputs().eval(), {"x": torch.randn(2, 4), "z": torch.randn(2, 4)})
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x, z = torch.randn(batch, 4), torch.randn(batch, 4)
        assert torch.allclose(compiled(x, z=z)["out"], graph(x, z=z)["out"])


def test_an_interpreter_takes_flat_tensors(pair: tuple[Model, fx.GraphModule]) -> None:
    user, graph = pair
    args, kwargs = arguments(3)
    flat = flat_inputs(graph, args, kwargs)
    assert len(flat) == 6 == len([n for n in graph.graph.nodes if n.op == "placeholder"])
    with torch.no_grad():
        assert_same(user(*args, **kwargs), fx.Interpreter(graph).run(*flat))
        raw = fx.Interpreter(graph).run(*flat, enable_io_processing=False)
    assert isinstance(raw, tuple)
    with pytest.raises(CaptureError, match="takes 6 tensors; it is given 1"):
        fx.Interpreter(graph).run(flat[0])


def test_placeholders_are_in_the_order_and_by_the_names_of_the_signature(pair: tuple[Model, fx.GraphModule]) -> None:
    _, graph = pair
    assert [n.target for n in graph.graph.nodes if n.op == "placeholder"] == [
        "x",
        "batch_bias",
        "batch_parts_0",
        "more_0",
        "more_1",
        "extra_extra_term",
    ]
    assert str(inspect.signature(graph.forward)) == "(x, batch=None, *more, flag=True, scale=2.0, **extra)"


def change(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments(2)
    by_position = {"x": 0, "batch": 1}
    positional = list(args)
    for name, new in changes.items():
        if name in by_position:
            positional[by_position[name]] = new
        else:
            kwargs[name] = new
    return tuple(positional), kwargs


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scale": 2.5}, "argument scale should be 3.0, which is part of the captured graph; it is 2.5"),
        ({"scale": 3}, "argument scale should be 3.0"),
        ({"flag": False}, "argument flag should be True"),
        ({"x": None}, r"argument x should be float32\[any, 4\]; it is None"),
        ({"x": torch.randn(2, 4, 1)}, r"argument x should be float32\[any, 4\]; it is float32\[2, 4, 1\]"),
        ({"x": torch.randn(2, 4).double()}, r"it is float64\[2, 4\](.|\n)*convert it: \.to\(torch\.float32\)"),
        ({"x": torch.randn(2, 5)}, r"float32\[2, 5\](.|\n)*dynamic_shapes=\{'x': \{1: torch\.export\.Dim\.AUTO\}\}"),
        ({"x": torch.randn(3, 4)}, r"argument batch\['bias'\] should be 3 in dimension 0, as x\.shape\[0\]"),
        ({"batch": {"bias": torch.randn(2, 4)}}, r"argument batch should be a dict with keys \['bias', 'parts'\]"),
        ({"batch": None}, "argument batch should be a dict of 2; it is None"),
        ({"other": torch.randn(2, 4)}, r"argument extra should be a dict with keys \['extra_term'\]"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(
    changes: dict[str, Any], text: str, pair: tuple[Model, fx.GraphModule]
) -> None:
    args, kwargs = change(**changes)
    with pytest.raises(CaptureError, match=text) as caught:
        pair[1](*args, **kwargs)
    assert str(caught.value).startswith("Model: ") and "way out" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"z": 1}, "argument 'x' is missing"),
        ((1,), {}, "argument 'z' is missing"),
        ((1,), {"x": 1, "z": 1}, "argument 'x' is given twice"),
        ((1, 2, True, 4), {"z": 1}, "4 positional arguments are too many"),
        ((1,), {"z": 1, "flagg": True}, "there is no argument 'flagg'; did you mean 'flag'"),
    ],
)
def test_a_call_against_the_signature_is_refused(args: Any, kwargs: Any, text: str) -> None:
    graph = capture(TwoInputs().eval(), {"x": torch.randn(2, 4), "z": torch.randn(2, 4)})
    with pytest.raises(CaptureError, match=text) as caught:
        graph(*args, **kwargs)
    assert "call it as TwoInputs(x, y=None, flag=True, *, z)" in str(caught.value)


def test_lists_and_tuples_and_mappings_of_any_order_stand_for_one_another(pair: tuple[Model, fx.GraphModule]) -> None:
    user, graph = pair
    (x, nested, *more), kwargs = arguments(2)
    other = OrderedDict(parts=tuple(nested["parts"]), bias=nested["bias"])
    assert_same(user(x, nested, *more, **kwargs), graph(x, other, *more, **kwargs))


def test_a_missing_class_becomes_a_dict_with_a_warning() -> None:
    structure = flatten(Output(torch.ones(1)))[1]
    data = pickle.dumps(structure).replace(b":Output", b":Outpux")
    with pytest.warns(ClassMissingWarning, match="Outpux cannot be imported"):
        loaded = pickle.loads(data)
    assert rebuild(loaded, [torch.ones(1)])["logits"].tolist() == [1.0]


def test_ops_without_tensor_arguments_stay_ops_when_pickled() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(3)
            total.add_(x.sum())
            return total

    graph = pickle.loads(pickle.dumps(capture(Counts().eval(), torch.ones(2, 3))))
    x = torch.ones(2, 3)
    assert graph(x).tolist() == graph(x).tolist() == [6.0] * 3


def test_what_was_not_captured_is_no_captured_graph() -> None:
    with pytest.raises(CaptureError, match="Linear is no captured graph"):
        codegen_of(nn.Linear(1, 1))
