"""The rows of the worked cases, their files, the table and the curves."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import qfx
from qfx.observers import MinMax, Mse
from qfx.tools import qat_table
from qfx.tools.bench_figures import Skip
from qfx.tools.qat_loop import Point
from qfx.tools.qat_plot import plot
from qfx.tools.qat_recipes import Bits, observing, parse_bits
from qfx.tools.qat_results import Result, append, read
from qfx.tools.qat_table import rows_of, table

FLOAT = Result("CIFAR-10", "resnet20", "float", "", "top-1, %", True, 88.0, 88.0, 10_000, bytes=2**20, speedup=1.0)
PTQ = replace(FLOAT, method="PTQ", bits="W4A4", value=80.0, bytes=2**18, note="Mse")
QAT = replace(PTQ, method="QAT", value=87.5, note="", epochs=10, seed=0, curve=(Point(5, 0.7, 86.0),), seconds=60.0)
STORIES = replace(
    QAT, task="TinyStories", model="stories260K", count=300, bits="W4A16", metric="perplexity", rising=False
)


def cells(text: str) -> dict[str, list[str]]:
    """The lines of a table, by their first cell."""
    return {(parts := re.split(r"\s{2,}", line))[0]: parts[1:] for line in text.splitlines()}


def test_a_drop_is_how_much_worse() -> None:
    assert QAT.drop == 0.5
    assert replace(STORIES, value=3.75, reference=3.5).drop == 0.25


def test_rows_are_written_and_read(tmp_path: Path) -> None:
    for result in (FLOAT, PTQ, QAT):
        append(tmp_path / "sub" / "a.json", result)
    append(tmp_path / "sub" / "b.jsonl", replace(QAT, seed=1))
    found = read([tmp_path / "sub"])
    assert found == [FLOAT, PTQ, QAT, replace(QAT, seed=1)]
    again = replace(QAT, value=87.0)
    append(tmp_path / "sub" / "b.jsonl", again)
    assert read([tmp_path / "sub"])[2] == again, "a run that was repeated counts once, as it was last"


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(qfx.ConfigError, match=r"there is no .*none\.json"):
        read([tmp_path / "none.json"])
    (tmp_path / "x.json").write_text('{"a": 1}\n')
    with pytest.raises(qfx.ConfigError, match=r"x\.json, line 1 is no result of a run"):
        read([tmp_path / "x.json"])


def test_table_has_means_bars_and_what_is_left_of_the_drop() -> None:
    seeds = [replace(QAT, seed=seed, value=value) for seed, value in enumerate((87.4, 87.8, 87.6))]
    found = cells(table([*seeds, PTQ, FLOAT, replace(PTQ, value=70.0, note="MinMax")]))
    assert found["QAT W4A4"] == [
        "87.60", "0.40 (0.20 to 0.60)", "0.05", "≤ 0.5", "met", "0.25", "1.00", "10 epochs, 3 seeds, 1.0 min",
    ]  # fmt: skip
    assert found["PTQ W4A4 (Mse)"][:2] == ["80.00", "8.00"]
    assert found["float"] == ["88.00", "1.00", "1.00"]


def test_table_says_missed_and_gives_no_bar_to_longer_runs() -> None:
    found = cells(table([replace(QAT, value=87.0), replace(QAT, epochs=30)]))
    assert found["QAT W4A4"] == ["87.50", "0.50", "0.25", "1.00", "30 epochs, seed 0, 1.0 min"]  # the later line
    assert "MISSED" in table([replace(QAT, value=87.0)])
    assert "MISSED" not in table([replace(QAT, value=87.0, count=9_999)])


def test_the_bar_of_a_language_model_is_a_share_of_roundings_gap() -> None:
    base = replace(STORIES, reference=3.5, note="distilled", bytes=None)
    rounding = replace(base, method="PTQ", value=4.0, note="rounding", epochs=None, curve=())
    found = cells(table([rounding, replace(base, value=3.7)]))
    assert found["QAT W4A16 (distilled)"][:5] == ["3.700", "0.200", "0.40", "≤ 0.5 of PTQ's", "met"]
    assert "MISSED" in table([rounding, replace(base, value=3.8)])


def test_rows_stand_by_width_and_method() -> None:
    results = [replace(r, bits=b) for r in (QAT, PTQ) for b in ("W2A2", "W8A8", "W4A8", "W4A4")]
    order = [(row.first.bits, row.first.method) for row in rows_of([*results, FLOAT])]
    widths = ["W8A8", "W4A8", "W4A4", "W2A2"]
    assert order == [("", "float"), *((bits, method) for bits in widths for method in ("PTQ", "QAT"))]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    append(file, QAT)
    assert qat_table.main([str(file)]) == 0
    assert "CIFAR-10, resnet20, 10000 examples" in capsys.readouterr().out
    assert qat_table.main([str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no")


# --- curves -----------------------------------------------------------------------------------------------------------


def test_plot_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([FLOAT, QAT, replace(QAT, seed=1), STORIES], tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Skip, match="no run has a curve"):
        plot([FLOAT], tmp_path / "curve.png")


def test_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Skip, match="matplotlib cannot be imported"):
        plot([QAT], tmp_path / "curve.png")


# --- bit widths -------------------------------------------------------------------------------------------------------


def test_bits() -> None:
    assert parse_bits("8,4/8,3/16") == (Bits(8, 8), Bits(4, 8), Bits(3, None))
    assert [str(bits) for bits in parse_bits("2,4/8,3/16")] == ["W2A2", "W4A8", "W3A16"]
    for text in ("x", "4/", "1", "9", "16", "4/9", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            Bits.parse(text)


def test_observing_changes_every_spec() -> None:
    recipe = qfx.Recipe.lsq(4, 4).set("first.*", weight=6).skip("last")
    made = observing(recipe, MinMax, Mse)
    assert made.ends is not None
    found = [q for q in (made.default, made.ends, *(r.qconfig for r in made.rules)) if q is not None]
    assert len(found) == 2 + len(recipe.rules) - 1
    for qconfig in found:
        assert qconfig.weight is not None and qconfig.weight.observer is MinMax
        assert qconfig.activation is not None and qconfig.activation.observer is Mse
    assert observing(made, Mse, Mse) == observing(recipe, Mse, Mse) != made
