"""Example values of a graph that has lost them, as one that was pickled has: found anew by a run on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx.calling import TensorSpec, codegen_of
from qfx.meta import set_value, value

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext


def restore_values(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Give every node its example value, where the inputs have none: sizes that were free are symbols again.

    Args:
        gm: a graph in eval mode.
        inputs: its tensors, in the order of the placeholders.
    """
    if all(value(n) is not None for n in gm.graph.nodes if n.op == "placeholder"):
        return
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # here, since it brings all of sympy

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    specs = codegen_of(gm).binder.tensors
    fakes = [mode.from_tensor(t, symbolic_context=_context(spec)) for t, spec in zip(inputs, specs, strict=True)]
    with mode, torch.no_grad():
        _Keep(gm, mode).run(*fakes, enable_io_processing=False)


def _context(spec: TensorSpec) -> StatelessSymbolicContext[Any, Any]:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    free = (isinstance(size, str) for size in spec.sizes)
    return StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC if f else DimDynamic.STATIC for f in free])


class _Keep(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr" and isinstance(result, Tensor):
            result = self.mode.from_tensor(result.detach(), static_shapes=True)
        set_value(n, result)
        return result
