"""Writes the nodes of a region, one after the other, into a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx.attributes import get_tensor
from qfx.targets.native.choice import Choice, Vary
from qfx.targets.native.copies import copy
from qfx.targets.native.isa import Isa
from qfx.targets.native.join_places import place_in_join
from qfx.targets.native.not_native import NotNative, writing
from qfx.targets.native.program import ELEMENTS, Program, Step
from qfx.targets.native.shapes import Sizes
from qfx.targets.native.views import BATCH, Border, Element, View

Emit = Callable[["Emitter", fx.Node], None]
Needs = Callable[["Emitter", fx.Node], Mapping[fx.Node, Border]]


@dataclass(frozen=True)
class Operator:
    """How an operator gets into a program.

    ``refusal``: why a node has no native form, or None. ``needs``: the borders that it reads around its inputs.
    ``by_row``: it knows of rows of all samples in one dimension (:attr:`Sizes.joined`): it counts no dimension from the
    first, or finds it by :meth:`Sizes.axes`.
    """

    refusal: Callable[[fx.GraphModule, fx.Node], str | None]
    emit: Emit
    needs: Needs = lambda emitter, node: {}
    by_row: bool = False


@dataclass
class Emitter:
    """One region at given shapes.

    ``sizes``: of every node's value. ``values``: what is known of a node so far: a view, a constant tensor, or plain
    Python values. ``stored``: the views of constants that steps read. ``borders``: what readers need around an image.
    ``rounded``: integers that a quantize operator shall give, and that are there already. ``joins``: concatenations
    that some of their parts are written into. ``arranged``: data of weight-only layers in the order of the kernel.
    ``choices``: how layers are computed, by the names of their nodes. ``vary``: which are computed in every way there
    is. ``packed``: weights of a layer for a kernel.
    """

    gm: fx.GraphModule
    sizes: Sizes
    program: Program
    operators: Callable[[fx.GraphModule, fx.Node], Operator]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    stored: dict[fx.Node, View] = field(default_factory=dict)
    borders: dict[fx.Node, Border] = field(default_factory=dict)
    rounded: dict[fx.Node, View] = field(default_factory=dict)
    joins: dict[fx.Node, View] = field(default_factory=dict)
    arranged: dict[Any, View] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    vary: Vary | None = None
    packed: dict[tuple[fx.Node, str], tuple[str, Any]] = field(default_factory=dict)

    @property
    def isa(self) -> Isa:
        return self.program.isa

    def view(self, node: Any) -> View:
        """Where the tensor lies that ``node`` computed."""
        found = self.values.get(node)
        if isinstance(found, Tensor):
            if found.dtype not in ELEMENTS:
                raise NotNative(f"{node} is a constant of {found.dtype}")
            if node not in self.stored:
                self.stored[node] = self.program.constant_view(found)
            return self.stored[node]
        if not isinstance(found, View):
            raise NotNative(f"{node} is no tensor of the program")
        return found

    def parameter(self, node: Any) -> Tensor:
        """The parameter or buffer that ``node`` names, or what was computed of such."""
        found = self.values.get(node)
        if not isinstance(found, Tensor):
            raise NotNative(f"{node} is no constant")
        return found

    def size(self, node: fx.Node) -> tuple[int, ...]:
        found = self.sizes.of[node]
        assert isinstance(found, tuple)
        return found

    def axis(self, node: fx.Node, dim: int) -> int:
        """The dimension of a view that is ``dim`` of the value of ``node``."""
        axes = self.sizes.axes(node)
        found = axes[dim % len(axes)]
        if len(found) > 1:
            raise NotNative(f"dimension {dim} of {node} holds the rows of all samples")
        return found[0]

    def module(self, node: fx.Node) -> Any:
        return self.gm.get_submodule(str(node.target))

    def border(self, node: fx.Node) -> Border:
        return self.borders.get(node, Border())

    # --- results ------------------------------------------------------------------------------------------------------

    def image(self, node: fx.Node, element: Element) -> View:
        """An image for the value of ``node``: a new one with the border that its readers need, or a place in one."""
        placed = place_in_join(self, node, element)
        self.values[node] = made = placed or self.program.image(element, self.size(node), self.border(node))
        return made

    def tensor(self, node: fx.Node, element: Element) -> View:
        """A new tensor in natural order for the value of ``node``."""
        self.values[node] = made = self.new(node, element)
        return made

    def new(self, node: fx.Node, element: Element) -> View:
        """A new tensor of the sizes of ``node``, in natural order, in an output's place if it is one."""
        return self.program.tensor(element, self.size(node), "output" if self._is_output(node) else "arena")

    def _is_output(self, node: fx.Node) -> bool:
        return any(user.op == "output" for user in node.users)

    # --- the whole ----------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Tensor]) -> tuple[View, ...]:
        """Write all nodes, for such inputs; the views of the outputs, each in an output buffer of its own."""
        nodes, given = list(self.gm.graph.nodes), iter(inputs)
        for node in reversed(nodes):
            if node.op in ("call_function", "call_module"):
                for source, border in self.operators(self.gm, node).needs(self, node).items():
                    self.borders[source] = self.border(source) | border
        constants = [node for node in nodes if node.op == "get_attr"]
        self.values |= {node: get_tensor(self.gm, str(node.target)).detach() for node in constants}
        self._refuse_joined(nodes)
        for node in nodes:
            if node.op == "get_attr":
                continue
            if node.op == "placeholder":
                self._input(node, next(given).dtype)
            elif node.op == "output":
                outputs = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                return self._outputs(outputs)
            elif not self._folded(node):
                with writing(node):
                    self.operators(self.gm, node).emit(self, node)
        raise AssertionError("a graph has an output")

    def _refuse_joined(self, nodes: Sequence[fx.Node]) -> None:
        """Decline all nodes at once whose operators do not know of rows of all samples in one dimension."""
        joined = self.sizes.joined
        calls = [n for n in nodes if n.op.startswith("call") and any(one in joined for one in (n, *n.all_input_nodes))]
        declined = [n for n in calls if isinstance(self.sizes.of[n], tuple) and not self.operators(self.gm, n).by_row]
        if declined:
            error = NotNative(f"{declined[0]} has the rows of all samples in one dimension")
            error.nodes = tuple(declined)
            raise error

    def _folded(self, node: fx.Node) -> bool:
        """Compute what needs no input now: sizes, and functions of them and of parameters."""
        if not isinstance(self.sizes.of[node], tuple):
            self.values[node] = self.sizes.of[node]
            return True
        inputs = [self.values.get(n) for n in node.all_input_nodes]
        known = [isinstance(v, Tensor) or (isinstance(v, int) and v != BATCH) for v in inputs]
        if not all(known):
            return False
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        compute = self.module(node) if node.op == "call_module" else node.target
        assert callable(compute)
        with torch.no_grad():
            self.values[node] = compute(*args, **kwargs)
        return True

    def _input(self, node: fx.Node, dtype: torch.dtype) -> None:
        """An input of the region; one of another type serves for its sizes only."""
        given = self.program.tensor(ELEMENTS.get(dtype, "uint8_t"), self.size(node), "input")
        if dtype in (torch.uint8, torch.int8, torch.bool):  # kernels read whole vectors of bytes, beyond the user's own
            self.values[node] = made = self.program.tensor(given.element, given.sizes)
            copy(self.program, given, made, str(node))
        elif dtype in ELEMENTS:
            self.values[node] = given

    def _outputs(self, nodes: Sequence[fx.Node]) -> tuple[View, ...]:
        """The views of the outputs, copied where one is not whole in an output buffer, or has the buffer of another."""
        made: list[View] = []
        for node in nodes:
            with writing(node):
                view = self.view(node)
            taken = [other.buffer for other in made]
            if view.buffer.place != "output" or not view.contiguous or view.buffer in taken:
                source, view = view, self.program.tensor(view.element, view.sizes, "output")
                with writing(node):
                    copy(self.program, source, view, str(node))
            made.append(view)
        return tuple(made)

    def step(self, code: str, reads: list[View], writes: list[View], node: fx.Node, kernel: str, **more: Any) -> None:
        """Add a step that computes ``node``."""
        buffers = tuple(v.buffer for v in reads)
        self.program.add(Step(code, buffers, tuple(v.buffer for v in writes), str(node), kernel, **more))
