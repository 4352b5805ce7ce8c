"""``qfx.check``: data through a quantized model, and where its ranges do not fit them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from qfx.calibration import CalibrationWarning
from qfx.calling import CallBinder, codegen_of
from qfx.digests import digests_of, rows_of
from qfx.errors import CalibrationError, CaptureError, ConfigError
from qfx.findings import Finding, LayerCheck, findings_of
from qfx.graph_module import CapturedModule
from qfx.integer_weights import WeightUse
from qfx.meta import graph_info, info
from qfx.node_table import kept_report
from qfx.operators import mutates
from qfx.portable import portable
from qfx.remedies import Mending
from qfx.rounding_sites import Site, sites_of
from qfx.shadow import undisturbed
from qfx.structure import Constant

SAME = 0.5
"""The share of samples known from calibration above which the check is one on calibration's own data."""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`check` found: ``rows`` in the order of the graph, ``findings`` likewise, ``samples`` it ran.

    ``str()`` is a table of all rows with the first findings below.
    """

    rows: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]
    samples: int

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ["operator", "layer", "part", "bits", "below", "above", "used", "drift", "outliers", "zero", "at ends"]
        aligned = ("left",) * 3 + ("right",) * 8
        table = tabulate([_cells(row) for row in self.rows], header, disable_numparse=True, colalign=aligned)
        shown = [str(finding) for finding in self.findings[:_SHOWN]]
        if len(self.findings) > _SHOWN:
            shown.append(f"… and {len(self.findings) - _SHOWN} more (diagnosis.findings)")
        text = "\n".join(shown) or "no findings"
        return f"{table}\n\n{self.samples} samples; {text}" if self.healthy else f"{table}\n\n{text}"


_SHOWN = 8


def _cells(row: LayerCheck) -> list[str]:
    shares = (row.below, row.above, row.used)
    return [
        row.operator,
        row.layer,
        row.part,
        str(row.bits),
        *("" if share is None else f"{share:.2%}" for share in shares),
        "" if row.drift is None else f"{row.drift:+.2f}",
        "" if row.outliers is None else f"{row.outliers:.1f}",
        str(len(row.zero_channels)) if row.part == "weight" else "",
        "" if row.at_ends is None else f"{row.at_ends:.2%}",
    ]


def check(qmodel: nn.Module, data: Iterable[Any], *, limit: int | None = None) -> Diagnosis:
    """Run ``data`` through a quantized model; tell where its ranges do not fit them, and what to change.

    The model's CONVERTED graph runs, which its kernels equal within 1 LSB; ``qmodel`` stays as it is. It computes on
    its own rounded values, so that what one layer clips, the next ones see.

    Args:
        qmodel: what ``qfx.quantize``, ``qfx.convert`` or ``qfx.load`` returned.
        data: an iterable of calls, as for :func:`qfx.calibrate`, other than those that the model was calibrated on:
            where most samples are the same, a CalibrationWarning says so.
        limit: run so many items at most.

    Raises:
        CalibrationError: the data are empty, an item is no call of the model, or NaN or infinity reach a layer, which
            the text names.
        ConfigError: qfx did not quantize the model, or only parts of it, or nothing in it is quantized.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit is {limit!r}", hint="give the number of items to run, or None for all")
    if isinstance(data, Tensor | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CalibrationError(
            f"the data are one {type(data).__name__}",
            hint="give an iterable of calls: a list of it, a DataLoader, a generator",
        )
    gm = _graph(qmodel)
    sites = sites_of(gm)
    if not sites:
        raise ConfigError(
            f"nothing in {type(qmodel).__name__} is quantized", hint="print(qfx.report(qmodel)) says why not"
        )
    report = kept_report(qmodel)
    samples = _run(gm, islice(data, limit), sites, set(report.calibration) if report is not None else set())
    recipe = graph_info(gm).asked
    rows = tuple(site.row() for site in sites)
    mending = Mending(recipe)
    found: list[Finding] = []
    for site, row in zip(sites, rows, strict=True):
        found += findings_of(row, partial(site.readers, recipe), mending)
    return Diagnosis(rows, tuple(found), samples)


def _graph(qmodel: nn.Module) -> CapturedModule:
    """The graph to run: a copy where running it writes to it."""
    if not graph_info(qmodel).stage and (
        parts := [path for path, part in qmodel.named_modules() if graph_info(part).stage]
    ):
        raise ConfigError(
            f"{type(qmodel).__name__} was captured in {len(parts)} parts, the first is {parts[0]!r}",
            hint=f"check part by part: qfx.check(model.get_submodule({parts[0]!r}), its own inputs)",
        )
    gm = portable(qmodel)
    return copy.deepcopy(gm) if any(mutates(n) for n in gm.graph.nodes) else gm


def _run(gm: CapturedModule, data: Iterable[Any], sites: list[Site], calibrated: set[str]) -> int:
    """Show the data to the sites; returns how many samples they were."""
    binder = codegen_of(gm).binder
    watcher = _Watcher(gm, sites)
    device = next((t.device for t in (*gm.buffers(), *gm.parameters())), torch.device("cpu"))
    samples, met = 0, set()
    with undisturbed():
        for number, item in enumerate(data):
            inputs = [t.to(device) for t in _inputs(item, binder, number)]
            samples += rows_of(inputs)
            if calibrated:
                met |= calibrated & set(digests_of(inputs, most=rows_of(inputs)))
            watcher.number = number
            watcher.run(*(t.clone() for t in inputs), enable_io_processing=False)
    if not samples:
        raise CalibrationError(
            "there are no data", hint="a generator is exhausted after one use: pass a list, or a fresh generator"
        )
    if len(met) > SAME * min(len(calibrated), samples):
        warnings.warn(
            CalibrationWarning(
                f"{len(met)} of the {samples} samples are those that the model was calibrated on, whose ranges fit "
                "them. Check it on others."
            ),
            stacklevel=4,
        )
    return samples


def _inputs(item: Any, binder: CallBinder, number: int) -> tuple[Tensor, ...]:
    """The tensors of a data item in the order of the graph's placeholders; labels behind them are ignored."""
    where = f"item {number} of the data"
    if not isinstance(item, Tensor | tuple | list | Mapping):
        raise CalibrationError(f"{where} is a {type(item).__name__}", hint="yield tensors, tuples or dicts")
    positional, names = _asked(binder)
    try:
        if isinstance(item, Mapping):
            return binder.flat((), {name: item[name] for name in names if name in item})
        return binder.flat((item,) if isinstance(item, Tensor) else tuple(item)[:positional], {})
    except CaptureError as error:
        what = f"{where} is no call of the model: {error.what}"
        raise CalibrationError(what, source=error.source, hint=error.hint) from error


def _asked(binder: CallBinder) -> tuple[int, list[str]]:
    """How many positional arguments a call has, and the names of those that are not the model's own defaults."""
    positional, names = 0, []
    for place, (p, structure) in enumerate(zip(binder.parameters, binder.structure.children, strict=True)):
        if isinstance(structure, Constant) and p.has_default and structure.value is p.default:
            continue
        keys = [str(key) for key in structure.keys] if p.kind.startswith("VAR_") else [p.name]  # type: ignore[union-attr]
        if p.kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD"):
            positional = place + 1
        elif p.kind == "VAR_POSITIONAL":
            positional += len(keys)
            continue
        names += keys
    return positional, names


class _Watcher(fx.Interpreter):
    """Shows every value that is rounded to its site."""

    def __init__(self, gm: CapturedModule, sites: list[Site]) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.watched = {site.node: site for site in sites if not isinstance(site.use, WeightUse)}
        self.number = 0

    def run_node(self, n: fx.Node) -> Any:
        site = self.watched.get(n)
        if site is not None:
            assert not isinstance(site.use, WeightUse)
            value = self.env[site.source]
            self._require_finite(site.source, value)
            site.use.add(value)
        result = super().run_node(n)
        if n.op == "placeholder" and isinstance(result, Tensor) and result.is_floating_point():
            self._require_finite(n, result, infinity=True)
        return result

    def _require_finite(self, source: fx.Node, value: Tensor, *, infinity: bool = False) -> None:
        """Raise where the value holds NaN, or infinity unless an input may (a mask, say)."""
        if bool(torch.isfinite(value).all()) or (infinity and not bool(torch.isnan(value).any())):
            return
        kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
        raise CalibrationError(
            f"item {self.number} of the data gives {kind} here",
            where=_first_layer(source),
            hint="look for NaN in the data, a division by zero or an unmasked -inf before this layer",
        )


def _first_layer(source: fx.Node) -> str:
    """The layer that the value comes from; of an input, the first that reads it."""
    todo = [source]
    while todo:
        if layer := info(todo[0]).origin:
            return layer
        todo += todo.pop(0).users
    return source.name
