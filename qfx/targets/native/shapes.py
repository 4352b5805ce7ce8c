"""The sizes of all values of a region, and which of them are the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx.meta import set_value, value
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.views import BATCH

_SAMPLES = (2, 3)  # neither 0 nor 1, which shape functions take for special


SEVERAL = "several"
"""Stands for a number that depends on the batch by more than being it."""


@dataclass(frozen=True)
class Sizes:
    """``of``: of every node's value, ``BATCH`` where they follow the first dimension of the inputs.

    Rows of all samples one behind the other, ``[batch * k, ...]``, count as ``[BATCH, k, ...]``; ``joined`` has them.
    """

    of: Mapping[fx.Node, Any]
    joined: frozenset[fx.Node]


def sizes_of(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Sizes:
    """The sizes of every node's value.

    The graph is run on fake tensors, with 2 samples and with 3: what differs is the batch.

    Raises:
        NotNative: a size depends on the batch in another way, or the graph does not run with other batches.
    """
    try:
        two, three = (_propagate(gm, inputs, samples) for samples in _SAMPLES)
    except Exception as error:  # whatever an operator says to sizes that it does not take
        raise NotNative(f"it does not run with other batches: {str(error).splitlines()[0]}") from error
    joined = frozenset(node for node in two if _is_joined(two[node], three[node]))
    return Sizes({node: _batched(node, two[node], three[node]) for node in two}, joined)


def _is_joined(two: Any, three: Any) -> bool:
    """True for sizes of which the first is a multiple of the batch."""
    if not (isinstance(two, tuple) and two and isinstance(two[0], int)):
        return False
    return _SAMPLES[0] < two[0] < three[0] and two[0] % _SAMPLES[0] == 0 and 3 * two[0] == 2 * three[0]


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
        if _is_joined(two, three):
            rows = two[0] // _SAMPLES[0]
            two, three = ((samples, rows, *sizes[1:]) for samples, sizes in zip(_SAMPLES, (two, three), strict=True))
        found = tuple(_batched(node, a, b) for a, b in zip(two, three, strict=True))
        if SEVERAL in found:
            raise NotNative(f"a size of {node} depends on the batch by more than being it")
        if found.count(BATCH) > 1:
            raise NotNative(f"two dimensions of {node} are the batch")
        return found
    if two == three:
        return two
    return BATCH if (two, three) == _SAMPLES else SEVERAL
