"""Whether two graphs of dynamo's are one computation at different sizes, so that ranges of one hold for the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.dynamo_names import source_name


@dataclass(frozen=True)
class Number:
    """A number in a graph: its value when dynamo compiled, and its expression where it may vary."""

    value: Any
    expression: Any = None

    @classmethod
    def of(cls, found: Any) -> Number:
        inner = getattr(found, "node", None)
        if inner is None:
            return cls(found)
        return cls(inner.hint, None if inner.expr.is_number else inner.expr)

    def at(self, values: dict[Any, Any]) -> Any:
        """Its value where symbols have these values."""
        if self.expression is None or not self.expression.free_symbols <= values.keys():
            return self.value
        return self.expression.subs(values)


@dataclass(frozen=True)
class Outline:
    """``shape`` is all of a graph but its numbers; ``sizes`` are those of its inputs."""

    shape: tuple[Any, ...]
    numbers: tuple[Number, ...]
    sizes: tuple[Number, ...]

    def continues(self, other: Outline) -> bool:
        """Whether all that differs follows from other sizes of the inputs.

        A number may be what a symbol of the one is at the sizes of the other; where neither has symbols, it may be a
        size of an input that differs in the same way.
        """
        if self.shape != other.shape or len(self.sizes) != len(other.sizes):
            return False
        pairs = list(zip(self.sizes, other.sizes, strict=True))
        here = {mine.expression: its.value for mine, its in pairs if _is_symbol(mine)}
        there = {its.expression: mine.value for mine, its in pairs if _is_symbol(its)}
        differ = {(mine.value, its.value) for mine, its in pairs}
        return all(
            mine.at(here) == its.value or its.at(there) == mine.value or (mine.value, its.value) in differ
            for mine, its in zip(self.numbers, other.numbers, strict=True)
        )


def _is_symbol(number: Number) -> bool:
    return number.expression is not None and bool(number.expression.is_Symbol)


def outline_of(gm: fx.GraphModule, constants: Collection[fx.Node]) -> Outline:
    """The outline of a graph; to be asked while dynamo compiles.

    Args:
        constants: the placeholders that stand for tensors of modules.
    """
    shape: list[Any] = []
    numbers: list[Number] = []
    sizes: list[Number] = []
    position: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if _is_number(node) or _is_check(node):
            continue
        position[node] = len(position)
        if node.op == "placeholder":
            fake = node.meta["example_value"]
            shape.append(("placeholder", node in constants, source_name(node), fake.dtype, fake.device, fake.dim()))
            sizes += [] if node in constants else [Number.of(size) for size in fake.shape]
        elif node.op == "output":  # numbers among the results are there or not, as they may vary or not
            shape.append(("output", *(position[n] for n in node.all_input_nodes if n in position)))
        else:
            shape.append((node.op, node.target, *_tokens((node.args, node.kwargs), position, numbers)))
    return Outline(tuple(shape), tuple(numbers), tuple(sizes))


def _tokens(argument: Any, position: dict[fx.Node, int], numbers: list[Number]) -> Iterable[Any]:
    """The argument as hashable tokens; numbers go to ``numbers``."""
    if isinstance(argument, fx.Node) and argument in position:
        return [("node", position[argument])]
    if isinstance(argument, fx.Node):
        return _tokens(argument.meta.get("example_value"), position, numbers)
    if isinstance(argument, dict):
        return [token for key, part in argument.items() for token in (key, *_tokens(part, position, numbers))]
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return ["(", *(token for part in argument for token in _tokens(part, position, numbers)), ")"]
    if isinstance(argument, slice):
        return _tokens((argument.start, argument.stop, argument.step), position, numbers)
    if isinstance(argument, int | torch.SymInt) and not isinstance(argument, bool):
        numbers.append(Number.of(argument))
        return ["number"]
    return [argument if isinstance(argument, bool | float | str | torch.dtype) else repr(argument)]


def _is_number(node: fx.Node) -> bool:
    """Whether the node gives a size, or something made of sizes, and no tensor."""
    value = node.meta.get("example_value")
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return False
    return value is not None and not isinstance(value, Tensor | list | dict)


def _is_check(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").startswith("_check")
