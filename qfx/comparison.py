"""``qfx.compare``: the same inputs through two stages of one model, and every value that both have side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from qfx.agreement import rounding_on
from qfx.calling import flat_inputs
from qfx.capture import capture
from qfx.errors import ConfigError
from qfx.examples import as_example
from qfx.fake_quant import FakeQuantize
from qfx.meta import graph_info, info
from qfx.metrics import sqnr_db
from qfx.operators import is_constant, name_of
from qfx.ops import dequantize, quantize
from qfx.passes import ptq
from qfx.pipeline import Pipeline
from qfx.portable import portable
from qfx.recipe import Recipe
from qfx.shadow import undisturbed
from qfx.stage import Stage, stage_of
from qfx.targets import TARGETS


@dataclass(frozen=True)
class ValueComparison:
    """One operator's result: ``sqnr_db`` of the second model's against the first's; ``shape`` as both had it."""

    name: str
    operator: str
    layer: str
    shape: tuple[int, ...]
    sqnr_db: float


@dataclass(frozen=True)
class Comparison:
    """Every floating-point value that two graphs of one model have in common, in the order of the first.

    ``first`` and ``second`` name the stages compared. ``str()`` is a table.
    """

    first: str
    second: str
    rows: tuple[ValueComparison, ...]

    def worst(self, count: int = 10) -> tuple[ValueComparison, ...]:
        """The values of lowest SQNR, the lowest first; of equal ones the earlier first."""
        return tuple(sorted(self.rows, key=lambda row: (not math.isnan(row.sqnr_db), row.sqnr_db))[:count])

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ["operator", "layer", "shape", f"SQNR dB, {self.second} against {self.first}"]
        lines = [(row.operator, row.layer, str(list(row.shape)), _words(row.sqnr_db)) for row in self.rows]
        return str(tabulate(lines, header, disable_numparse=True, colalign=("left", "left", "left", "right")))


def _words(sqnr: float) -> str:
    return "exact" if sqnr == math.inf else f"{sqnr:.1f}"


def compare(first: nn.Module, second: nn.Module, inputs: Any) -> Comparison:
    """Run ``inputs`` through two stages of one model; tell for every value how far the second is from the first.

    Each side runs on its own values, so that noise adds up from layer to layer. A quantized model's values are those
    behind their rounding; they are taken from its CONVERTED graph, which its kernels equal within 1 LSB.

    Args:
        first: the float model, or a graph that ``qfx.prepare``, ``calibrate``, ``convert`` or ``quantize`` returned.
        second: another of these.
        inputs: one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        CaptureError: the float model cannot be captured as a whole, or ``inputs`` is no call of it.
        ConfigError: a model was captured in parts, or the two have no value in common.
    """
    sides = [_graph(model, inputs) for model in (first, second)]
    call = as_example(inputs)
    values: list[Mapping[str, Tensor]] = []
    for gm in sides:
        running = rounding_on(gm) if stage_of(gm) is Stage.CALIBRATED else nullcontext()
        with torch.no_grad(), undisturbed(), running:
            runner = _Keeper(gm)
            runner.run(*flat_inputs(gm, call.args, dict(call.kwargs)), enable_io_processing=False)
        values.append(runner.values)
    rows = tuple(
        ValueComparison(
            node.name, name_of(node) or str(node.target), info(node).origin, tuple(found.shape), sqnr_db(wanted, found)
        )
        for node in sides[0].graph.nodes
        if (wanted := values[0].get(node.name)) is not None
        and (found := values[1].get(node.name)) is not None
        and found.shape == wanted.shape
    )
    if not rows:
        raise ConfigError(
            f"{type(first).__name__} and {type(second).__name__} have no value in common",
            hint="compare a model with what qfx made of that same model",
        )
    return Comparison(stage_of(sides[0]).name, stage_of(sides[1]).name, rows)


def _graph(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """The graph of ``model`` that bears the names of the fused one."""
    if not graph_info(model).stage:
        if parts := [path for path, part in model.named_modules() if graph_info(part).stage]:
            raise ConfigError(
                f"{type(model).__name__} was captured in {len(parts)} parts, the first is {parts[0]!r}",
                hint=f"compare part by part: model.get_submodule({parts[0]!r}), with its own inputs",
            )
        gm = capture(model, inputs)
        return Pipeline(ptq(Recipe.int8(), TARGETS["reference"])).split(Stage.FUSED)[0].run(gm)
    assert isinstance(model, fx.GraphModule)
    return portable(model) if stage_of(model) is Stage.LOWERED else model


class _Keeper(fx.Interpreter):
    """Keeps the results of operators; where one is rounded, what it is after that."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.computed: dict[str, Tensor] = {}
        self.rounded: dict[str, Tensor] = {}

    @property
    def values(self) -> Mapping[str, Tensor]:
        return self.computed | self.rounded

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if not (isinstance(result, Tensor) and result.is_floating_point()):
            return result
        source = self._rounds(n)
        if source is not None:
            self.rounded.setdefault(source.name, result)  # read in several widths: the first is the widest
        elif n.op == "call_function" and n.target is not dequantize and not is_constant(n):
            self.computed[n.name] = result
        return result

    def _rounds(self, n: fx.Node) -> fx.Node | None:
        """The operator whose result ``n`` is after its rounding, or None."""
        source = n.args[0] if n.args else None
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), FakeQuantize):
            found = source
        elif n.target is dequantize and isinstance(source, fx.Node) and source.target is quantize:
            found = source.args[0]
        else:
            return None
        return found if isinstance(found, fx.Node) and found.op == "call_function" and not is_constant(found) else None
