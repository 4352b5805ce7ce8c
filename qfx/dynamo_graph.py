"""What dynamo hands to a backend: a graph of torch functions whose parameters are inputs, and the module made of it.

Dynamo wipes what it knows of the inputs after the backend's call: :class:`Received` keeps what is needed of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim
from torch.fx.traceback import preserve_node_meta

from qfx.dynamo_names import Names, in_a_module, place_of, source_name
from qfx.dynamo_outline import Outline, outline_of
from qfx.errors import UnsupportedError
from qfx.origin import source_line
from qfx.part import Part


@dataclass(frozen=True)
class Constant:
    """A tensor of the user's modules: its position among the graph's inputs, and its place as dynamo saw it."""

    position: int
    place: tuple[str, str]
    is_parameter: bool


@dataclass(frozen=True)
class Input:
    """A tensor of the call, and which of its dimensions are free."""

    position: int
    free: frozenset[int]


@dataclass(frozen=True)
class Received:
    """One graph of dynamo's.

    ``sizes``: for each number among the inputs that is a tensor's size, which of ``inputs`` and which dimension.
    ``float_``: why the graph stays float whatever it is called with, or "". ``where``: the user's first line in it, "?"
    where it has none.
    """

    gm: fx.GraphModule
    constants: tuple[Constant, ...]
    inputs: tuple[Input, ...]
    sizes: Mapping[int, tuple[int, int]]
    outline: Outline
    float_: str
    where: str

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Received:
        """To be called while dynamo compiles."""
        placeholders = _placeholders(gm)
        constants: list[Constant] = []
        inputs: list[Input] = []
        numbers: dict[int, fx.Node] = {}
        for i, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
            is_parameter = isinstance(example, nn.Parameter)
            if not isinstance(example, Tensor):
                numbers[i] = node
            elif is_parameter or in_a_module(node):
                constants.append(Constant(i, place_of(source_name(node)), is_parameter))
            else:
                shape = node.meta["example_value"].shape
                inputs.append(Input(i, frozenset(d for d, size in enumerate(shape) if _symbol(size) is not None)))
        sizes = _sizes(placeholders, inputs, numbers)
        varying = [source_name(node) for i, node in numbers.items() if i not in sizes and node.users]
        return cls(
            gm,
            tuple(constants),
            tuple(inputs),
            sizes,
            outline_of(gm, {placeholders[c.position] for c in constants}),
            _why_float(gm) or (f"it takes {varying[0]}, a number that varies" if varying else ""),
            next((line for n in gm.graph.nodes if n.op != "placeholder" and (line := source_line(n))), "?"),
        )

    def dynamic_shapes(self) -> dict[str, Any]:
        """What is free for dynamo, as ``torch.export.export`` takes it, for :meth:`module`."""
        return {"args": tuple(dict.fromkeys(sorted(i.free), Dim.AUTO) for i in self.inputs)}

    def module(self, tensors: Sequence[Tensor], user: nn.Module | None) -> nn.Module:
        """A module in eval mode that holds ``tensors``, the values of ``constants``, and takes ``inputs``.

        Args:
            user: the model that was compiled, where it is known: layers and weights bear its names.

        Raises:
            UnsupportedError: two tensors have one name.
        """
        names = Names.of([c.place for c in self.constants], tensors, user)
        module = _RegionModule.called(type(user).__name__ if user is not None else _title(self.gm))
        held = {c.position: names.tensor(*c.place) for c in self.constants}
        tied = names.tied(tensors, tuple(held.values()))
        own = {id(t): _outside_inference_mode(t) for t in tensors}
        for name, tensor in (*zip(held.values(), tensors, strict=True), *tied):
            _hold(module, name, own[id(tensor)])
        module._graph = self._graph(module, held, names)
        return module

    def _graph(self, module: _RegionModule, held: Mapping[int, str], names: Names) -> fx.Graph:
        """The graph with ``get_attr`` for what the module holds, and with sizes that are read from the tensors."""
        graph = fx.Graph()
        placeholders = _placeholders(self.gm)
        taken = [placeholders[given.position] for given in self.inputs]
        env = {node: graph.placeholder(node.name) for node in taken}
        for position, name in held.items():
            env[placeholders[position]] = graph.get_attr(name)
        for position, (which, dim) in self.sizes.items():
            env[placeholders[position]] = graph.call_method("size", (env[taken[which]], dim))
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op in ("get_attr", "call_module"):
                _take_over(self.gm, str(node.target).partition(".")[0], module)
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = _kept_meta(node, names, type(module))
        return graph


class _RegionModule(nn.Module):
    """Runs a graph of torch functions; while it is traced, each node's layer and source line go into the trace."""

    _graph: fx.Graph

    @classmethod
    def called(cls, name: str) -> _RegionModule:
        """One whose class bears the name, which reports show."""
        made = cast(_RegionModule, type(name, (cls,), {})())
        made.training = False
        return made

    def forward(self, *args: Tensor) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(self, graph=self._graph).run(*args)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


