"""Calibration: data run through a prepared model, observed by its FakeQuantize modules."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import Subset
from tqdm import tqdm

from qfx.digests import MOST, digests_of, rows_of
from qfx.errors import CalibrationError, CaptureError, QfxWarning
from qfx.examples import Example, calibration_call
from qfx.fake_quant import FakeQuantize
from qfx.kept_calls import KeptCalls
from qfx.meta import add_notes, update_graph
from qfx.operators import is_constant, mutates
from qfx.rewrite import evaluate
from qfx.roundings import fake_quants
from qfx.stage import Stage
from qfx.trained_fake_quant import TrainedFakeQuantize

log = logging.getLogger(__name__)

ENOUGH_SAMPLES = 32
CLIPPED = 8.0


class CalibrationWarning(QfxWarning):
    """The data are too few, or look like data for testing: ranges may not hold for other data."""


class OutlierWarning(QfxWarning):
    """A few values lie far outside the range that quantizes the others best: they are clipped."""


def observe_weights(gm: fx.GraphModule) -> None:
    """Let the FakeQuantize modules of constants see them, once: no batch changes them."""
    for node, module in fake_quants(gm):
        source = node.args[0]
        if isinstance(source, fx.Node) and is_constant(source) and module.observer is not None:
            module.observer(evaluate(gm, source))
            module.calculate()


def run(
    model: nn.Module,
    graphs: Iterable[fx.GraphModule],
    data: Iterable[Any],
    example: Example,
    kept: KeptCalls | None = None,
) -> tuple[int, Any, tuple[str, ...]]:
    """Run ``data`` through ``model`` while its activations are observed; returns samples, the last call, and digests.

    ``kept`` is told of every item before it is run.

    Raises:
        CalibrationError: there are no data, or an item does not fit the example.
    """
    graphs = list(graphs)
    active = seeing_batches(graphs)
    _looks_like_test_data(data)
    samples, last = 0, None
    seen: tuple[str, ...] = ()
    writes = model not in graphs or any(mutates(n) for gm in graphs for n in gm.graph.nodes)
    with collecting(active):
        for number, item in enumerate(_with_bar(data)):
            call = calibration_call(item, example, number)
            last = call
            if kept is not None:
                kept.item = item
            tensors = [t for t in call.tensors().values() if isinstance(t, Tensor)]
            seen += digests_of(tensors, MOST - len(seen))
            _observe(model, _copied(call) if writes else call, number)
            samples += rows_of(tensors)
    if last is None:
        raise CalibrationError(
            "the calibration data are empty",
            hint="a generator is exhausted after one use: pass a list, a DataLoader, or a fresh generator",
        )
    for module in active:
        module.calculate()
    for gm in graphs:
        settle(gm)
    if active and any(m.observer is not None for m in active) and samples < ENOUGH_SAMPLES:
        note = f"ranges come from {samples} sample{'s' * (samples != 1)}; {ENOUGH_SAMPLES} or more are usual"
        warnings.warn(CalibrationWarning(f"{note}. Pass calibration= with real inputs."), stacklevel=4)
        for gm in graphs:
            add_notes(gm, "warning", [note])
    return samples, _copied(last), seen


def seeing_batches(graphs: Iterable[fx.GraphModule]) -> list[FakeQuantize]:
    """The modules that batches reach, once each, though several nodes may call them."""
    return list(dict.fromkeys(m for gm in graphs for n, m in fake_quants(gm) if _sees_batches(n, m)))


@contextmanager
def collecting(modules: Iterable[FakeQuantize]) -> Iterator[None]:
    """Let the modules observe what runs through them meanwhile."""
    modules = list(modules)
    try:
        for module in modules:
            module.collect(True)
        yield
    finally:
        for module in modules:
            module.collect(False)


def settle(gm: fx.GraphModule) -> None:
    """Take a graph whose ranges are calculated for calibrated; tell where they clip."""
    update_graph(gm, stage=Stage.CALIBRATED.name)
    _warn_outliers(gm)


def _sees_batches(node: fx.Node, module: FakeQuantize) -> bool:
    """A weight is seen beforehand; except in training, where what quantizes it may depend on batch norms."""
    source = node.args[0]
    return isinstance(module, TrainedFakeQuantize) or not (isinstance(source, fx.Node) and is_constant(source))


def _copied(call: Example) -> Example:
    """The call on copies of its tensors, for models that write to their inputs and loaders that reuse a buffer."""
    return Example(*tree_map_only(Tensor, Tensor.clone, (call.args, dict(call.kwargs))))


def _observe(model: nn.Module, call: Example, number: int) -> None:
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    except CaptureError as error:
        what = f"calibration item {number} is no call of the captured model: {error.what}"
        raise CalibrationError(what, source=error.source, hint=error.hint) from error


def _with_bar(data: Iterable[Any]) -> Iterator[Any]:
    """A progress bar that shows itself after two seconds of work."""
    return iter(tqdm(data, desc="calibrate", delay=2.0, leave=False, unit="batch"))


def _looks_like_test_data(data: Any) -> None:
    dataset = getattr(data, "dataset", data)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    split = str(getattr(dataset, "split", "")).lower()
    if getattr(dataset, "train", None) is False or split in ("test", "val", "valid", "validation"):
        warnings.warn(
            CalibrationWarning(
                "the calibration data look like a held-out split: accuracy measured on it would be too good. "
                "Calibrate on training data."
            ),
            stacklevel=5,
        )


def _warn_outliers(gm: fx.GraphModule) -> None:
    """Tell where the chosen range is far narrower than the data."""
    found = []
    for module in dict.fromkeys(m for _, m in fake_quants(gm)):
        extremes = getattr(module.observer, "extremes", None)
        if extremes is None or module.scale.numel() != 1:
            continue
        steps = max(module.spec.quant_max - int(module.zero_point), int(module.zero_point) - module.spec.quant_min)
        ratio = max(abs(extremes[0]), abs(extremes[1])) / (steps * float(module.scale))
        if ratio > CLIPPED:
            found.append(f"{module.layer}: values reach {ratio:.0f} times the range that is kept")
    if found:
        found = list(dict.fromkeys(found))
        add_notes(gm, "outliers", found)
        warnings.warn(
            OutlierWarning(
                f"{len(found)} layer(s) clip outliers, first {found[0]}. If accuracy suffers, set their observer to "
                "MinMax or skip them in the recipe."
            ),
            stacklevel=6,
        )
