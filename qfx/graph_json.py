"""A CONVERTED graph and how it is called, as values that JSON can say, and back; nothing of it is taken on trust.

What is read becomes names in Python code that torch.fx generates, so every name is held to be one: of nodes and inputs
identifiers, of tensors and layers dotted paths of words. Operators are those of :mod:`qfx.artifact_operators`. Example
values of nodes are not written: :mod:`qfx.dry_run` finds them anew.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx
from torch._ops import OpOverload

from qfx.artifact_operators import name_of_operator, operator_named
from qfx.calling import FAMILY, CallBinder, CallCodeGen, Parameter, TensorSpec, signature_of
from qfx.errors import ArtifactError
from qfx.json_values import DEPTH, DTYPES, Keys, NodeName, decode, encode, fields, listed, short, typed
from qfx.meta import NodeInfo, info, update
from qfx.structure import ClassRef, Constant, Container, Leaf, Structure, find_imported, paths

MOST_NODES = 50_000
_WORD = re.compile(r"[\w-]{1,200}")
_SIZE = re.compile(r"(?:(?!.*\*\*)(?:[su]\d{1,6}|\d{1,9}|[-+*/() ])+)")
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "_bind_call", "_build_result"})
_STRINGS = ("origin", "group", "reason")


# --- names ------------------------------------------------------------------------------------------------------------


def identifier(name: str, what: str) -> str:
    """``name``, which can stand for a value in generated code.

    Raises:
        ArtifactError: it cannot.
    """
    if not (name.isidentifier() and name.isascii() and len(name) <= 500) or keyword.iskeyword(name) or name in _TAKEN:
        raise ArtifactError(f"{what} cannot be called {short(name)}", hint="names are identifiers of Python")
    return name


def dotted(path: str, what: str) -> str:
    """``path``, which is words with dots between, as the paths of a module's tensors are.

    Raises:
        ArtifactError: it is not.
    """
    parts = path.split(".")
    if len(parts) > 64 or any(_WORD.fullmatch(part) is None or part.startswith("__") for part in parts):
        raise ArtifactError(
            f"{what} cannot be at {short(path)}", hint="paths are words of letters, digits, _ and -, with dots between"
        )
    return path


# --- nodes ------------------------------------------------------------------------------------------------------------


def write_nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    """All nodes in order.

    Raises:
        ArtifactError: a node cannot be written; the text names it and its layer.
    """
    return [_write_node(node) for node in graph.nodes]


def _write_node(node: fx.Node) -> dict[str, Any]:
    try:
        return {"op": node.op, "name": identifier(node.name, "a node"), **_WRITERS[node.op](node), **_write_info(node)}
    except ArtifactError as error:
        raise ArtifactError(f"node {node.name}: {error.what}", where=info(node).origin, hint=error.hint) from None
    except KeyError:
        raise ArtifactError(f"node {node.name}: a saved graph has no {node.op}", where=info(node).origin) from None


def _write_call(node: fx.Node) -> dict[str, Any]:
    name = name_of_operator(node.target)
    if name is None:
        raise ArtifactError(
            f"the operator {node.target} is not one that a file may name",
            hint="saved graphs call operators of ATen and qfx; leave out the pass that put it in, or spell it in those",
        )
    args = [encode(a, _name_of_node) for a in node.args]
    kwargs = {k: encode(v, _name_of_node) for k, v in node.kwargs.items()}
    return {"target": name, "args": args, **({"kwargs": kwargs} if kwargs else {})}


def _write_target(node: fx.Node) -> dict[str, Any]:
    return {"target": dotted(str(node.target), "a tensor")}


def _write_input(node: fx.Node) -> dict[str, Any]:
    target = identifier(str(node.target), "an input")
    return {"target": target} if target != node.name else {}


def _write_output(node: fx.Node) -> dict[str, Any]:
    (results,) = node.args
    if not isinstance(results, list | tuple):
        raise ArtifactError("the graph's results are no list")
    return {"args": [encode(r, _name_of_node) for r in results]}


_WRITERS: dict[str, Callable[[fx.Node], dict[str, Any]]] = {
    "placeholder": _write_input,
    "get_attr": _write_target,
    "call_function": _write_call,
    "output": _write_output,
}


def _name_of_node(value: Any) -> str | None:
    return value.name if isinstance(value, fx.Node) else None


def _write_info(node: fx.Node) -> dict[str, Any]:
    """What lowering and the report read of a node's info."""
    known = info(node)
    found: dict[str, Any] = {key: getattr(known, key) for key in (*_STRINGS, "bits") if getattr(known, key)}
    if known.origin:
        dotted(known.origin, "a layer")
    if known.fused:
        found["fused"] = list(known.fused)
    if known.sensitivity is not None:
        found["sensitivity"] = encode(known.sensitivity)
    return found


