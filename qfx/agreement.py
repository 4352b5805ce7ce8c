"""The contract of conversion: the prepared model in eval mode and the integer model agree, layer by layer.

Both are run node by node on one batch. Every layer of the integer model is fed the values that the prepared model has
there, so that no rounding of an earlier layer is counted twice; what it makes of them lies within one step of the
output's scale (1 LSB) of what the prepared model makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from qfx import affine
from qfx.errors import VerifyError
from qfx.fake_quant import FakeQuantize
from qfx.meta import info
from qfx.operators import is_constant
from qfx.ops import quantize
from qfx.roundings import fake_quants
from qfx.targets import Leaf
from qfx.targets.native.agreement import Disagreement, compare
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.region import NativeRegion

LARGEST_FLOAT = 1e-3
"""The greatest difference of a float32 result, relative to the greatest magnitude."""


@dataclass(frozen=True)
class LayerAgreement:
    """How far a layer of the integer model is from the prepared one: ``lsb`` of integers, ``relative`` of floats.

    ``allowed``: how large that may be. Half-precision values are themselves rounded, in the prepared model.
    """

    node: str
    layer: str
    lsb: int | None
    relative: float | None
    allowed: float

    @property
    def holds(self) -> bool:
        return (self.relative or 0.0 if self.lsb is None else self.lsb) <= self.allowed


@dataclass(frozen=True)
class Rounding:
    """The FakeQuantize call ``node`` and the integers that it stands for; its module may be gone by the time."""

    node: str
    layer: str
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    group_size: int | None
    quant_min: int
    quant_max: int

    @classmethod
    def of(cls, node: str, module: FakeQuantize) -> Rounding:
        layout = (module.axis, module.group_size, module.spec.quant_min, module.spec.quant_max)
        return cls(node, module.layer, module.scale, module.zero_point, *layout)

    def integers(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        layout = {"axis": self.axis, "group_size": self.group_size}
        limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        return affine.quantize(x, self.scale, self.zero_point, **layout, **limits, dtype=dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recorded:
    """Every value of a run by its node's name, and what rounds the values of a node, by that node's name.

    ``own``: what a rounding whose result was forced made itself.
    """

    values: Mapping[str, Any]
    rounded: Mapping[str, Rounding]
    own: Mapping[str, Tensor]


def record(gm: fx.GraphModule, inputs: tuple[Any, ...], forced: Recorded | None = None) -> Recorded:
    """Run a prepared graph in eval mode with rounding on; ``forced`` gives the values that its roundings shall have."""
    runner = _Recorder(gm, forced)
    with torch.no_grad(), rounding_on(gm):
        runner.run(*inputs, enable_io_processing=False)
    return Recorded(runner.values, runner.rounded, runner.own)


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, forced: Recorded | None) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}
        self.rounded: dict[str, Rounding] = {}
        self.own: dict[str, Tensor] = {}
        self.forced = forced

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        source = n.args[0] if n.args else None
        if (
            isinstance(module, FakeQuantize)
            and not module.dynamic
            and isinstance(source, fx.Node)
            and not is_constant(source)
        ):
            self.rounded.setdefault(source.name, Rounding.of(n.name, module))
            if self.forced is not None and n.name in self.forced.values:
                self.own[n.name], result = result, self.forced.values[n.name]
        self.values[n.name] = result
        return result


@contextmanager
def rounding_on(gm: fx.GraphModule) -> Iterator[None]:
    """Let a calibrated graph round its values meanwhile, as after conversion."""
    modules = list(dict.fromkeys(m for _, m in fake_quants(gm)))
    before = [m.quantizing for m in modules]
    try:
        for m in modules:
            m.quantizing = True
        yield
    finally:
        for m, was in zip(modules, before, strict=True):
            m.quantizing = was


def settled_agreement(live: Recorded, settled: Recorded) -> list[LayerAgreement]:
    """The trained graph against what settle-training made of it, at every rounding and at its float results."""
    found = []
    for source, rounding in settled.rounded.items():
        name = rounding.node
        if name in settled.own:
            got, want = (rounding.integers(t, torch.int32) for t in (settled.own[name], live.values[name]))
            allowed = _allowed_lsb(live.values[name])
            found.append(LayerAgreement(source, rounding.layer, _lsb(got, want), None, allowed))
    for want, got in zip(tree_leaves(live.values["output"]), tree_leaves(settled.values["output"]), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            found.append(LayerAgreement("output", "", None, _relative(want, got), _allowed(want)))
    return found


def lowered_agreement(settled: Recorded, lowered: fx.GraphModule, inputs: tuple[Any, ...]) -> list[LayerAgreement]:
    """The CALIBRATED graph, as recorded, against the LOWERED one at every leaf, and native programs against leaves."""
    runner = _Forced(inlined(lowered), settled)
    with torch.no_grad():
        runner.run(*inputs, enable_io_processing=False)
    return runner.found + _native_agreement(lowered, inputs)


def _native_agreement(lowered: fx.GraphModule, inputs: tuple[Any, ...]) -> list[LayerAgreement]:
    """Every value of every program against what its leaf makes of the program's own inputs."""
    if not regions_of(lowered):
        return []
    runner = _Regions(lowered)
    with torch.no_grad():
        runner.run(*inputs, enable_io_processing=False)
    return [
        LayerAgreement(d.node.name, info(d.node).origin, d.lsb, d.relative, LARGEST_FLOAT if d.lsb is None else 1)
        for d in runner.found
    ]


