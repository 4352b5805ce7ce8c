"""What a benchmark yields: figures, each with its bar; and how they are shown."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate


@dataclass(frozen=True)
class Bar:
    """The bound that a figure must keep: at least (``≥``) or at most (``≤``)."""

    sign: Literal["≥", "≤"]
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sign == "≥" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


def at_least(bound: float) -> Bar:
    return Bar("≥", bound)


def at_most(bound: float) -> Bar:
    return Bar("≤", bound)


@dataclass(frozen=True)
class Figure:
    """One measured value. ``value`` None: it was skipped or it failed, and ``note`` says why.

    Without a ``bar`` the figure is for information.
    """

    what: str
    value: float | None
    unit: str = ""
    bar: Bar | None = None
    note: str = ""
    failed: bool = False

    @classmethod
    def skip(cls, what: str, why: str) -> Figure:
        return cls(what, None, note=why)

    @classmethod
    def fail(cls, what: str, error: str, bar: Bar | None = None) -> Figure:
        return cls(what, None, bar=bar, note=error, failed=True)

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED``, ``FAILED``, ``skipped``, or ``""`` for a figure without a bar."""
        if self.value is None:
            return "FAILED" if self.failed else "skipped"
        if self.bar is None:
            return ""
        return "met" if self.bar.met(self.value) else "MISSED"

    @property
    def good(self) -> bool:
        return self.verdict not in ("FAILED", "MISSED")


def table(figures: Iterable[Figure]) -> str:
    """The figures as text, one a line."""
    rows = [
        (
            f.what,
            "" if f.value is None else f"{f.value:.4g} {f.unit}".strip(),
            "" if f.bar is None else str(f.bar),
            f.verdict,
            f.note,
        )
        for f in figures
    ]
    widths = [None, None, None, None, 100]
    return str(tabulate(rows, ("what", "value", "bar", "", "note"), disable_numparse=True, maxcolwidths=widths))


class Skip(Exception):
    """A benchmark, or a part of one, cannot run here; the text says what is missing."""


@dataclass(frozen=True)
class Options:
    """What the command line sets for every benchmark."""

    target: str = "auto"
    data: Path | None = None

    def data_dir(self) -> Path:
        """The folder of real data and weights.

        Raises:
            Skip: none was given.
        """
        if self.data is None:
            raise Skip("needs real data: pass --data DIR")
        return self.data


def need(module: str) -> Any:
    """An optional package's module.

    Raises:
        Skip: it cannot be imported. RuntimeError and OSError are caught too: so fails a package whose compiled part was
            built for another torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Skip(f"{module} cannot be imported: {first}") from error


def brief(error: BaseException) -> str:
    """An error's type and text, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
