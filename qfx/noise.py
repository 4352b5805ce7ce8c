"""How much noise quantization adds at every node, measured by running a prepared graph twice in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qfx.fake_quant import FakeQuantize
from qfx.metrics import sqnr_db
from qfx.operators import is_constant, mutates


@dataclass(frozen=True)
class _Pair:
    """One value of the float run and its twin of the fake-quantized run."""

    float_: Any
    quantized: Any


@dataclass(frozen=True)
class Noise:
    """``by_node``: SQNR in dB of every floating-point node against float; ``outputs``: the float run's flat outputs."""

    by_node: Mapping[str, float]
    outputs: tuple[Any, ...]


Seen = Callable[[fx.Node, Tensor, Tensor], None]
"""Told of a node with its value in the float run and in the fake-quantized run."""


class _Lockstep(fx.Interpreter):
    """Runs every node for both values, and forgets them after their last reader: two live sets, no more."""

    def __init__(self, gm: fx.GraphModule, seen: Seen | None = None) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.by_node: dict[str, float] = {}
        self.seen = seen
        self.copy_inputs = any(mutates(n) for n in gm.graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            given = super().run_node(n)
            return _Pair(given, given.clone() if self.copy_inputs and isinstance(given, Tensor) else given)
        if n.op == "get_attr":
            constant = super().run_node(n)
            return _Pair(constant, constant)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        sides = [
            (map_aggregate(args, lambda a, s=side: _side(a, s)), map_aggregate(kwargs, lambda a, s=side: _side(a, s)))  # type: ignore[misc]
            for side in ("float_", "quantized")
        ]
        if n.op == "output":
            return _Pair(*(side[0][0] for side in sides))
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            rounded = _Pair(sides[0][0][0], _rounded(module, sides[1][0][0]))
            if self.seen is not None:
                self.seen(n, rounded.float_, rounded.quantized)
            return rounded
        if n.op == "call_function" and is_constant(n):  # one value for both: a second copy of a weight is a lot
            constant = self.call_function(n.target, *sides[0])
            return _Pair(constant, constant)
        result = _Pair(*(getattr(self, n.op)(n.target, *side) for side in sides))
        if isinstance(result.float_, Tensor) and result.float_.is_floating_point():
            self.by_node[n.name] = sqnr_db(result.float_, result.quantized)
            if self.seen is not None:
                self.seen(n, result.float_, result.quantized)
        return result


def _side(a: Any, side: str) -> Any:
    return getattr(a, side) if isinstance(a, _Pair) else a


def _rounded(module: FakeQuantize, x: Tensor) -> Tensor:
    before = module.quantizing, module.observing
    module.quantizing, module.observing = True, False
    try:
        rounded: Tensor = module(x)
        return rounded
    finally:
        module.quantizing, module.observing = before


def measure(gm: fx.GraphModule, inputs: tuple[Any, ...], *, seen: Seen | None = None) -> Noise:
    """Noise of a CALIBRATED graph on its flat ``inputs`` (what its placeholders take).

    ``seen`` is told of every operator with a floating-point value, and of every rounding, of weights too.
    """
    runner = _Lockstep(gm, seen)
    with torch.no_grad():
        pair = runner.run(*inputs, enable_io_processing=False)
    outputs = pair.float_ if isinstance(pair.float_, tuple | list) else (pair.float_,)
    return Noise(runner.by_node, tuple(outputs))