_INFO: Keys = {
    **dict.fromkeys(_STRINGS, (str,)),
    "bits": (int,),
    "fused": (list,),
    "sensitivity": (float, int, dict),
}
_NEEDED: Keys = {"op": (str,), "name": (str,)}
_MORE: Mapping[str, tuple[Keys, Keys]] = {
    "placeholder": ({}, {"target": (str,)}),
    "get_attr": ({"target": (str,)}, {}),
    "call_function": ({"target": (str,), "args": (list,)}, {"kwargs": (dict,)}),
    "output": ({"args": (list,)}, {}),
}


def read_nodes(values: Any) -> fx.Graph:
    """The graph of what :func:`write_nodes` wrote.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for value in listed(values, "the graph", dict, most=MOST_NODES):
        op = typed(value.get("op"), "the op of a node", str)
        if op not in _MORE:
            raise ArtifactError(f"a saved graph has no {short(op)}")
        needed, optional = _MORE[op]
        table = fields(value, "a node", {**_NEEDED, **needed}, {**optional, **_INFO})
        name = identifier(table["name"], "a node")
        if name in nodes or "output" in nodes:
            raise ArtifactError(f"node {name} is where it cannot be")
        try:
            node = _read_node(graph, op, name, table, nodes)
        except ArtifactError as error:
            raise ArtifactError(f"node {name}: {error.what}", where=table.get("origin", ""), hint=error.hint) from None
        if node.name != name:
            raise ArtifactError(f"a node cannot be called {short(name)}")
        nodes[name] = node
        _read_info(node, table)
    if "output" not in nodes:
        raise ArtifactError("the graph has no output")
    return graph


def _read_node(graph: fx.Graph, op: str, name: str, table: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    def node_of(ref: NodeName) -> fx.Node:
        if ref.name not in nodes:
            raise ArtifactError(f"it reads {short(ref.name)}, which no node before it is called")
        return nodes[ref.name]

    target = table.get("target", name)
    args = tuple(decode(a, "an argument", node_of) for a in table.get("args", ()))
    if op == "placeholder":
        return graph.create_node(op, identifier(target, "an input"), name=name)
    if op == "get_attr":
        return graph.create_node(op, dotted(target, "a tensor"), name=name)
    if op == "output":
        return graph.create_node(op, "output", (args,), name=name)
    function = operator_named(target)
    if function is None:
        raise ArtifactError(
            f"the operator {short(target)} is not one that a file may name", hint="a newer qfx may know it"
        )
    known = {a.name for a in function._schema.arguments} if isinstance(function, OpOverload) else set()
    kwargs = {_one_of(k, known): decode(v, k, node_of) for k, v in table.get("kwargs", {}).items()}
    return graph.create_node(op, function, args, kwargs, name=name)


def _one_of(name: str, known: Collection[str]) -> str:
    if name not in known or not name.isidentifier() or keyword.iskeyword(name):
        raise ArtifactError(f"its operator has no argument {short(name)}")
    return name


def _read_info(node: fx.Node, table: dict[str, Any]) -> None:
    changes: dict[str, Any] = {key: table[key] for key in (*_STRINGS, "bits") if key in table}
    if "origin" in changes:
        dotted(changes["origin"], "a layer")
    if "fused" in table:
        changes["fused"] = tuple(listed(table["fused"], "fused", str))
    if "sensitivity" in table:
        changes["sensitivity"] = decode(table["sensitivity"], "a sensitivity")
    if changes:
        assert changes.keys() <= NodeInfo.__dataclass_fields__.keys()
        update(node, **changes)


# --- how it is called -------------------------------------------------------------------------------------------------


def write_call(codegen: CallCodeGen) -> dict[str, Any]:
    """Signature, structures and sizes.

    Raises:
        ArtifactError: an argument or a default is an object that no file can say.
    """
    binder = codegen.binder
    return {
        "model": binder.model,
        "parameters": [_write_parameter(p) for p in binder.parameters],
        "arguments": _write_structure(binder.structure),
        "tensors": [
            {"path": t.path, "dtype": encode(t.dtype)["dtype"], "sizes": [_size(s) for s in t.sizes]}
            for t in binder.tensors
        ],
        "limits": dict(sorted(binder.limits.items())),
        "examples": dict(sorted(binder.examples.items())),
        "result": _write_structure(codegen.result),
    }


def _size(size: int | str) -> int | str:
    if isinstance(size, str) and (_SIZE.fullmatch(size) is None or len(size) > 60):
        raise ArtifactError(f"a size cannot be {short(size)}")
    return size


def _write_parameter(p: Parameter) -> dict[str, Any]:
    given = {"name": p.name, "kind": p.kind}
    try:
        return {**given, "default": encode(p.default)} if p.has_default else given
    except ArtifactError as error:
        raise ArtifactError(f"the default of argument {p.name!r}: {error.what}") from None


def _write_structure(structure: Structure, at: str = "") -> dict[str, Any]:
    if isinstance(structure, Leaf):
        return {"leaf": structure.index}
    if isinstance(structure, Constant):
        try:
            return {"constant": encode(structure.value)}
        except ArtifactError as error:
            raise ArtifactError(f"{at or 'an argument or result'}: {error.what}") from None
    children = [
        _write_structure(child, f"{at}[{key!r}]")
        for key, child in zip(structure.keys, structure.children, strict=True)
    ]
    found: dict[str, Any] = {"kind": structure.kind, "class": structure.cls.name, "children": children}
    if structure.keys != tuple(range(len(children))):
        found["keys"] = [encode(key) for key in structure.keys]
    if structure.kind == "dataclass":
        found["by_init"] = list(structure.context)
    return found


_CALL: Keys = {
    "model": (str,),
    "parameters": (list,),
    "arguments": (dict,),
    "tensors": (list,),
    "limits": (dict,),
    "examples": (dict,),
    "result": (dict,),
}


def read_call(value: Any) -> CallCodeGen:
    """What :func:`write_call` wrote. Classes of results are looked up among imported modules; none is imported.

    Raises:
        ArtifactError: it wrote no such thing.
    """
    table = fields(value, "the call", _CALL)
    parameters = tuple(_read_parameter(p) for p in listed(table["parameters"], "the parameters", dict))
    structure = _read_structure(table["arguments"], "the arguments")
    names = [p.name for p in parameters]
    if not isinstance(structure, Container) or structure.kind != "dict" or not set(structure.keys) <= set(names):
        raise ArtifactError("the arguments are not those of the parameters")
    tensors = tuple(_read_tensor(t) for t in listed(table["tensors"], "the tensors", dict))
    _check_leaves(structure, len(tensors), "the arguments")
    sizes = {s for t in tensors for s in t.sizes if isinstance(s, str)}
    numbers = {what: _read_numbers(table[what], f"the {what}") for what in ("limits", "examples")}
    if missing := sizes - numbers["examples"].keys():
        raise ArtifactError(f"there is no example of the size {short(min(missing))}")
    binder = CallBinder(
        table["model"], parameters, structure, tensors, numbers["limits"], examples=numbers["examples"]
    )
    try:
        signature_of(parameters)
    except ValueError as error:
        raise ArtifactError(f"the parameters are no signature: {error}") from None
    return CallCodeGen(binder, _read_structure(table["result"], "the result"))


def _check_leaves(structure: Structure, count: int, what: str) -> None:
    """Raise where the leaves are not the first ``count`` tensors in order."""
    found = [part.index for _, part in paths(structure) if isinstance(part, Leaf)]
    if found != list(range(count)):
        raise ArtifactError(f"{what} do not have {count} tensors in order")


def check_result(structure: Structure, count: int) -> None:
    """Raise ArtifactError where the result needs other values than the graph's ``count`` results."""
    _check_leaves(structure, count, "the results")