# --- sizes ------------------------------------------------------------------------------------------------------------


def _symbol(size: Any) -> Any:
    """The symbolic expression of a size; None for a plain number."""
    expression = getattr(getattr(size, "node", None), "expr", None)
    return None if expression is None or expression.is_number else expression


def _sizes(
    placeholders: Sequence[fx.Node], inputs: Sequence[Input], numbers: Mapping[int, fx.Node]
) -> dict[int, tuple[int, int]]:
    known: dict[Any, tuple[int, int]] = {}
    for i, given in enumerate(inputs):
        shape = placeholders[given.position].meta["example_value"].shape
        for dim in sorted(given.free):
            known.setdefault(_symbol(shape[dim]), (i, dim))
    found = {i: known.get(_symbol(node.meta.get("example_value"))) for i, node in numbers.items()}
    return {i: at for i, at in found.items() if at is not None}


# --- what says float --------------------------------------------------------------------------------------------------


_TRAINING: dict[str, tuple[int, str]] = {
    "batch_norm": (5, "training"),
    "rrelu": (3, "training"),
    "scaled_dot_product_attention": (4, "dropout_p"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (6, "train")),
    **dict.fromkeys(
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"), (2, "training")
    ),
}
"""Functions that are told whether they train: the position and the name of that argument."""


def _why_float(gm: fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        if node.op == "call_function" and _trains(node):
            line = source_line(node)
            return f"{node.target.__name__} is in training mode" + (f" at {line}" if line else "")
        if isinstance(node.target, OpOverload) and node.target.namespace == "qfx":
            return "it is quantized already"
    outputs = [n.meta.get("example_value") for n in gm.graph.output_node().all_input_nodes]
    if any(isinstance(value, Tensor) and value.requires_grad for value in outputs):
        return "gradients are recorded, and integers have none; call it under torch.no_grad()"
    return ""


def _trains(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if name not in _TRAINING:
        return False
    position, keyword = _TRAINING[name]
    given: dict[int | str, Any] = dict(enumerate(node.args))
    given.update(node.kwargs)
    if name == "batch_norm" and given.get(1, given.get("running_mean")) is None:
        return False  # it keeps no statistics: in eval mode it does the same
    return bool(given.get(position, given.get(keyword, _default(node.target, keyword))))


def _default(function: Any, keyword: str) -> Any:
    try:
        return inspect.signature(function).parameters[keyword].default
    except (KeyError, TypeError, ValueError):  # no such parameter; a function without a signature
        return False


# --- the module -------------------------------------------------------------------------------------------------------


_ROOT = "model"  # what capture calls the module that it exports: the paths of its layers begin so


def _kept_meta(node: fx.Node, names: Names, kind: type[nn.Module]) -> dict[str, Any]:
    """The node's source line and layers, in the user's terms."""
    kept: dict[str, Any] = {k: node.meta[k] for k in ("stack_trace",) if node.meta.get(k)}
    stack = {"": (_ROOT, kind)}
    if names.home:
        stack["home"] = (f"{_ROOT}.{names.home}", kind)
    for key, (source, cls) in (node.meta.get("nn_module_stack") or {}).items():
        stack[key] = (f"{_ROOT}.{names.layer(source)}".removesuffix("."), cls)
    return {**kept, "nn_module_stack": stack}


def _title(gm: fx.GraphModule) -> str:
    """The class of the first module that the graph runs."""
    stacks = [stack for n in gm.graph.nodes if (stack := n.meta.get("nn_module_stack"))]
    first = next(iter(stacks[0].values()))[1] if stacks else None
    return first.__name__ if isinstance(first, type) else "Region"


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which no other mode may do much with."""
    if not tensor.is_inference():
        return tensor
    copy = tensor.clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _hold(module: nn.Module, path: str, tensor: Tensor) -> None:
    *parents, name = path.split(".")
    owner = module
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, Part().eval())
        owner = owner.get_submodule(part)
    if name in owner._parameters or name in owner._buffers:
        raise UnsupportedError(f"two tensors of the region are called {path}")
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor, persistent=False)


def _take_over(gm: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Let the module hold what the graph finds in ``gm`` itself: bodies of control flow, constants."""
    if not hasattr(module, name):
        setattr(module, name, getattr(gm, name))
