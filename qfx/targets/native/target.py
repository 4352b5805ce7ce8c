"""The target ``native``: the leaves of ``x86``, gathered into programs of generated C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx import jit
from qfx.errors import ConfigError
from qfx.operators import Op
from qfx.patterns import NoMatch
from qfx.spec import QConfig
from qfx.targets.base import AnchorRegion, Leaf
from qfx.targets.native.choice import SCALES, Tune
from qfx.targets.native.isa import find, supported
from qfx.targets.native.weight_only import NativeWeightOnlyLeaf
from qfx.targets.reference import MatmulLeaf, Reference
from qfx.targets.x86 import PRODUCTS, X86


@dataclass(frozen=True)
class Native(X86):
    """Everything that ``x86`` takes. What the generator has no kernel for, or no compiler, runs as there.

    ``isa``: the name of an instruction set of :data:`qfx.targets.native.isa.ISAS`; None takes the widest that this CPU
    has. ``tune``: find the kernel and the block sizes of each layer by measurement, among a few (``"fast"``) or many
    (``"full"``); a region that then still loses against float kernels runs in float. What was found is kept on disk.
    """

    isa: str | None = None
    tune: Tune | None = None

    name: ClassVar[str] = "native"

    def __post_init__(self) -> None:
        if self.isa is not None:
            find(self.isa)
        if self.tune not in (None, *SCALES):
            raise ConfigError(f"tune is {self.tune!r}", hint="give 'fast', 'full' or None")

    def refuses(self, node: fx.Node, op: Op, qconfig: QConfig) -> str | None:
        if op.name in PRODUCTS and jit.unavailable() is None:
            return Reference().refuses(node, op, qconfig)
        return super().refuses(node, op, qconfig)

    def lower_anchor(self, region: AnchorRegion) -> Leaf | NoMatch:
        if region.op.weight is None and jit.unavailable() is None:
            return MatmulLeaf(region)
        if region.data is None and region.op.name == "linear" and jit.unavailable() is None:
            return NativeWeightOnlyLeaf(region)
        return super().lower_anchor(region)

    def slow(self) -> str | None:
        reason = jit.unavailable()
        if reason is not None:
            return f"no native program is made, everything runs as on x86: {reason}"
        if supported()[0].feature == "":
            return "this CPU has none of the instructions that the native kernels are written for"
        return None