def _read_parameter(value: Any) -> Parameter:
    table = fields(value, "a parameter", {"name": (str,), "kind": (str,)}, {"default": tuple(_JSON)})
    if not table["name"].isidentifier():
        raise ArtifactError(f"a parameter cannot be called {short(table['name'])}")
    if table["kind"] not in _PARAMETER_KINDS:
        raise ArtifactError(f"a parameter cannot be {short(table['kind'])}")
    has_default = "default" in table
    return Parameter(table["name"], table["kind"], has_default, decode(table.get("default"), "a default"))


_JSON = (type(None), bool, int, float, str, list, dict)
_PARAMETER_KINDS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


def _read_tensor(value: Any) -> TensorSpec:
    table = fields(value, "a tensor", {"path": (str,), "dtype": (str,), "sizes": (list,)})
    if table["dtype"] not in DTYPES:
        raise ArtifactError(f"there is no dtype {short(table['dtype'])}")
    sizes = listed(table["sizes"], "the sizes of a tensor", int, str, most=64)
    if any(size < 0 for size in sizes if isinstance(size, int)):
        raise ArtifactError("a size is negative")
    return TensorSpec(table["path"], DTYPES[table["dtype"]], tuple(_size(s) for s in sizes))


def _read_numbers(value: Any, what: str) -> dict[str, int]:
    for size, number in value.items():
        _size(size)
        if typed(number, what, int) < 0:
            raise ArtifactError(f"{what} hold {number}")
    return dict(value)