class _Regions(fx.Interpreter):
    """Runs the lowered graph, and compares each region on what it is given."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[Disagreement] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, NativeRegion):
            self.found += compare(module, args)
        return super().call_module(target, args, kwargs)


class _Forced(fx.Interpreter):
    """Runs the lowered graph; where the recorded run has the same value, that is what the next layer gets."""

    def __init__(self, gm: fx.GraphModule, settled: Recorded) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.settled = settled
        self.found: list[LayerAgreement] = []

    def run_node(self, n: fx.Node) -> Any:
        leaf = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        result = super().run_node(n)
        if isinstance(leaf, Leaf):
            covers = info(n).fused
            return self._forced(n, covers[-1] if covers else "", result, compare=True)
        if n.target is quantize:
            return self._forced(n, n.name.removesuffix("_quantize"), result, compare=False)
        return result

    def _forced(self, n: fx.Node, source: str, result: Any, *, compare: bool) -> Any:
        settled = self.settled
        if not isinstance(result, Tensor) or source not in settled.values:
            return result
        if result.is_floating_point():
            want = settled.values[source]
            if compare:
                off = _relative(want, result)
                self.found.append(LayerAgreement(n.name, info(n).origin, None, off, _allowed(want)))
            return torch.empty_like(result).copy_(want) if want.shape == result.shape else result
        if source not in settled.rounded:
            return result
        rounding = settled.rounded[source]
        want = rounding.integers(settled.values[rounding.node], result.dtype)
        if compare:
            allowed = _allowed_lsb(settled.values[source])
            self.found.append(LayerAgreement(n.name, info(n).origin, _lsb(want, result), None, allowed))
        return torch.empty_like(result).copy_(want)  # in the layout that the next kernel expects


def _lsb(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max()) if a.numel() else 0


def _relative(want: Tensor, got: Tensor) -> float:
    if want.shape != got.shape or not want.numel():
        return 0.0 if want.shape == got.shape else float("inf")
    off, most = float((want.double() - got.double()).abs().max()), float(want.double().abs().max())
    return 0.0 if off == 0.0 else off / most if most else float("inf")


def _allowed(want: Tensor) -> float:
    """Two roundings of the value's own dtype where these are coarser than what kernels may differ by."""
    return max(LARGEST_FLOAT, 2 * torch.finfo(want.dtype).eps)


def _allowed_lsb(rounded: Tensor) -> int:
    """One, and what the dtype of the value that was rounded to 8 bits cannot tell."""
    return 1 + int(255 * torch.finfo(rounded.dtype).eps)


def require(found: Sequence[LayerAgreement]) -> None:
    """Raise where a layer breaks the contract.

    Raises:
        VerifyError: naming the first layer that does.
    """
    for layer in found:
        if not layer.holds:
            unit = "LSB" if layer.lsb is not None else "of its greatest magnitude"
            off = f"{layer.relative if layer.lsb is None else layer.lsb:.2g} {unit}"
            allowed = f"{layer.allowed:.2g}" + (" LSB" if layer.lsb is not None else "")
            raise VerifyError(
                f"the integer model is off by {off} at {layer.node!r} where it may be off by {allowed}",
                where=layer.layer,
                hint="report it with the model; convert(check=False) leaves the comparison out",
            )
