"""Example values for graphs that have none, as those from files: a dump shows types and sizes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx

from qfx.calling import codegen_of, flat_inputs
from qfx.example_values import restore_values
from qfx.examples import as_example
from qfx.graph_module import CapturedModule
from qfx.meta import info, set_value, value
from qfx.portable import portable, twin_of
from qfx.shadow import undisturbed
from qfx.stage import Stage, stage_of

log = logging.getLogger(__name__)


def with_values(gm: CapturedModule, example_inputs: Any = None) -> tuple[CapturedModule, CapturedModule]:
    """The CONVERTED graph of a quantized model, and its own; as copies with example values where they have none.

    Values come from a run on fake tensors, and one of the lowered graph, whose kernels take real ones; on the example,
    else on zeros of its sizes. Where those do not fit the model, types and sizes stay unknown.
    """
    converted = portable(gm)
    if all(value(n) is not None for n in converted.graph.nodes if n.op == "placeholder"):
        return converted, gm
    converted = twin_of(converted)
    lowered = twin_of(gm) if stage_of(gm) is Stage.LOWERED else converted
    try:
        with undisturbed():
            inputs = _inputs(gm, example_inputs)
            restore_values(converted, inputs)
            _follow(lowered, converted, inputs)
    except Exception as error:  # of the user's operators, at sizes that nobody chose
        log.debug("no example values: %s", error)
    return converted, lowered


def _inputs(gm: CapturedModule, example_inputs: Any) -> tuple[Tensor, ...]:
    if example_inputs is not None:
        call = as_example(example_inputs)
        return flat_inputs(gm, call.args, call.kwargs)
    binder = codegen_of(gm).binder
    shapes = ([binder.examples[s] if isinstance(s, str) else s for s in spec.sizes] for spec in binder.tensors)
    return tuple(torch.zeros(s, dtype=spec.dtype) for s, spec in zip(shapes, binder.tensors, strict=True))


def _follow(lowered: CapturedModule, converted: CapturedModule, inputs: tuple[Tensor, ...]) -> None:
    """Give lowered nodes the sizes that the operators have which they stand for, with the dtypes of a run."""
    if lowered is converted:
        return
    known = {n.name: value(n) for n in converted.graph.nodes}
    runner = _Found(lowered)
    runner.run(*inputs, enable_io_processing=False)
    for n in lowered.graph.nodes:
        covers = info(n).fused
        like = known.get(covers[-1] if covers else n.name)
        set_value(n, _as(like, runner.found[n.name]))


def _as(like: Any, found: Any) -> Any:
    """``like`` with the dtype of ``found``, or on torch's meta device what was found."""
    if isinstance(found, tuple | list):
        known = like if isinstance(like, tuple | list) and len(like) == len(found) else [None] * len(found)
        return type(found)(map(_as, known, found))
    if not isinstance(found, Tensor):
        return found if like is None else like
    fits = isinstance(like, Tensor) and like.dim() == found.dim()
    return like.to(found.dtype) if fits else torch.empty_like(found, device="meta")


class _Found(fx.Interpreter):
    """Remembers what every node gave, without its data."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n.name] = fx.node.map_aggregate(
            result, lambda t: torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t
        )
        return result
