"""A result as text and as plain values."""

from __future__ import annotations

import math
from typing import Any

from tabulate import tabulate

from qfx.tools.latency_result import Result, Row

HEADER = ("candidate", "computes", "median ms", "(p10-p90)", "SQNR dB", "ratio to best peer")


def text(of: Result) -> str:
    """A line a candidate, then the best peers, and why the others did not run.

    SQNR is that of the output against fp32 eager. The ratio is the candidate's time over the best peer's: the median of
    the rounds' own ratios, in which a busy minute counts on both sides.
    """
    best = of.best_peer()
    rows = [
        (
            row.name,
            row.computes,
            f"{of.times.ms(row.name):.3f}",
            f"({row.percentile(10):.3f}-{row.percentile(90):.3f})",
            f"{row.sqnr_db:.1f}" if math.isfinite(row.sqnr_db) else "-",
            f"{of.ratio(row, best):.2f}" if best else "-",
        )
        for row in of.rows
    ]
    align = ("left", "left", "right", "right", "right", "right")
    table = str(tabulate(rows, HEADER, disable_numparse=True, colalign=align)) if rows else "no candidate ran"
    notes = [f"{row.name}: {row.note}" for row in of.rows if row.note]
    reasons = [f"{name}: did not run: {reason}" for name, reason in of.reasons.items()]
    lines = [table, "", *_best(of), *notes, *reasons]
    return "\n".join(lines)


def _best(of: Result) -> list[str]:
    best, int8 = of.best_peer(), of.best_peer("int8")
    return [
        f"best peer: {_named(of, best) if best else 'none ran'}",
        f"best int8 peer: {f'{_named(of, int8)}, SQNR {int8.sqnr_db:.1f} dB' if int8 else 'none ran'}",
    ]


def _named(of: Result, row: Row) -> str:
    return f"{row.name} ({row.computes}), {of.times.ms(row.name):.3f} ms"


def plain(of: Result) -> dict[str, Any]:
    """For JSON: milliseconds, dB (None: infinite or not a number) and ratios; ``rounds`` are the medians of each."""
    best, int8 = of.best_peer(), of.best_peer("int8")
    return {
        "model": of.model,
        "batch": of.batch,
        "best_peer": best.name if best else None,
        "best_int8_peer": int8.name if int8 else None,
        "candidates": {
            row.name: {
                "computes": row.computes,
                "note": row.note,
                "ms": of.times.ms(row.name),
                "p10": row.percentile(10),
                "p90": row.percentile(90),
                "rounds": of.times.rounds[row.name],
                "sqnr_db": row.sqnr_db if math.isfinite(row.sqnr_db) else None,
                "ratio": of.ratio(row, best) if best else None,
            }
            for row in of.rows
        },
        "reasons": dict(of.reasons),
    }
