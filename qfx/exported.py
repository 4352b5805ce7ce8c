"""From torch's ExportedProgram to a graph of qfx's own: the user's names, no guards, no assertions, nothing wrapped."""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import map_arg

from qfx.errors import CaptureError
from qfx.graph_module import CapturedModule
from qfx.origin import clean_path, source_line
from qfx.part import Part

_INLINED = {"wrap_with_set_grad_enabled": (1, 2), "wrap_with_autocast": (4, 5)}
"""Wrappers whose body becomes part of the graph: the positions of the body and of its first argument."""

_KEPT_META = ("val", "stack_trace")


def graph_module_of(
    program: ExportedProgram,
    user: nn.Module,
    prefix: str,
    names: Sequence[str],
    path: str = "",
    *,
    training: bool = False,
) -> CapturedModule:
    """A CapturedModule that shares its weights with ``user``; its inputs and outputs are flat.

    Args:
        program: what ``torch.export`` made of a wrapper that holds the user's model as its child ``prefix``.
        user: the model whose tensors the graph refers to, by their own names.
        names: the names that the placeholders shall bear.
        path: where ``user`` stands in a larger model: nodes say where they come from in terms of that.
        training: ``user`` is a copy that will be trained: the graph takes over its parameters themselves, so that what
            is tied stays tied, and stops gradients where the model does.

    Raises:
        CaptureError: the program holds an object that a graph cannot.
    """
    if any(_is_vmap(node.target) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytree classes
            program = program.run_decompositions({})  # traces anew, behind vmap; composite operators stay whole
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model changes {spec.target!r} while it runs under vmap")
    return _Builder(program, user, prefix, path, fx.Graph(), training).build(names)


def _is_vmap(target: Any) -> bool:
    """Whether the node opens or closes a level of ``torch.vmap``, which a graph cannot do by itself."""
    return str(getattr(target, "__module__", "")).startswith("torch._functorch")


@dataclass(frozen=True)
class _TensorRef:
    """A parameter, buffer or constant under all its names; the node that uses it decides which one is told."""

    names: tuple[str, ...]
    tensor: Tensor
    persistent: bool
    val: Any


@dataclass
class _Builder:
    program: ExportedProgram
    user: nn.Module
    prefix: str
    path: str
    graph: fx.Graph
    training: bool
    root: nn.Module = field(default_factory=nn.Module)
    used: dict[int, _TensorRef] = field(default_factory=dict)
    attributes: dict[str, fx.Node] = field(default_factory=dict)

    def build(self, names: Sequence[str]) -> CapturedModule:
        refs = self._references()
        env: dict[fx.Node, Any] = {}
        free = iter(names)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                env[node] = refs[node.name] if node.name in refs else self._placeholder(node, next(free))
        output = self._copy(self.program.graph_module, env)
        self.graph.output(tuple(output))
        _drop_unused_symbols(self.graph)
        written = _written(self.graph)
        _drop_fresh_copies(self.graph, written)
        targets = {node.target for node in written if node.op == "get_attr"}
        for ref in self.used.values():
            _register(self.root, ref, clone=not targets.isdisjoint(ref.names), itself=self.training)
        self.root.eval()
        return CapturedModule.of(self.root, self.graph, type(self.user).__name__)

    def _references(self) -> dict[str, _TensorRef]:
        """What each placeholder that is no input of the user's stands for."""
        same = _aliases(self.user)
        values = {n.name: n.meta.get("val") for n in self.program.graph.nodes if n.op == "placeholder"}
        refs: dict[str, _TensorRef] = {}
        constants = 0
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                continue
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise CaptureError(
                    f"the graph needs {spec.target!r}, which is a {spec.kind.name.lower()} and no tensor"
                )
            own = str(spec.target).removeprefix(self.prefix + ".")
            tensor = _tensor_at(self.user, own) if own != spec.target else None
            persistent = spec.kind is not InputKind.BUFFER or bool(spec.persistent)
            if tensor is None:
                found = self.program.constants[str(spec.target)]
                assert isinstance(found, Tensor)
                own, tensor, constants = f"_constant_{constants}", found, constants + 1
            if spec.kind is InputKind.CONSTANT_TENSOR:
                persistent = False
            aliases = same.get(id(tensor), (own,))
            refs[spec.arg.name] = _TensorRef(aliases, tensor, persistent, values[spec.arg.name])
        return refs

    def _placeholder(self, node: fx.Node, name: str) -> fx.Node:
        new = self.graph.placeholder(name)
        new.meta["val"] = node.meta.get("val")
        return new

    def _copy(self, source: fx.GraphModule, env: dict[fx.Node, Any]) -> Sequence[Any]:
        """Append the nodes of ``source``; returns what it outputs, in terms of the new graph."""
        for node in source.graph.nodes:
            if node.op == "output":
                return [self._resolve(arg, env, node) for arg in node.args[0]]
            if node.op == "get_attr":
                env[node] = getattr(source, node.target)
                if not isinstance(env[node], (Tensor, nn.Module)):
                    raise CaptureError(f"the graph holds a {type(env[node]).__name__}", source=source_line(node))
            elif node.op == "call_function" and not _is_assertion(node.target):
                env[node] = self._call(source, node, env)
        raise CaptureError("the exported graph has no output")

    def _call(self, source: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        inlined = _INLINED.get(getattr(node.target, "_name", ""))
        given: Sequence[Any] = node.args
        if inlined and not _autocasts(node):
            body, first = env[given[inlined[0]]], given[inlined[1] :]
            inner = [n for n in body.graph.nodes if n.op == "placeholder"]
            made = self._copy(body, {n: env.get(a, a) for n, a in zip(inner, first, strict=True)})
            stops = self.training and given[0] is False and "set_grad" in node.target._name  # type: ignore[union-attr]
            return [self._detached(r, node) for r in made] if stops else made
        if node.target is operator.getitem and isinstance(results := env.get(given[0]), list):
            return results[given[1]]
        if node.target is torch.ops.aten.detach_.default:
            source = self._resolve(node.args[0], env, node)
            return self._detached(source, node) if self.training else source  # nothing to cut in inference
        args = map_arg(node.args, lambda n: self._resolve(n, env, node))
        kwargs = map_arg(node.kwargs, lambda n: self._resolve(n, env, node))
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta.update(self._meta(node))
        return new

    def _detached(self, source: Any, like: fx.Node) -> Any:
        val = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(val, Tensor) or not val.is_floating_point():
            return source
        new = self.graph.create_node("call_function", torch.ops.aten.detach.default, (source,), {})
        new.meta.update({**self._meta(like), "val": val})
        return new

    def _resolve(self, arg: Any, env: dict[fx.Node, Any], user: fx.Node) -> Any:
        found = env.get(arg, arg) if isinstance(arg, fx.Node) else arg
        if isinstance(found, _TensorRef):
            return self._attribute(found, user)
        if isinstance(found, nn.Module):  # the body of a control-flow operator
            return self._body(found, user)
        return found

    def _attribute(self, ref: _TensorRef, user: fx.Node) -> fx.Node:
        meta = self._meta(user)
        stack = list(meta["nn_module_stack"].values())
        owner = clean_path(stack[-1][0]) if stack else ""
        owner = owner.removeprefix(self.path).removeprefix(".")
        name = next((n for n in ref.names if n.rpartition(".")[0] == owner), ref.names[0])
        if name not in self.attributes:
            new = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            new.meta.update({**meta, "val": ref.val})
            self.attributes[name] = new
            self.used[id(ref.tensor)] = ref
        return self.attributes[name]

    def _body(self, module: nn.Module, user: fx.Node) -> fx.Node:
        known = next((n for n, m in self.root.named_children() if m is module), None)
        name = known or f"_body_{len(list(self.root.children()))}"
        if name not in self.attributes:
            self.root.add_module(name, module)
            self.attributes[name] = self.graph.create_node("get_attr", name, name=name)
            self.attributes[name].meta.update({k: v for k, v in self._meta(user).items() if k != "val"})
        return self.attributes[name]

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        meta = {k: node.meta[k] for k in _KEPT_META if node.meta.get(k) is not None}
        stack = node.meta.get("nn_module_stack") or {}
        own = {key: (path, kind) for key, (path, kind) in stack.items() if _is_within(path, self.prefix)}
        meta["nn_module_stack"] = {key: (self._told(path), kind) for key, (path, kind) in own.items()}
        return meta

    def _told(self, path: str) -> str:
        """The path inside the wrapper as one of the whole model."""
        own = path.removeprefix(self.prefix).removeprefix(".")
        return f"{self.path}.{own}" if self.path and own else self.path or own


def _is_within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _autocasts(node: fx.Node) -> bool:
    """Whether the wrapper switches automatic mixed precision on; its body must then stay wrapped."""
    return getattr(node.target, "_name", "") == "wrap_with_autocast" and node.args[2] is not False


def _is_assertion(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return target._schema.name.startswith(("aten::_assert", "aten::sym_constrain", "aten::_functional_assert"))
    return getattr(target, "__name__", "").startswith("_check") and getattr(target, "__module__", "") == "torch"


def _drop_unused_symbols(graph: fx.Graph) -> None:
    """Sizes that only assertions read."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _is_symbolic(node):
            graph.erase_node(node)


def _is_symbolic(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        return node.target._schema.name in ("aten::sym_size", "aten::sym_stride", "aten::sym_numel")
    module, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "")
    return module in ("_operator", "math") or (module == "torch" and name.startswith("sym_"))


def _aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter and buffer, by the tensor's identity."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found[id(tensor)].append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[id(buffer)].append(name)
    return {key: tuple(names) for key, names in found.items()}


def _tensor_at(model: nn.Module, path: str) -> Tensor | None:
    owner: Any = model
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, Tensor) else None


def _drop_fresh_copies(graph: fx.Graph, written: set[fx.Node]) -> None:
    """Tensors made in the model's Python code arrive as fresh copies of constants; they are needed where it writes."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.lift_fresh_copy.default and node not in written:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory the graph writes to after they are made."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            for position, argument in enumerate(node.target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write and position < len(node.args):
                    found.update(_roots(node.args[position]))
    return found


_MAY_ALIAS = frozenset({"aten::reshape", "aten::contiguous", "aten::to", "aten::flatten", "aten::type_as"})


def _roots(arg: Any) -> list[fx.Node]:
    """The nodes whose memory ``arg`` may be a view of."""
    if isinstance(arg, (list, tuple)):
        return [root for item in arg for root in _roots(item)]
    if not isinstance(arg, fx.Node):
        return []
    if arg.op == "call_function" and arg.args and _may_alias(arg.target):
        return _roots(arg.args[0])
    return [arg]


def _may_alias(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload):
        return False
    schema = target._schema
    return schema.name in _MAY_ALIAS or any(r.alias_info is not None for r in schema.returns)


def _register(root: nn.Module, ref: _TensorRef, *, clone: bool, itself: bool) -> None:
    """Put the tensor under all its names: ``itself``, or one of its own that shares the user's memory."""
    shared = ref.tensor.detach().clone() if clone else ref.tensor.detach()
    is_parameter = isinstance(ref.tensor, nn.Parameter)
    held: Tensor = nn.Parameter(shared, requires_grad=ref.tensor.requires_grad) if is_parameter else shared
    held = ref.tensor if itself else held
    for path in ref.names:
        *parents, name = path.split(".")
        owner = root
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, Part())
            owner = owner.get_submodule(part)
        if isinstance(held, nn.Parameter):
            owner.register_parameter(name, held)
        else:
            owner.register_buffer(name, held, persistent=ref.persistent)
