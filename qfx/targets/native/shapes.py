"""The sizes of all values of a region, and which of them are the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qfx.meta import set_value, value
from qfx.targets.base import Leaf
from qfx.targets.native.not_native import NotNative
from qfx.targets.native.views import BATCH

_SAMPLES = (2, 3, 1009)
"""Neither 0 nor 1, which shape functions take for special; the last is where bounds and quotients show."""


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

    The graph is run on fake tensors with several numbers of samples: what follows them is the batch.

    Raises:
        NotNative: a size depends on the batch in another way, or the graph does not run with other batches.
    """
    try:
        runs = [_propagate(gm, inputs, samples) for samples in _SAMPLES]
    except Exception as error:  # whatever an operator says to sizes that it does not take
        raise NotNative(f"it does not run with other batches: {str(error).splitlines()[0]}") from error
    found = {node: tuple(run[node] for run in runs) for node in gm.graph.nodes}
    joined = frozenset(node for node, sizes in found.items() if _is_joined(sizes))
    return Sizes({node: _batched(node, sizes) for node, sizes in found.items()}, joined)


def _is_joined(found: tuple[Any, ...]) -> bool:
    """True for sizes of which the first is a multiple of the batch."""
    if not all(isinstance(sizes, tuple) and sizes and isinstance(sizes[0], int) for sizes in found):
        return False
    rows = found[0][0] // _SAMPLES[0]
    return rows > 1 and all(sizes[0] == rows * samples for samples, sizes in zip(_SAMPLES, found, strict=True))


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

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaf = self.fetch_attr(str(target))
        return leaf.example(*args) if isinstance(leaf, Leaf) else super().call_module(target, args, kwargs)

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


def _batched(node: fx.Node, found: tuple[Any, ...]) -> Any:
    """What stands for the values that were ``found`` with each number of samples."""
    if not isinstance(found[0], tuple):
        if all(one == found[0] for one in found):
            return found[0]
        return BATCH if found == _SAMPLES else SEVERAL
    if len({len(sizes) for sizes in found}) > 1:
        raise NotNative(f"{node} gives one result for each sample")
    if _is_joined(found):
        rows = found[0][0] // _SAMPLES[0]
        found = tuple((samples, rows, *sizes[1:]) for samples, sizes in zip(_SAMPLES, found, strict=True))
    made = tuple(_batched(node, given) for given in zip(*found, strict=True))
    if SEVERAL in made:
        raise NotNative(f"a size of {node} depends on the batch by more than being it")
    if made.count(BATCH) > 1:
        raise NotNative(f"two dimensions of {node} are the batch")
    return made