def _read_structure(value: Any, what: str, depth: int = 0) -> Structure:
    if depth > DEPTH:
        raise ArtifactError(f"{what} are nested too deep")
    if set(value) == {"leaf"}:
        return Leaf(typed(value["leaf"], "a leaf", int))
    if set(value) == {"constant"}:
        return Constant(decode(value["constant"], "a constant"))
    needed: Keys = {"kind": (str,), "class": (str,), "children": (list,)}
    table = fields(value, what, needed, {"keys": (list,), "by_init": (list,)})
    kind, given = table["kind"], listed(table["children"], what, dict, most=MOST_NODES)
    if kind not in FAMILY:
        raise ArtifactError(f"there is no container {short(kind)}")
    children = tuple(_read_structure(child, what, depth + 1) for child in given)
    keys = tuple(_read_key(key, what) for key in table.get("keys", range(len(children))))
    if len(keys) != len(children) or len(set(keys)) != len(keys):
        raise ArtifactError(f"{what} do not have one key for each part")
    by_init = tuple(listed(table.get("by_init", []), "by_init", str))
    cls = ClassRef.named(table["class"], find_imported(table["class"], kind, keys, by_init))
    return Container(kind, cls, keys, children, by_init if kind == "dataclass" else None)


def _read_key(value: Any, what: str) -> Any:
    key = decode(value, what)
    try:
        hash(key)
    except TypeError:
        raise ArtifactError(f"{what} have a key {short(key)}") from None
    return key
