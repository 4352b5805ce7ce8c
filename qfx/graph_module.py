"""The GraphModule that qfx hands out: an ordinary one that keeps all it has.

``fx.GraphModule`` loses forward hooks and plain attributes when it is deep-copied, and ``meta`` too when it is pickled;
and it pickles by tracing its generated code anew, which turns every op without a tensor argument (``zeros``,
``arange``) into a constant. :class:`CapturedModule` carries everything over, pickles the graph as it is, and moves
device constants of the graph with the parameters.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.graph import PythonCode
from torch.fx.node import map_aggregate

import qfx.ops  # noqa: F401  a pickled graph names these operators
from qfx.calling import CallBinder, CallCodeGen, Parameter, signature_of
from qfx.inference import refuse_dtype
from qfx.meta import NodeInfo, info, update
from qfx.structure import Structure

_REMADE = ("_graph", "_code", "_lineno_map", "_prologue_start", "shape_env")
_KEPT_META = ("stack_trace", "nn_module_stack")


class CapturedModule(fx.GraphModule):
    """A graph that is called, copied, pickled and moved like the user's module."""

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, name: str) -> Self:
        """A graph over all that ``root`` holds; ``name`` becomes the name of its class."""
        new = cls.__new__(cls)
        _fill(new, {k: v for k, v in root.__dict__.items() if k not in _REMADE}, graph, name)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        state = copy.deepcopy(self._plain_state(), memo)
        graph = copy.deepcopy(self.graph, memo)
        _fill(new, state, graph, type(self).__name__)
        for hook in self._deepcopy_hooks:
            hook(new)
        return new

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        _fill(new, self._plain_state(), self.graph, type(self).__name__)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        codegen = self.graph._codegen
        call = (codegen.binder, codegen.result) if isinstance(codegen, CallCodeGen) else None
        return _load, (type(self).__name__, _pack(self.graph), call, self._plain_state())

    def recompile(self) -> PythonCode:
        code = super().recompile()
        codegen = self.graph._codegen
        if isinstance(codegen, CallCodeGen):  # what inspect.signature, and so torch.export, shall see
            parameters = (Parameter("self", "POSITIONAL_ONLY"), *codegen.binder.parameters)
            cast(Any, type(self).forward).__signature__ = signature_of(parameters)
        return code

    def recompile_later(self) -> None:
        """Recompile once the code is asked for: passes edit a graph a dozen times, and few of them run it."""
        cast(Any, type(self)).forward = _Later(weakref.ref(self))  # every GraphModule has a class of its own

    @property
    def code(self) -> str:
        assert callable(self.forward)  # which brings the code up to date
        return super().code

    def __str__(self) -> str:
        assert callable(self.forward)
        return super().__str__()

    def _plain_state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _REMADE}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        refuse_dtype(self, fn)
        moved = cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        changed = _move_devices(self.graph, fn)
        codegen = self.graph._codegen
        if isinstance(codegen, CallCodeGen):
            dtypes = {t.dtype: fn(torch.empty(0, dtype=t.dtype)).dtype for t in codegen.binder.tensors}
            if any(old != new for old, new in dtypes.items()):
                codegen.binder = codegen.binder.with_dtypes(dtypes)
                changed += 1
        if changed:
            self.recompile()
        for name in ("dtype", "device"):
            if name in self.__dict__:
                like = {name: self.__dict__[name]}
                self.__dict__[name] = getattr(fn(torch.empty(0, **like)), name)
        return moved


@dataclass(frozen=True)
class _Later:
    """Stands for a ``forward`` whose code is out of date: recompiling puts the new one into its place."""

    gm: weakref.ref[CapturedModule]

    def __get__(self, instance: CapturedModule | None, owner: type[CapturedModule]) -> Any:
        gm = self.gm()
        if gm is None:
            raise AttributeError("forward")
        gm.recompile()
        return (owner if instance is None else instance).forward


def _fill(gm: CapturedModule, state: dict[str, Any], graph: fx.Graph, name: str) -> None:
    root = nn.Module()
    root.__dict__.update(state)
    CapturedModule.__init__(gm, root, graph, name)
    gm.__dict__.update(state)


def _move_devices(graph: fx.Graph, fn: Callable[[Tensor], Tensor]) -> int:
    """Let every device that an op names follow the parameters; returns how many nodes changed."""
    found: dict[torch.device, torch.device] = {}

    def follow(arg: Any) -> Any:
        if not isinstance(arg, torch.device) or arg.type == "meta":
            return arg
        if arg not in found:
            found[arg] = fn(torch.empty(0, device=arg)).device
        return found[arg]

    changed = 0
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_aggregate(node.args, follow), map_aggregate(node.kwargs, follow)
            if args != node.args or kwargs != node.kwargs:
                node.args, node.kwargs = cast(Any, args), cast(Any, kwargs)
                changed += 1
    return changed


@dataclass(frozen=True)
class _NodeRef:
    """A node among pickled arguments, by its position in the graph."""

    index: int


@dataclass(frozen=True)
class _OpRef:
    """An operator by its qualified name, such as ``aten::add`` and ``Tensor``; torch's own objects do not pickle."""

    name: str
    overload: str = ""


@dataclass(frozen=True)
class _PackedNode:
    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]
    info: NodeInfo


def _pack(graph: fx.Graph) -> tuple[_PackedNode, ...]:
    position = {node: i for i, node in enumerate(graph.nodes)}

    def ref(arg: Any) -> Any:
        return _NodeRef(position[arg]) if isinstance(arg, fx.Node) else arg

    return tuple(
        _PackedNode(
            node.op,
            node.name,
            _pack_target(node.target),
            map_aggregate(node.args, ref),
            map_aggregate(node.kwargs, ref),
            {k: node.meta[k] for k in _KEPT_META if k in node.meta},
            info(node),
        )
        for node in graph.nodes
    )


def _pack_target(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return _OpRef(target._schema.name, target._overloadname)
    if isinstance(target, HigherOrderOperator):
        return _OpRef(f"higher_order::{target._name}")
    return target


def _unpack_target(target: Any) -> Any:
    if not isinstance(target, _OpRef):
        return target
    namespace, _, name = target.name.partition("::")
    found = getattr(getattr(torch.ops, namespace), name)
    return getattr(found, target.overload) if target.overload else found


def _unpack(packed: tuple[_PackedNode, ...]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def node_of(arg: Any) -> Any:
        return nodes[arg.index] if isinstance(arg, _NodeRef) else arg

    for p in packed:
        args, kwargs = cast(Any, map_aggregate(p.args, node_of)), cast(Any, map_aggregate(p.kwargs, node_of))
        node = graph.create_node(p.op, _unpack_target(p.target), args, kwargs, name=p.name)
        node.meta.update(p.meta)
        if p.info != NodeInfo():
            update(node, **{f: getattr(p.info, f) for f in NodeInfo.__dataclass_fields__})
        nodes.append(node)
    return graph


def _load(
    name: str, packed: tuple[_PackedNode, ...], call: tuple[CallBinder, Structure] | None, state: dict[str, Any]
) -> CapturedModule:
    graph = _unpack(packed)
    if call is not None:
        graph.set_codegen(CallCodeGen(*call))
    gm: CapturedModule = CapturedModule.__new__(CapturedModule)
    _fill(gm, state, graph, name)
    return gm
