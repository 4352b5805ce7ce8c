"""Nets for the native engine: many small branches in one program, since compiling one takes seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import qfx
from qfx.ops import quantize
from qfx.targets.base import QParams
from qfx.targets.native.agreement import Disagreement, compare
from qfx.targets.native.inlined import inlined, regions_of
from qfx.targets.native.region import NativeRegion

RELATIVE = 1e-5
"""Of floats: the greatest difference by the greatest magnitude."""


class Net(nn.Module):
    """``Net(lambda self, x: ..., conv=nn.Conv2d(...))``."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self, *inputs)


class Branches(nn.Module):
    """All branches on the same inputs; a tuple of their results."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(*inputs) for branch in self.branches.values())


def native(
    model: nn.Module, *example: Tensor, recipe: Any = "int8", target: Any = "native", **options: Any
) -> fx.GraphModule:
    """The model on the native engine, calibrated on the example alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = qfx.quantize(model.eval(), example, target=target, recipe=recipe, verbose=False, **options)
    assert isinstance(made, fx.GraphModule)
    return made


def linears(**ends: tuple[int, int]) -> dict[str, nn.Module]:
    """Layers by their names, of so many features in and out."""
    return {name: nn.Linear(*sizes) for name, sizes in ends.items()}


def kernels(made: nn.Module, *inputs: Tensor) -> list[str]:
    """The steps of the only region's program."""
    ((region, args),) = calls_of(made, *inputs)
    program = region.program(*args)
    assert program is not None
    return [step.kernel for step in program.steps]


def rounded(root: nn.Module, x: fx.Node, q: QParams) -> fx.Node:
    """``x``, quantized per tensor in its graph, whose module is ``root``."""
    root.register_buffer(f"{x.name}_scale", q.scale)
    root.register_buffer(f"{x.name}_zero_point", q.zero_point)
    scale, zero_point = (x.graph.get_attr(f"{x.name}_{what}") for what in ("scale", "zero_point"))
    return x.graph.call_function(quantize, (x, scale, zero_point, None, None, q.quant_min, q.quant_max, q.dtype))


def region_of(gm: nn.Module) -> NativeRegion:
    """The only region."""
    (region,) = regions_of(gm).values()  # type: ignore[arg-type]
    return region


def calls_of(gm: nn.Module, *inputs: Tensor) -> list[tuple[NativeRegion, tuple[Tensor, ...]]]:
    """What every region is called with when the model runs."""
    found: list[tuple[NativeRegion, tuple[Tensor, ...]]] = []

    def note(region: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(region, NativeRegion)
        found.append((region, args))

    handles = [region.register_forward_pre_hook(note) for region in regions_of(gm).values()]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            gm(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def disagreements(gm: nn.Module, *inputs: Tensor, regions: int = 1) -> list[Disagreement]:
    """Every value of the programs against the reference, none of which may have been declined."""
    calls = calls_of(gm, *inputs)
    assert len(calls) == regions
    found = []
    for region, args in calls:
        values = compare(region, args, exact=True)
        assert values, f"no program: {region.declined}"
        found += values
    return found


def assert_agrees(gm: nn.Module, *inputs: Tensor, regions: int = 1, lsb: int = 0) -> list[Disagreement]:
    """Every value is the reference's, integers to ``lsb``; and the outputs are near those of the graph of leaves."""
    found = disagreements(gm, *inputs, regions=regions)
    off = {d.node.name: d for d in found if (d.lsb or 0) > lsb or (d.relative or 0.0) > RELATIVE}
    assert not off, off
    with torch.no_grad():
        assert_near(gm(*inputs), inlined(gm)(*inputs))  # type: ignore[arg-type]
    return found


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    parts: Sequence[Any] = list(values.values()) if isinstance(values, dict) else values
    return [tensor for part in parts for tensor in flat(part)]


def assert_near(got: Any, expected: Any, tolerance: float = 0.05) -> None:
    """Integers that differ by one on the way move a result a little: this sees what is wrong, not what is rounded."""
    left, right = flat(got), flat(expected)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if one.numel():
            off = (one.double() - other.double()).abs().max()
            assert off <= tolerance * other.double().abs().max() + 1e-6, float(off)
