"""One table of many runs: ``python -m qfx.tools.qat_table FILE_OR_FOLDER ... [--plot FILE.png]``.

The files are what the worked cases write with ``--json``. Runs that differ in their seed only become one row: the mean
of their drops with the least and the greatest, and the median of what was timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from qfx.errors import ConfigError
from qfx.tools.bench_figures import Bar, Skip, at_most
from qfx.tools.qat_plot import plot
from qfx.tools.qat_results import METHODS, Result, read

EPOCHS = 10
# The greatest mean drop of QAT, in points, on so many examples and with at most EPOCHS epochs.
BARS: dict[tuple[str, str, int, str], Bar] = {
    ("CIFAR-10", "resnet20", 10_000, "W8A8"): at_most(0.1),
    ("CIFAR-10", "resnet20", 10_000, "W4A4"): at_most(0.5),
    ("CIFAR-10", "resnet20", 10_000, "W3A3"): at_most(1.5),
    ("CIFAR-10", "resnet20", 10_000, "W2A2"): at_most(6.0),
    ("SST-2", "bert_small", 872, "W8A8"): at_most(0.3),
    ("SST-2", "bert_small", 872, "W4A8"): at_most(1.0),
}
# The same of plain rounding's gap, where what is quantized are the weights of a language model.
REMAINS: dict[tuple[str, str, int, str], Bar] = {
    ("TinyStories", "stories260K", 300, "W4A16"): at_most(0.5),
    ("TinyStories", "stories260K", 300, "W3A16"): at_most(0.5),
}
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """The runs that differ in their seed only."""

    runs: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.runs[0]

    @property
    def drop(self) -> float:
        return statistics.fmean(run.drop for run in self.runs)

    @property
    def value(self) -> float:
        return statistics.fmean(run.value for run in self.runs)

    def median(self, name: str) -> float | None:
        """Of a measurement, over the runs that have it."""
        found = [getattr(run, name) for run in self.runs if getattr(run, name) is not None]
        return statistics.median(found) if found else None


def rows_of(results: Iterable[Result]) -> list[Row]:
    """The results by model, then float, PTQ and QAT at each bit width, widest first."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.key[:-1], []).append(result)

    def place(row: Row) -> tuple[object, ...]:
        first = row.first
        return (first.task, first.model, first.count, *_width(first.bits), METHODS.index(first.method), _spent(first))

    return sorted((Row(tuple(runs)) for runs in groups.values()), key=place)


def table(results: Iterable[Result]) -> str:
    """The rows as text. The bars hold for the mean over the seeds."""
    rows = rows_of(results)
    # The best PTQ of each width is what QAT is compared with.
    ptq: dict[tuple[object, ...], float] = {}
    for row in rows:
        if row.first.method == "PTQ":
            ptq[_width_key(row.first)] = min(row.drop, ptq.get(_width_key(row.first), row.drop))
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        title = f"{row.first.task}, {row.first.model}, {row.first.count} examples"
        blocks.setdefault(title, []).append(_cells(row, ptq.get(_width_key(row.first))))
    names = {row.first.task: row.first.metric for row in rows}
    heads = ("", "metric", "drop", "of PTQ's", "bar", "", "MiB", "peak MiB", "ms", "speed-up", "training")
    texts = []
    for title, cells in blocks.items():
        head = tuple(names[title.split(", ")[0]] if name == "metric" else name for name in heads)
        texts.append(f"{title}\n{tabulate(cells, head, disable_numparse=True)}")
    return "\n\n".join(texts)


def _cells(row: Row, ptq_drop: float | None) -> tuple[str, ...]:
    first, is_float = row.first, row.first.method == "float"
    share = row.drop / ptq_drop if first.method == "QAT" and ptq_drop is not None and ptq_drop > 0 else None
    bar, verdict = _bar(row, share)
    size, peak = row.median("bytes"), row.median("peak_bytes")
    return (
        "float" if is_float else " ".join(filter(None, (first.method, first.bits, first.note and f"({first.note})"))),
        _number(row.value, 3 if not first.rising else 2),
        "" if is_float else _spread(row),
        _number(share, 2),
        bar,
        verdict,
        _number(None if size is None else size / MIB, 2),
        _number(None if peak is None else peak / MIB, 1),
        _number(row.median("latency_ms"), 2),
        _number(row.median("speedup"), 2),
        _training(row),
    )


def _bar(row: Row, share: float | None) -> tuple[str, str]:
    first = row.first
    name = (first.task, first.model, first.count, first.bits)
    if first.method != "QAT" or (first.epochs or 0) > EPOCHS:
        return "", ""
    if name in REMAINS and share is not None:
        return f"{REMAINS[name]} of PTQ's", "met" if REMAINS[name].met(share) else "MISSED"
    if name in BARS:
        return str(BARS[name]), "met" if BARS[name].met(row.drop) else "MISSED"
    return "", ""


def _spread(row: Row) -> str:
    digits = 2 if row.first.rising else 3
    text = f"{row.drop:.{digits}f}"
    if len(row.runs) == 1:
        return text
    drops = [run.drop for run in row.runs]
    return f"{text} ({min(drops):.{digits}f} to {max(drops):.{digits}f})"


def _training(row: Row) -> str:
    if row.first.epochs is None:
        return ""
    seeds, seconds = len(row.runs), row.median("seconds")
    parts = [f"{row.first.epochs} epochs", f"{seeds} seeds" if seeds > 1 else f"seed {row.first.seed}"]
    return ", ".join(parts + ([f"{seconds / 60:.1f} min"] if seconds is not None else []))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _width(bits: str) -> tuple[int, int]:
    """Wide first; float, which has none, in front of all."""
    weight, _, activation = bits.removeprefix("W").partition("A")
    return (-int(weight), -int(activation)) if bits else (-99, -99)


def _width_key(result: Result) -> tuple[object, ...]:
    return (result.task, result.model, result.count, result.bits)


def _spent(result: Result) -> tuple[int, str]:
    return result.epochs or 0, result.note


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qfx.tools.qat_table", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="what --json has written")
    parser.add_argument("--plot", type=Path, help="draw the curves of the runs into this file")
    given = parser.parse_args(argv)
    try:
        results = read(given.paths)
        print(table(results))
        if given.plot:
            plot(results, given.plot)
    except (ConfigError, Skip) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
