"""Gather what the native engine has kernels for into regions, each of which becomes one program.

Before::

    %q = qfx.quantize(%x, ...)
    %conv = StaticLeaf<conv1>(%q)
    %pool = LoopLeaf<pool>(%conv)
    %odd = some_operator(%pool)

After::

    %native = NativeRegion<native>(%x)
    %odd = some_operator(%native)

The region keeps the lowered graph of its nodes, and runs that where no program can be. Declines, with a note, what has
no native kernel, and regions without a layer: they would save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx import jit
from qfx.meta import add_notes
from qfx.patterns import NoMatch
from qfx.stage import Stage
from qfx.targets.native.choice import Tune


@dataclass(frozen=True)
class CompileRegions:
    """Puts regions in place of what has native kernels. ``isa`` and ``tune`` as of :class:`qfx.targets.Native`."""

    isa: str | None = None
    tune: Tune | None = None

    name: ClassVar[str] = "compile-regions"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.LOWERED, Stage.LOWERED)
    writes: ClassVar[frozenset[str]] = frozenset({"fused", "reason"})

    def run(self, gm: fx.GraphModule) -> int:
        if (reason := jit.unavailable()) is not None:
            add_notes(gm, "not native", [reason])
            return 0
        # here, since the generator is much code that few models need
        from qfx.targets.native.grouping import free_nodes, groups_of
        from qfx.targets.native.replacing import call_regions

        misses: list[NoMatch] = []
        free = free_nodes(gm)
        groups = groups_of(gm, free, misses)
        call_regions(gm, groups, free, self.isa, self.tune)
        add_notes(gm, "not native", [str(miss) for miss in misses])
        return len(groups)
