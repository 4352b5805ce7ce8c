"""A target against the reference, leaf by leaf, with identical integers going into both.

One CONVERTED graph is lowered twice. The target's graph runs; every leaf of the reference gets what the target's own
leaf gets, so that a difference is that leaf's alone and no rounding of an earlier layer is carried along.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.api import quantize
from qfx.errors import VerifyError
from qfx.meta import info
from qfx.passes.eliminate_dead_code import EliminateDeadCode
from qfx.passes.lower import Lower
from qfx.pipeline import Pipeline, run_pass
from qfx.recipe import Recipe
from qfx.stage import Stage, stage_of
from qfx.targets import TARGETS, Leaf, Target, choose


@dataclass(frozen=True)
class LeafDifference:
    """How one leaf of a target differs from the reference's on the same inputs.

    ``lsb``: greatest difference of integer outputs; None where the output is float. ``relative``: ``|x - y| / |x|`` in
    norm of float outputs, x being the reference's; None where the output is integers.
    """

    node: str
    layer: str
    kernel: str
    lsb: int | None
    relative: float | None


def converted(
    model: nn.Module,
    example_inputs: Any,
    *,
    calibration: Any = None,
    recipe: str | Recipe = "int8",
    target: str | Target = "auto",
) -> nn.Module:
    """``model`` quantized for ``target`` up to stage CONVERTED, not lowered; arguments as of ``quantize``."""
    passes = Pipeline(tuple(itertools.takewhile(lambda p: p.name != Lower.name, Pipeline.default(recipe, target))))
    return quantize(
        model, example_inputs, calibration=calibration, recipe=recipe, target=target, pipeline=passes, verbose=False
    )


def lockstep(
    gm: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    target: str | Target = "auto",
    reference: Target = TARGETS["reference"],
) -> tuple[LeafDifference, ...]:
    """Lower ``gm`` for ``target`` and for ``reference``, run the target's graph, and compare every leaf; ``gm`` stays.

    Args:
        gm: a graph at stage CONVERTED (see :func:`converted`).
        inputs: what its placeholders take, flat (:func:`qfx.calling.flat_inputs`).

    Returns:
        One difference for every leaf that the target made, in the order of the graph. What the target declined runs in
        float and is not compared.

    Raises:
        VerifyError: the graph is at another stage, or the reference has no leaf where the target has one.
    """
    if stage_of(gm) is not Stage.CONVERTED:
        raise VerifyError(
            f"lockstep needs a graph at stage CONVERTED, this one is {stage_of(gm).name}",
            hint="make it with qfx.parity.converted",
        )
    theirs, ours = _lowered(gm, reference), _lowered(gm, choose(target))
    runner = _Lockstep(ours, theirs)
    with torch.no_grad():
        runner.run(*inputs, enable_io_processing=False)
    return tuple(runner.found)


def _lowered(gm: fx.GraphModule, target: Target) -> fx.GraphModule:
    shared = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
    twin = copy.deepcopy(gm, shared)
    for p in (Lower(target), EliminateDeadCode()):
        run_pass(p, twin)
    return twin


class _Lockstep(fx.Interpreter):
    """Runs ``gm``, and at every leaf the leaf of the same name of ``other`` first: a kernel may write to its inputs."""

    def __init__(self, gm: fx.GraphModule, other: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.found: list[LeafDifference] = []
        self.twins = {
            n.name: module
            for n in other.graph.nodes
            if n.op == "call_module" and isinstance(module := other.get_submodule(str(n.target)), Leaf)
        }

    def run_node(self, n: fx.Node) -> Any:
        leaf = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if not isinstance(leaf, Leaf):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.name not in self.twins:
            raise VerifyError(f"{leaf.kernel} at {n.name!r} has no counterpart in the reference", where=info(n).origin)
        want = self.twins[n.name](*args, **kwargs)
        got = leaf(*args, **kwargs)
        self.found.append(_difference(n, leaf, want, got))
        return got


def _difference(node: fx.Node, leaf: Leaf, want: Tensor, got: Tensor) -> LeafDifference:
    where = (node.name, info(node).origin, leaf.kernel)
    if want.shape != got.shape or want.dtype != got.dtype:
        raise VerifyError(
            f"{leaf.kernel} gives {got.dtype} of shape {list(got.shape)}, the reference {want.dtype} of shape "
            f"{list(want.shape)}",
            where=info(node).origin,
        )
    if not want.is_floating_point():
        lsb = int((want.int() - got.int()).abs().max()) if want.numel() else 0
        return LeafDifference(*where, lsb, None)
    x, y = want.double(), got.double()
    off, norm = float(torch.linalg.vector_norm(x - y)), float(torch.linalg.vector_norm(x))
    return LeafDifference(*where, None, 0.0 if off == 0.0 else off / norm if norm else float("inf"))
