"""The sizes of all values of a region, and which of them are the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx.meta import set_value, value
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.views import BATCH

_SAMPLES = (2, 3)  # neither 0 nor 1, which shape functions take for special


def sizes_of(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Mapping[fx.Node, Any]:
    """Sizes of every node's value, ``BATCH`` where they follow the first dimension of the inputs.

    The graph is run on fake tensors, with 2 samples and with 3: what differs is the batch.

    Raises:
        NotNative: a size depends on the batch in another way, or the graph does not run with other batches.
    """
    try:
        two, three = (_propagate(gm, inputs, samples) for samples in _SAMPLES)
    except Exception as error:  # whatever an operator says to sizes that it does not take
        raise NotNative(f"it does not run with other batches: {str(error).splitlines()[0]}") from error
    return {node: _batched(node, two[node], three[node]) for node in two}


def _propagate(gm: fx.GraphModule, inputs: Sequence[Tensor], samples: int) -> dict[fx.Node, Any]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = [torch.empty((samples, *x.shape[1:]), dtype=x.dtype) for x in inputs]
        recorder = _Recorder(gm)
        recorder.run(*fakes)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = _sizes(result)
        if value(n) is None:  # a graph that was loaded has lost its example values
            set_value(n, result)
        return result


def _sizes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(int(size) for size in result.shape)
    return tuple(_sizes(r) for r in result) if isinstance(result, tuple | list) else result


def _batched(node: fx.Node, two: Any, three: Any) -> Any:
    if isinstance(two, tuple):
        if len(two) != len(three):
            raise NotNative(f"{node} gives one result for each sample")
        found = tuple(_batched(node, a, b) for a, b in zip(two, three, strict=True))
        if found.count(BATCH) > 1:
            raise NotNative(f"two dimensions of {node} are the batch")
        return found
    if two == three:
        return two
    if (two, three) == _SAMPLES:
        return BATCH
    raise NotNative(f"a size of {node} depends on the batch by more than being it")
