"""The programs that run when a region is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx.targets.native.compiled import Compiled
from qfx.targets.native.declined import Declined
from qfx.targets.native.region import NativeRegion

Called = tuple[NativeRegion, Compiled, tuple[Tensor, ...]]


def programs_of(region: NativeRegion, inputs: tuple[Tensor, ...]) -> list[Called]:
    """Every program that runs for ``inputs``, with its region and what it is called with.

    One, or several where the region is cut, or none where it runs as the lowered graph does. Programs are made now if
    need be.
    """
    made = region.outcome(*inputs)
    if not isinstance(made, Declined):
        return [(region, made, inputs)]
    if not made.parts:
        return []
    assert isinstance(made.instead, fx.GraphModule)
    runner = _Parts(made.instead)
    with torch.no_grad():
        runner.run(*inputs)
    return runner.found


class _Parts(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: list[Called] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, NativeRegion):
            self.found += programs_of(module, args)
        return super().call_module(target, args, kwargs)
