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
from qfx.targets.native.not_native import NotNative, writing
from qfx.targets.native.views import BATCH

_SAMPLES = (2, 3, 1009)
"""Neither 0 nor 1, which shape functions take for special; the last is where bounds and quotients show."""


SEVERAL = "several"
"""Stands for a number that depends on the batch by more than being it."""


@dataclass(frozen=True)
class Sizes:
    """``of``: of every node's value, ``BATCH`` where they follow the first dimension of the inputs.

    Rows of all samples one behind the other, ``[batch * k, ...]``, count as ``[BATCH, k, ...]``, and so in any other
    dimension; ``joined`` tells which it is of a node's value.
    """

    of: Mapping[fx.Node, Any]
    joined: Mapping[fx.Node, int]

    def axes(self, node: fx.Node) -> tuple[tuple[int, ...], ...]:
        """For each dimension of the value of ``node``, as the graph counts them, those that it has here."""
        joined, count = self.joined.get(node), len(self.of[node])
        if joined is None:
            return tuple((i,) for i in range(count))
        single = [(i,) for i in range(count)]
        return (*single[:joined], (joined, joined + 1), *single[joined + 2 :])


def sizes_of(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Sizes:
    """The sizes of every node's value.

    Raises:
        NotNative: a size depends on the batch in another way, or the graph does not run with other batches.
    """
    sizes: dict[fx.Node, Any] = {}
    joined: dict[fx.Node, int] = {}
    unfit: dict[fx.Node, str] = {}
    for node, found in tried(gm, inputs).items():
        try:
            sizes[node], at = _batched(node, found)
        except NotNative as error:
            unfit[node] = error.what
            continue
        if at is not None:
            joined[node] = at
    if unfit:
        declined = NotNative(next(iter(unfit.values())))
        declined.nodes = tuple(unfit)
        raise declined
    return Sizes(sizes, joined)


def tried(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, tuple[Any, ...]]:
    """What every node gives with several numbers of samples, on fake tensors: sizes of tensors, and plain values.

    Raises:
        NotNative: the graph does not run with other batches.
    """
    runs = [_propagate(gm, inputs, samples) for samples in _SAMPLES]
    return {node: tuple(run[node] for run in runs) for node in gm.graph.nodes}


def rows_of_samples(found: tuple[Any, ...]) -> int | None:
    """How many rows of a tensor belong to each sample, for sizes that were :func:`tried`: of the first dimension, which
    alone may depend on their number. None for all else."""
    if not _are_sizes(found) or not found[0]:
        return None
    first, *others = zip(*found, strict=True)
    return _rows(first) if all(len(set(sizes)) == 1 for sizes in others) else None


def _rows(found: tuple[int, ...]) -> int | None:
    """The factor by which a size is a multiple of the batch; None where it is none."""
    rows = found[0] // _SAMPLES[0]
    return rows if rows and all(size == rows * samples for samples, size in zip(_SAMPLES, found, strict=True)) else None


def _are_sizes(found: tuple[Any, ...]) -> bool:
    """True for sizes of one tensor, of as many dimensions each time."""
    plain = all(isinstance(sizes, tuple) and all(isinstance(size, int) for size in sizes) for sizes in found)
    return plain and len({len(sizes) for sizes in found}) == 1


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
        with writing(n):
            try:
                result = super().run_node(n)
            except Exception as error:  # whatever an operator says to sizes that it does not take
                raise NotNative(f"it does not run with other batches: {str(error).splitlines()[0]}") from error
        self.found[n] = _sizes(result)
        if value(n) is None:  # a graph that was loaded has lost its example values
            set_value(n, result)
        return result


def _sizes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(int(size) for size in result.shape)
    return tuple(_sizes(r) for r in result) if isinstance(result, tuple | list) else result


def _batched(node: fx.Node, found: tuple[Any, ...]) -> tuple[Any, int | None]:
    """What stands for the values that were ``found`` with each number of samples, and the dimension that is joined."""
    if not isinstance(found[0], tuple):
        if all(one == found[0] for one in found):
            return found[0], None
        return (BATCH if found == _SAMPLES else SEVERAL), None
    if len({len(sizes) for sizes in found}) > 1:
        raise NotNative(f"{node} gives one result for each sample")
    if not _are_sizes(found):
        return tuple(_batched(node, given)[0] for given in zip(*found, strict=True)), None
    made: list[int] = []
    joined = None
    for dim, sizes in enumerate(zip(*found, strict=True)):
        rows = _rows(sizes)
        if len(set(sizes)) == 1:
            made.append(sizes[0])
        elif rows is None:
            raise NotNative(f"a size of {node} depends on the batch by more than being it")
        elif BATCH in made:
            raise NotNative(f"two dimensions of {node} are the batch")
        elif rows == 1:
            made.append(BATCH)
        else:
            joined = dim
            made += [BATCH, rows]
    return tuple(made), joined
