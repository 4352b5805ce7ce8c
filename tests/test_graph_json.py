"""Graphs, calls and values as JSON: what is written is read back, and names are held to be names."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import qfx
from qfx.artifact_operators import ATEN, PYTHON, name_of_operator, operator_named
from qfx.calling import codegen_of
from qfx.dry_run import dry_run
from qfx.errors import ArtifactError
from qfx.graph_json import dotted, identifier, read_call, read_nodes, write_call, write_nodes
from qfx.json_values import decode, dumps, encode, fields, listed, loads, typed
from qfx.meta import info, set_value, value
from qfx.models import MODELS_SMALL
from qfx.portable import portable, twin_of

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

# --- values -----------------------------------------------------------------------------------------------------------

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([torch.float32, torch.uint8, torch.strided, torch.channels_last, torch.device("cpu")]),
    st.complex_numbers(allow_nan=False),
    st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
    st.builds(range, st.integers(0, 9)),
)
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.lists(v, max_size=3).map(tuple), max_leaves=8)


@given(VALUES)
def test_values_come_back(value: Any) -> None:
    text = dumps(encode(value))
    text.encode("ascii")
    again = decode(loads(text), "it")
    assert repr(again) == repr(value) and type(again) is type(value)


@pytest.mark.parametrize("value", [object(), {"a": 1}, torch.ones(1), 2**63, torch.quint8, torch.device("cuda"), len])
def test_values_that_no_file_says_are_refused(value: Any) -> None:
    with pytest.raises(ArtifactError):
        encode(value)


WRONG = [
    *({"float": "1"}, {"dtype": "quint8"}, {"device": "cuda"}, {"layout": "sparse_coo"}, {"node": "x"}, {}, {"a": 1}),
    *({"tuple": 1}, {"slice": [1, 2, 3, 4]}, {"range": ["a"]}, {"complex": [[], 1]}, {"range": [0, 5, 0]}, 2**63),
]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_tables_that_say_nothing_are_refused(value: Any) -> None:
    with pytest.raises(ArtifactError):
        decode(value, "it")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a":1,"a":2}', "[" * 50_000, "", "{'a':1}", "1 2", "9" * 5000])
def test_text_that_is_no_strict_json_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError):
        loads(text)


def test_types_and_keys_are_exact() -> None:
    assert typed(1, "it", int) == 1 and listed([1, 2], "it", int) == [1, 2]
    assert fields({"a": 1}, "it", {"a": (int,)}, {"b": (str,)}) == {"a": 1}
    for wrong, most in (([1, "a"], 9), ([1, 2], 1), ([True], 9), (1, 9)):
        with pytest.raises(ArtifactError, match="it"):
            listed(wrong, "it", int, most=most)
    for table in ({}, {"a": "1"}, {"a": 1, "c": 2}, [1]):
        with pytest.raises(ArtifactError, match="it"):
            fields(table, "it", {"a": (int,)}, {"b": (str,)})


# --- names ------------------------------------------------------------------------------------------------------------


NO_NAMES = ["", "1x", "a b", "a.b", "a;b", "x: int", "class", "self", "_bind_call", "ﬁ", "a\n", "x" * 501]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError):
        identifier(name, "it")


NO_PATHS = ["", ".", "a.", "a..b", 'a"b', "a.'b", "a\\b", "a.__class__", "a b", "a\n", "a." * 70 + "b"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ArtifactError):
        dotted(path, "it")


@pytest.mark.parametrize("path", ["layer1.0.conv1.weight", "größe", "blocks.a-b", "_0_weight_scale"])
def test_paths_of_users_are_paths(path: str) -> None:
    assert dotted(path, "it") == path


# --- operators --------------------------------------------------------------------------------------------------------


def test_the_list_is_of_operators_that_there_are() -> None:
    for name in ATEN:
        packet = getattr(torch.ops.aten, name)
        names = [f"aten::{name}" + ("" if o == "default" else f".{o}") for o in packet.overloads()]
        assert any(operator_named(n) for n in names), name
    for name, function in PYTHON.items():
        assert name_of_operator(function) == name and operator_named(name) is function


def test_operators_are_found_by_the_names_they_have() -> None:
    aten = torch.ops.aten
    for target in (aten.conv2d.default, aten.add.Tensor, aten.relu_.default, qfx.ops.quantize):
        name = name_of_operator(target)
        assert name is not None and operator_named(name) is target


@pytest.mark.parametrize(
    "name",
    [
        *("aten::from_file", "aten::set_.source_Tensor", "aten::resize_", "aten::as_strided", "aten::empty_like"),
        *("aten::add.out", "aten::mul.left_t", "aten::pow.int", "aten::add.str", "aten::nonzero", "aten::item"),
        *("aten::_unsafe_index.Tensor", "aten::__iand__.Tensor", "qfx::fake_quantize", "prim::Print", "operator::pow"),
        *("builtins::eval", "os::system", "aten::", "", "relu", "aten::relu.__class__", "aten::Tensor.relu"),
    ],
)
def test_what_harms_or_is_unknown_is_not_on_the_list(name: str) -> None:
    assert operator_named(name) is None


def test_control_flow_and_foreign_functions_have_no_name() -> None:
    for target in (torch.cond, len, torch.ops.higher_order.cond, torch.relu, nn.functional.relu, pow):
        assert name_of_operator(target) is None


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["resnet20", "llama"])
def converted(request: pytest.FixtureRequest) -> Any:
    model, example = MODELS_SMALL[request.param](seed=0)
    return portable(qfx.quantize(model, example, verbose=False))


def test_graphs_come_back(converted: Any) -> None:
    values = json.loads(dumps(write_nodes(converted.graph)))
    graph = read_nodes(values)
    assert str(graph) == str(converted.graph)
    assert write_nodes(graph) == values
    for a, b in zip(graph.nodes, converted.graph.nodes, strict=True):
        known, found = info(b), info(a)
        assert (found.origin, found.fused, found.reason) == (known.origin, known.fused, known.reason)


def test_calls_come_back(converted: Any) -> None:
    codegen = codegen_of(converted)
    values = json.loads(dumps(write_call(codegen)))
    again = read_call(values)
    assert again.binder == codegen.binder and again.result == codegen.result
    assert write_call(again) == values


def test_a_dry_run_finds_the_values_that_capture_found(converted: Any) -> None:
    twin = twin_of(converted)
    for node in twin.graph.nodes:
        set_value(node, None)
    dry_run(twin)
    for node, captured in zip(twin.graph.nodes, converted.graph.nodes, strict=True):
        found, known = value(node), value(captured)
        if isinstance(found, torch.Tensor):
            sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in known.shape]
            assert found.is_meta and found.dtype == known.dtype and list(found.shape) == sizes, node


def _graph(*calls: tuple[Any, ...]) -> fx.Graph:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target, *args in calls:
        node = graph.call_function(target, (node, *args))
    graph.output((node,))
    return graph


def test_a_call_of_python_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"node relu.*not one that a file may name"):
        write_nodes(_graph((torch.relu,)))


def test_infinite_numbers_come_back() -> None:
    again = read_nodes(loads(dumps(write_nodes(_graph((torch.ops.aten.clamp.default, -math.inf, 1.0))))))
    assert next(n for n in again.nodes if n.op == "call_function").args[1] == -math.inf


BROKEN = [
    [],
    [{"op": "placeholder", "name": "x"}],
    [{"op": "call_module", "name": "x", "target": "a", "args": []}],
    [{"op": "output", "name": "output", "args": [{"node": "x"}]}],
    [{"op": "output", "name": "output", "args": []}, {"op": "placeholder", "name": "x"}],
    [{"op": "placeholder", "name": "x"}, {"op": "placeholder", "name": "x"}],
    [{"op": "placeholder", "name": "x", "args": [1]}],
]


@pytest.mark.parametrize("values", BROKEN)
def test_what_is_no_graph_is_refused(values: Any) -> None:
    with pytest.raises(ArtifactError):
        read_nodes(values)
