"""The second-order score: what every width of every layer costs, from one backward pass a batch.

Rounding moves the outputs z by J d, where d is the rounding error of one tensor and J the network's Jacobian. For small
errors the Kullback-Leibler divergence of the classes is half the Fisher information in that direction::

    KL(p(z) || p(z + J d))  ~  1/2 (J d)^T F (J d),   F = diag(p) - p p^T

With signs e_c drawn at random, the gradient of ``l = sum_c e_c sqrt(p_c) log p_c`` in the direction d is ``s = dl/dz J
d``, and the mean of s^2 over the signs is that quadratic form: one backward pass serves all layers and widths, and all
classes count. s is taken for each sample apart: in the value that a layer reads, for its data, and in the layer's
result, which is linear in the weight, for its weight.

Methods: the Fisher information as the Hessian of the divergence, Martens, 2020 (arXiv:1412.1193), sections 5 and 9;
quadratic forms estimated with random signs, Hutchinson, 1990.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.errors import ConfigError
from qfx.layers import Layer, source_of
from qfx.meta import value
from qfx.operators import lookup, mutates, tensor_inputs
from qfx.replay import loaded
from qfx.samples import Sample
from qfx.widths import Rounders, Trial

Sums = tuple[float, float]


@dataclass(frozen=True)
class _Read:
    """One operator of a layer in a run with gradients: the data it read, its result, and its other arguments."""

    layer: Layer
    call: fx.Node
    data: Mapping[int, Tensor]
    result: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recording(fx.Interpreter):
    """Runs a prepared graph with gradients from every layer's data on, and keeps what the layers read and made."""

    def __init__(self, gm: fx.GraphModule, layers: Sequence[Layer]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._layers = {call: layer for layer in layers for call in layer.calls}
        self.reads: list[_Read] = []

    def run_node(self, n: fx.Node) -> Any:
        layer = self._layers.get(n)
        if layer is None:
            return super().run_node(n)
        data: dict[int, Tensor] = {}

        def noting(position: int) -> Any:
            def note(x: Tensor) -> Tensor:
                data[position] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                return data[position]

            return note

        args, kwargs = loaded(n, {i: noting(i) for i in layer.data}, self.env.__getitem__)
        result = self.call_function(n.target, args, kwargs)
        self.reads.append(_Read(layer, n, data, result, args, kwargs))
        return result


def estimate(
    gm: fx.GraphModule, layers: Sequence[Layer], trials: Iterable[Trial], sample: Sample, rounders: Rounders, seed: int
) -> dict[Trial, Sums]:
    """For every trial the sum of divergences over the sample's rows, in nats, and the number of rows.

    Raises:
        ConfigError: the graph returns no floating-point tensor, or writes to one while it runs.
    """
    if any(mutates(n) for n in gm.graph.nodes):
        raise ConfigError(
            "this model writes to a tensor in place, so no gradient runs through its graph",
            hint="choose score='kl' or score='sqnr', which need none",
        )
    wanted: dict[str, list[Trial]] = {}
    for trial in trials:
        wanted.setdefault(trial.key, []).append(trial)
    recording = _Recording(gm, [layer for layer in layers if layer.key in wanted])
    with torch.enable_grad():
        outputs = recording.run(*sample.inputs, enable_io_processing=False)
        logits = sample.scored(outputs if isinstance(outputs, tuple | list) else (outputs,))
        loss = _signed(logits, seed)
        reads = recording.reads
        places = [[*read.data.values(), read.result] for read in reads]
        gradients = iter(_gradients(loss, [t for place in places for t in place]))
    rows, batch = logits.numel() // logits.shape[-1], _Batch.of(gm, sample)
    steps: dict[Trial, list[Tensor]] = {trial: [] for found in wanted.values() for trial in found}
    with torch.no_grad():
        for read in reads:
            of_data = {position: next(gradients) for position in read.data}
            of_result = next(gradients)
            for trial in wanted[read.layer.key]:
                steps[trial] += _steps(read, trial, of_data, of_result, rounders, batch)
    return {trial: (0.5 * float(batch.together(found).square().sum()), float(rows)) for trial, found in steps.items()}


def _signed(logits: Tensor, seed: int) -> Tensor:
    """``sum_c e_c sqrt(p_c) log p_c`` over all rows, with signs drawn from ``seed``."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, logits.shape, generator=random, device="cpu").mul_(2).sub_(1).to(logits.device)
    log_p = torch.log_softmax(logits.float(), -1)
    return (signs * (log_p.detach() / 2).exp() * log_p).sum()


def _gradients(loss: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """None for what the loss does not depend on."""
    if not loss.requires_grad:
        return [None] * len(of)
    return torch.autograd.grad(loss, of, allow_unused=True)


def _steps(
    read: _Read,
    trial: Trial,
    of_data: Mapping[int, Tensor | None],
    of_result: Tensor | None,
    rounders: Rounders,
    batch: _Batch,
) -> list[Tensor]:
    """How far the signed loss moves to first order, for every value that the trial rounds (:meth:`_Batch.products`)."""
    if trial.part == "weight":
        moved = _moved(read, rounders.weight(read.layer, trial.bits))
        return [batch.products(read.call, of_result, moved)]
    return [
        batch.products(
            source_of(read.call, position), of_data[position], rounders.data(read.call, position, trial.bits)(x) - x
        )
        for position, x in read.data.items()
    ]


def _moved(read: _Read, rounded: Tensor) -> Tensor:
    """How far the layer's result moves when its weight is rounded: the same operator on the error alone."""
    row = lookup(read.call)
    assert row is not None and row.weight is not None
    args = list(read.args)
    args[row.weight] = rounded - args[row.weight]
    if row.bias is not None and len(args) > row.bias:
        args[row.bias] = None
    moved: Tensor = read.call.target(*args, **read.kwargs)  # type: ignore[operator]
    return moved


@dataclass(frozen=True)
class _Batch:
    """The samples of one run: the free leading size of the graph's inputs as a symbol, and what it is in this run.

    Without such a size the whole run counts as one sample: the mean over the signs stays, its variance is greater.
    """

    symbol: Any
    size: int

    @classmethod
    def of(cls, gm: fx.GraphModule, sample: Sample) -> _Batch:
        for node, given in zip(gm.graph.find_nodes(op="placeholder"), sample.inputs, strict=True):
            sizes = _sizes(node)
            if sizes and not isinstance(sizes[0], int):
                return cls(sizes[0], int(given.shape[0]))
        return cls(None, 1)

    def products(self, node: fx.Node, gradient: Tensor | None, error: Tensor) -> Tensor:
        """The inner product of a gradient and an error in the value of ``node``, float64: ``[size]``, one a sample.

        ``[]``, that of all samples, where it cannot be told which element is of which, or an element is of all.
        """
        if gradient is None:  # nothing that is returned depends on it
            return torch.zeros(self.size, dtype=torch.float64)
        terms = (gradient * error).double().cpu()
        before = self._before(node)
        return terms.sum() if before is None else terms.reshape(before, self.size, -1).sum((0, 2))

    def together(self, products: Sequence[Tensor]) -> Tensor:
        """Their sum, for every sample or else over all: what one sample moves twice counts together."""
        whole = any(p.dim() == 0 for p in products)
        return sum((p.sum() if whole else p for p in products), start=torch.zeros((), dtype=torch.float64))

    def _before(self, node: fx.Node) -> int | None:
        """How many blocks of all samples follow each other: 1 in ``[N, ...]``, T in ``[T, N, ...]``, ``[T * N, ...]``.

        A size that is a multiple of the batch's was made of several: the value that it was made of tells their order.
        """
        sizes = _sizes(node)
        if self.symbol in sizes:
            outer = sizes[: sizes.index(self.symbol)]
            return math.prod(outer) if all(isinstance(size, int) for size in outer) else None
        if not sizes or isinstance(sizes[0], int) or self.symbol is None:
            return None
        made_of = next((n for n in tensor_inputs(node) if self.symbol in _all_symbols(n)), None)
        before = None if made_of is None else self._before(made_of)
        return before if before is None or before == 1 or sizes[0] == before * self.symbol else None


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of the node's value: integers, and expressions where they are free."""
    val = value(node)
    shape = val.shape if isinstance(val, Tensor) else ()
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in shape)


def _all_symbols(node: fx.Node) -> set[Any]:
    return {symbol for size in _sizes(node) if not isinstance(size, int) for symbol in size.free_symbols}
