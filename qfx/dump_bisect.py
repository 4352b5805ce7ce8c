"""The first pass behind which a model's output is too far from the float model's, and the node that suffers most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qfx import affine
from qfx.agreement import rounding_on
from qfx.calling import flat_inputs
from qfx.dump_diff import stand_ins
from qfx.dump_model import shown_db
from qfx.errors import ConfigError
from qfx.meta import info
from qfx.metrics import sqnr_db
from qfx.modes import evaluating
from qfx.node_views import Viewer
from qfx.operators import is_floating
from qfx.recording import Kept, Recording
from qfx.roundings import fake_quants
from qfx.shadow import undisturbed
from qfx.stage import Stage
from qfx.structure import flatten


@dataclass(frozen=True)
class Bisection:
    """``trail``: ``(pass, SQNR of the output in dB)`` in order. ``culprit``: the first below ``bound``; "" for none.

    ``node``, ``layer``, ``node_db``: the node with the lowest SQNR behind the culprit.
    """

    bound: float
    trail: tuple[tuple[str, float], ...]
    culprit: str = ""
    before: float | None = None
    after: float | None = None
    node: str = ""
    layer: str = ""
    node_db: float | None = None

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.trail)
        lines = [f"SQNR of the output against the float model, bound {self.bound:g} dB"]
        for name, sqnr in self.trail:
            lines.append(f"  {name:<{width}}  {shown_db(sqnr)}" + ("  <- first below" if name == self.culprit else ""))
        if not self.culprit:
            return "\n".join([*lines, "no pass brings it below the bound"])
        assert self.before is not None and self.after is not None
        told = f"{self.culprit} brings it from {shown_db(self.before)} to {shown_db(self.after)}"
        if self.node_db is not None:
            place = f" [layer {self.layer}]" if self.layer else ""
            told += f"; the node that suffers most is {self.node}{place}: {shown_db(self.node_db)}"
        return "\n".join([*lines, told])


def bisect(recording: Recording, bound: float) -> Bisection:
    """Run the graph behind every pass on the first calibration item (else the example), against the float model.

    From calibration on the graph rounds: CALIBRATED graphs by fake quantization, those behind as they are.

    Raises:
        ConfigError: the steps were not kept, since capture had to stop at parts of the model.
    """
    if not recording.steps or recording.model is None or recording.call is None:
        raise ConfigError(
            "a bisection needs a float model that is captured whole",
            hint="look at the parts with --pass-by-pass, or change the line that stops capture",
        )
    call = recording.call
    with undisturbed(), evaluating(recording.model):
        reference = flatten(recording.model(*call.args, **call.kwargs))[0]
        trail: list[tuple[str, float]] = []
        for step in recording.steps:
            inputs = flat_inputs(step.gm, call.args, call.kwargs)
            trail.append((step.step, _worst(reference, _run(step, inputs)[0])))
        first = next((i for i, (_, sqnr) in enumerate(trail) if not sqnr >= bound), None)
        if first is None:
            return Bisection(bound, tuple(trail))
        before = trail[first - 1][1] if first else float("inf")
        node, layer, worst = _suffers(recording.steps, first, call.args, call.kwargs)
    return Bisection(bound, tuple(trail), trail[first][0], before, trail[first][1], node, layer, worst)


def _worst(reference: Sequence[Any], actual: Sequence[Any]) -> float:
    """The lowest SQNR of the floating-point outputs."""
    pairs = ((x, y) for x, y in zip(reference, actual, strict=True) if isinstance(x, Tensor))
    return min((sqnr_db(x, y) for x, y in pairs if x.is_floating_point()), default=float("inf"))


class _Values(fx.Interpreter):
    """Keeps a copy of every tensor: lowered graphs reuse memory."""

    def __init__(self, gm: fx.GraphModule, keep: bool) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.keep, self.values = keep, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.keep and isinstance(result, Tensor) and n.op in ("call_function", "call_module"):
            self.values[n.name] = result.clone()
        return result


def _run(step: Kept, inputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Sequence[Any], dict[str, Tensor]]:
    """Flat outputs, and if asked for the value of every call by name."""
    runner = _Values(step.gm, keep)
    rounding = rounding_on(step.gm) if step.stage is Stage.CALIBRATED else nullcontext()
    with evaluating(step.gm), rounding:
        outputs = runner.run(*(t.clone() for t in inputs), enable_io_processing=False)
    return outputs if isinstance(outputs, tuple | list) else (outputs,), runner.values


# --- which node -------------------------------------------------------------------------------------------------------


def _suffers(
    steps: Sequence[Kept], culprit: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, str, float | None]:
    """The node behind the culprit whose value is farthest from the float one, its layer and its SQNR.

    Float values are those of the fused graph, or of the graph before the culprit where that is an earlier one.
    """
    step = steps[culprit]
    floats = [s for s in steps[:culprit] if s.stage <= Stage.FUSED] or [step]
    known, got = (_run(s, flat_inputs(s.gm, args, kwargs), keep=True)[1] for s in (floats[-1], step))
    stands_for = _stands_for(floats[-1], step, _scales(steps))
    found = []
    for node in step.gm.graph.nodes:
        source, scale = stands_for.get(node.name, (node.name, None))
        if node.name not in got or source not in known:
            continue
        value = got[node.name] if scale is None else affine.dequantize(got[node.name], *scale)
        want = known[source]
        if want.is_floating_point() and value.is_floating_point() and want.shape == value.shape:
            found.append((sqnr_db(want, value), node))
    if not found:
        return "", "", None
    worst, node = min(found, key=lambda pair: pair[0])
    return node.name, info(node).origin, worst


Scale = tuple[Tensor, Tensor]


def _scales(steps: Iterable[Kept]) -> dict[str, Scale]:
    """By the name of a value: the scale and zero point, per tensor, with which kernels keep it."""
    found: dict[str, Scale] = {}
    for step in steps:
        for node, module in fake_quants(step.gm) if step.stage is Stage.CALIBRATED else ():
            source = node.args[0]
            if isinstance(source, fx.Node) and module.axis is None and module.scale.numel():
                found.setdefault(source.name, (module.scale, module.zero_point))
    return found


def _stands_for(floats: Kept, step: Kept, scales: Mapping[str, Scale]) -> dict[str, tuple[str, Scale | None]]:
    """By a node's name: the node of the float graph that it stands for, and how to read its integers."""
    found: dict[str, tuple[str, Scale | None]] = {}
    for node in step.gm.graph.nodes:
        covers = info(node).fused
        if step.stage is Stage.LOWERED and covers:
            reals = is_floating(node)
            if reals or covers[-1] in scales:
                found[node.name] = (covers[-1], None if reals else scales[covers[-1]])
        elif node.name.endswith("_dequantize"):
            found[node.name] = (node.name.removesuffix("_dequantize"), None)
    if step.stage <= Stage.FUSED:
        old, new = (Viewer().view(s.gm, s.stage) for s in (floats, step))
        found |= {now: (gone, None) for gone, now in stand_ins(old, new).items()}
    return found
