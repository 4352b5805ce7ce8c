"""Whether a region's program computes what its leaves compute, layer by layer, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.targets.native.region import NativeRegion
from qfx.targets.native.running import programs_of
from qfx.targets.reference import AnchorLeaf, PointLeaf


@dataclass(frozen=True)
class Disagreement:
    """How far one node's value in the program is from what its leaf makes of the program's own inputs to it.

    ``lsb``: of integers, the greatest difference. ``relative``: of floats, to the greatest magnitude.
    """

    node: fx.Node
    lsb: int | None
    relative: float | None


def compare(region: NativeRegion, inputs: tuple[Tensor, ...], *, exact: bool = False) -> list[Disagreement]:
    """Every node of the region's programs; empty where it runs as the lowered graph does.

    ``exact``: leaves compute as ``reference`` does.
    """
    found: list[Disagreement] = []
    for part, program, given in programs_of(region, inputs):
        runner = _Forced(part.graph, program.probe(*(x.contiguous() for x in given)), exact)
        with torch.no_grad():
            runner.run(*given)
        found += runner.found
    return found


class _Forced(fx.Interpreter):
    """Runs the leaves; each then hands on what the program computed."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[str, Tensor], exact: bool) -> None:
        super().__init__(gm)
        self.values, self.exact = values, exact
        self.found: list[Disagreement] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaf = self.fetch_attr(str(target))
        plain = next((t for t in (AnchorLeaf, PointLeaf) if isinstance(leaf, t)), None) if self.exact else None
        return super().call_module(target, args, kwargs) if plain is None else plain.forward(leaf, *args)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        got = self.values.get(n.name)
        if n.op == "placeholder" or got is None or not isinstance(result, Tensor):
            return result
        if got.dtype != result.dtype:  # rounded by what made it: the quantize operator behind is compared
            return result
        got = got.reshape(result.shape)  # rows of all samples may stand in one dimension
        self.found.append(_difference(n, result, got))
        return got.reshape(result.shape)


def _difference(node: fx.Node, want: Tensor, got: Tensor) -> Disagreement:
    if not want.is_floating_point():
        return Disagreement(node, int((want.int() - got.int()).abs().max()) if want.numel() else 0, None)
    off = float((want.double() - got.double()).abs().max()) if want.numel() else 0.0
    most = float(want.double().abs().max()) if want.numel() else 0.0
    return Disagreement(node, None, off / most if most else off)
