"""Suffix replay: what a graph computes when a few of its operators read other values, without a run of all of it.

The graph is run once and every value kept. A trial recomputes only the operators that are changed and what follows from
them: on average half of the network, and one layer at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qfx.fake_quant import FakeQuantize
from qfx.operators import mutates

Read = Callable[[Tensor], Tensor]
Changes = Mapping[fx.Node, Mapping[int, Read]]
"""For an operator and the number of one of its tensor inputs: what it reads in place of the value."""


class Replay:
    """One run of ``gm`` on flat ``inputs`` with ``base`` changes, to be repeated with others.

    ``outputs`` is the flat list that the graph returns. A graph with operators that write to their inputs is run anew,
    on copies, for every trial: kept values would not stay what they were.
    """

    def __init__(self, gm: fx.GraphModule, inputs: tuple[Any, ...], base: Changes | None = None) -> None:
        self._interpreter = fx.Interpreter(gm)
        self._nodes = list(gm.graph.nodes)
        self._last = _last_readers(self._nodes)
        self._base: Changes = base or {}
        self._inputs = inputs
        self._keeps = not any(mutates(n) for n in self._nodes)
        self._values: dict[fx.Node, Any] = {}
        self.outputs = self._whole(self._base, keep=self._keeps)

    def run(self, changes: Changes) -> tuple[Any, ...]:
        """The outputs with ``changes`` in place of the base's."""
        if not self._keeps:
            return self._whole(changes, keep=False)
        fresh: dict[fx.Node, Any] = {}
        stale: set[fx.Node] = set()
        outputs = self.outputs
        for node in self._nodes:
            changed = changes.get(node) != self._base.get(node)
            if not changed and not any(n in stale for n in node.all_input_nodes):
                continue
            stale.add(node)
            result = self._call(node, changes.get(node, {}), lambda n: fresh[n] if n in stale else self._values[n])
            if node.op == "output":
                outputs = _flat(result)
            else:
                fresh[node] = result
            for done in self._last.get(node, ()):
                fresh.pop(done, None)
        return outputs

    def _whole(self, changes: Changes, *, keep: bool) -> tuple[Any, ...]:
        """Run all of the graph."""
        inputs = iter(self._inputs)
        values = self._values if keep else {}
        outputs: tuple[Any, ...] = ()
        for node in self._nodes:
            if node.op == "placeholder":
                given = next(inputs)
                values[node] = given if keep or not isinstance(given, Tensor) else given.clone()
                continue
            result = self._call(node, changes.get(node, {}), values.__getitem__)
            if node.op == "output":
                outputs = _flat(result)
            values[node] = result
            for done in () if keep else self._last.get(node, ()):
                values.pop(done, None)
        return outputs

    @torch.no_grad()
    def _call(self, node: fx.Node, reads: Mapping[int, Read], load: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = loaded(node, reads, load)
        if node.op == "output":
            return args[0]
        if node.op == "call_module" and isinstance(self._interpreter.fetch_attr(str(node.target)), FakeQuantize):
            return args[0]
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def loaded(node: fx.Node, reads: Mapping[int, Read], load: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """The operator's arguments as values, with those in ``reads`` changed."""
    position = -1

    def one(n: fx.Node) -> Any:
        nonlocal position
        position += 1
        read = reads.get(position)
        return load(n) if read is None else read(load(n))

    return fx.node.map_arg((node.args, node.kwargs), one)


def _last_readers(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every node the values that nobody reads behind it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for read in node.all_input_nodes:
            last[read] = node
    readers: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last.items():
        readers.setdefault(node, []).append(read)
    return readers


def _flat(result: Any) -> tuple[Any, ...]:
    """What the output node returns, as the flat list that a captured graph has."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)
