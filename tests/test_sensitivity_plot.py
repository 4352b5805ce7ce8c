"""Pictures of sensitivity and of bits: what is drawn, in which files, and what must not break it."""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qfx.bit_allocation import Allocation, pareto_front
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.errors import ConfigError
from qfx.recipe import Recipe
from qfx.sensitivity_plot import NoMatplotlib, figure, plot, short_names, svg
from qfx.sensitivity_table import Sensitivity
from qfx.widths import PARTS, Trial

matplotlib = pytest.importorskip("matplotlib")

WEIGHTS, ACTIVATIONS = (2, 4, 8), (4, 8)


def layer(path: str, *, size: int = 16, end: bool = False, weights: Sequence[int] = WEIGHTS) -> LayerFacts:
    choices = (*(Choice(w, a) for w, a in product(weights, ACTIVATIONS)), FLOAT)
    shape, given, qconfig = (size, size, 3, 3), Choice(8, 8), Recipe.int8().default
    return LayerFacts(f"{path}:conv2d", path, "conv2d", shape, size, 10**6, end, qconfig, given, False, choices)


def measured(
    layers: Sequence[LayerFacts],
    damage: Callable[[int, Trial], float] = lambda i, t: (1 + i) * 4.0**-t.bits,
    widths: dict[str, tuple[int, ...]] | None = None,
) -> Sensitivity:
    """A sensitivity by KL divergence with the damage of the layer's position and the trial."""
    asked = {"weight": WEIGHTS, "activation": ACTIVATIONS} if widths is None else widths
    found = {
        trial: damage(i, trial)
        for i, facts in enumerate(layers)
        for part in PARTS
        for bits in asked.get(part, ())
        if (trial := Trial(facts.key, part, bits))
    }
    groups = tuple((i,) for i in range(len(layers)))
    return Sensitivity("Net", Recipe.int8(), "x86", "kl", "nats", "only", 32, tuple(layers), groups, found, found)


SMALL = measured([layer("first", end=True), layer("mid.0"), layer("mid.1"), layer("last", end=True)])
ALLOCATED = Allocation(SMALL, (Choice(8, 8), Choice(2, 8), Choice(4, 4), FLOAT), pin=8)


def is_png(data: bytes) -> tuple[int, int]:
    """Width and height; fails where the data are no PNG that a reader would take."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    at, pixels = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        pixels += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    assert len(set(zlib.decompress(pixels))) > 10, "one colour only"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def named(axes: Any) -> dict[str, list[float]]:
    """The y values of the lines by their labels."""
    return {line.get_label().partition(":")[0]: list(line.get_ydata()) for line in axes.get_lines()}


def tops(axes: Any) -> list[float]:
    return [round(math.log10(bar.get_y() + bar.get_height()), 6) for bar in axes.patches]


# --- files ------------------------------------------------------------------------------------------------------------


def test_png_has_the_size_of_its_layers(tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.PNG"
    SMALL.plot(few)
    plot(measured([layer(f"blocks.{i}.conv") for i in range(50)], widths={"weight": (4,)}), os.fspath(many))
    (width, height), (wider, _) = is_png(few.read_bytes()), is_png(many.read_bytes())
    assert width > 900 and height > 500
    assert wider > 1.2 * width


@pytest.mark.parametrize("what", [SMALL, ALLOCATED], ids=["sensitivity", "allocation"])
def test_svg_names_every_layer(what: Sensitivity | Allocation, tmp_path: Path) -> None:
    plot(what, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    ElementTree.fromstring(text)
    assert all(f"<!-- {name} -->" in text for name in short_names(SMALL))


def test_pdf(tmp_path: Path) -> None:
    plot(ALLOCATED, tmp_path / "x.pdf")
    data = (tmp_path / "x.pdf").read_bytes()
    assert data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF") and b"CreationDate" not in data


@pytest.mark.parametrize("name", ["x.jpeg", "x", ".png", "x.svg.txt"])
def test_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        plot(SMALL, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NoMatplotlib, match=r"qfx\[plot\]"):
        SMALL.plot(tmp_path / "x.png")
    assert issubclass(NoMatplotlib, ConfigError)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.svg"
    file.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qfx.whole_file.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        plot(SMALL, file)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_written_file_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    file, link = tmp_path / "x.data", tmp_path / "x.svg"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    plot(SMALL, link)
    assert link.is_symlink() and file.read_bytes().startswith(b"<?xml") and stat.S_IMODE(file.stat().st_mode) == 0o640


def test_svg_for_a_page_refers_to_nothing_and_changes_nothing() -> None:
    before, loaded = dict(matplotlib.rcParams), set(sys.modules)
    text = svg(ALLOCATED)
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in set(sys.modules) - loaded
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>")
    assert set(re.findall(r"https?://[^\s\"<]*", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_bar_for_each_layer_and_width() -> None:
    weights, activations = figure(SMALL).axes
    assert weights.get_yscale() == activations.get_yscale() == "log"
    for axes, part, widths in ((weights, "weight", WEIGHTS), (activations, "activation", ACTIVATIONS)):
        trials = [Trial(facts.key, part, bits) for bits in widths for facts in SMALL.layers]
        assert tops(axes) == [round(math.log10(SMALL.damages[t]), 6) for t in trials]
        assert len({bar.get_facecolor() for bar in axes.patches}) == len(widths)
        assert part in axes.get_ylabel() and "nats" in axes.get_ylabel()
    assert [t.get_text() for t in activations.get_xticklabels()] == short_names(SMALL)


def test_the_lower_of_two_bars_stands_in_front() -> None:
    odd = measured(SMALL.layers, lambda i, t: float(t.bits if i == 1 else 10 - t.bits), widths={"weight": WEIGHTS})
    (axes,) = figure(odd).axes
    for i in range(len(odd.layers)):
        bars = axes.patches[i :: len(odd.layers)]
        by_height = sorted(bars, key=lambda bar: bar.get_height())
        assert by_height == sorted(bars, key=lambda bar: -bar.get_zorder())


def test_only_activations() -> None:
    only = measured(SMALL.layers, widths={"activation": ACTIVATIONS})
    (axes,) = figure(only).axes
    assert "activation" in axes.get_ylabel() and len(axes.patches) == 2 * len(only.layers)
    front = figure(Allocation(only, (Choice(8, 4),) * 4, pin=None)).axes[-1]
    assert "bit operations" in front.get_xlabel()


def test_no_damage_is_marked_at_the_foot() -> None:
    some = measured(SMALL.layers, lambda i, t: 0.0 if i == 1 or t.bits == 8 else 0.5)
    axes = figure(some).axes[0]
    low, high = axes.get_ylim()
    assert 0.0 < low < 0.5 < high
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1], [1], [0, 1, 2, 3]]
    assert {y for line in axes.get_lines() for y in line.get_ydata()} == {low}
    assert "no damage" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "no damage" not in [text.get_text() for text in figure(SMALL).axes[0].get_legend().get_texts()]


def test_no_damage_at_all() -> None:
    none = measured(SMALL.layers, lambda i, t: 0.0, widths={"weight": WEIGHTS})
    ElementTree.fromstring(svg(Allocation(none, (Choice(4, 8),) * 4, pin=None)))


def test_infinite_scores_and_damages() -> None:
    """SQNR is infinite where nothing changed; a damage is where the outputs overflowed."""
    exact = replace(SMALL, score="sqnr", unit="dB", scores=dict.fromkeys(SMALL.scores, math.inf))
    worst = Trial("mid.0:conv2d", "weight", 2)
    axes = figure(replace(exact, damages={**SMALL.damages, worst: math.inf})).axes[0]
    _, high = axes.get_ylim()
    assert max(tops(axes)) == round(math.log10(high), 6) < 3
    assert "noise-to-signal" in axes.get_title("left")


def test_one_layer() -> None:
    one = measured([layer("only")], widths={"weight": WEIGHTS})
    ElementTree.fromstring(svg(Allocation(one, (Choice(4, 8),), pin=None)))


def test_many_layers_get_room() -> None:
    many = measured([layer(f"blocks.{i}.conv") for i in range(200)], widths={"weight": (4,)})
    drawn = figure(many)
    assert drawn.get_figwidth() > 200 * 0.15
    assert len(drawn.axes[0].get_xticklabels()) == 200


# --- names ------------------------------------------------------------------------------------------------------------


def test_long_names_lose_their_beginning() -> None:
    long = "encoder.layers.11.attention.output.dense"
    (short,) = short_names(measured([layer(long)]))
    assert short[0] == "…" and len(short) <= 26 and long.endswith(short[1:])


def test_names_that_are_not_unique_bring_their_operator() -> None:
    twice = [layer("attn"), replace(layer("attn"), key="attn:matmul"), replace(layer(""), key="matmul")]
    assert short_names(measured(twice)) == ["attn:conv2d", "attn:matmul", "matmul"]


@pytest.mark.parametrize("name", ["<script>x</script>", "a--b-->c", "$\\frac$", "&amp;", "\x00\x1b\n\ud800\u202egnp"])
def test_hostile_names(name: str) -> None:
    hostile = measured([layer(name), layer("b")], widths={"weight": (4,)})
    text = svg(replace(hostile, model=name))
    ElementTree.fromstring(text)
    text.encode()
    assert "<script" not in text and "\u202e" not in text


# --- bits and the front -----------------------------------------------------------------------------------------------


def test_the_chosen_widths_are_marked() -> None:
    weights, activations, _, _ = figure(ALLOCATED).axes
    by_hand = {
        weights: [("first", "weight", 8), ("mid.0", "weight", 2), ("mid.1", "weight", 4)],
        activations: [("first", "activation", 8), ("mid.0", "activation", 8), ("mid.1", "activation", 4)],
    }
    for axes, trials in by_hand.items():
        damages = [SMALL.damages[Trial(f"{path}:conv2d", part, bits)] for path, part, bits in trials]
        assert list(axes.get_lines()[-1].get_ydata()) == damages


def test_bit_map() -> None:
    product_layer = replace(layer("qk"), weight_shape=(), given=Choice(None, 8), choices=(Choice(None, 8), FLOAT))
    sensitivity = measured([*SMALL.layers, product_layer, layer("big", size=1024)])
    choices = (*ALLOCATED.choices, Choice(None, 8), Choice(4, None))
    cells = figure(Allocation(sensitivity, choices, pin=None)).axes[2]
    texts = {text.get_position(): text.get_text() for text in cells.texts}
    assert [texts.get((x, 2.5)) for x in range(6)] == ["8", "2", "4", "F", None, "4"]
    assert [texts[x, 1.5] for x in range(6)] == ["8", "8", "4", "F", "8", "F"]
    assert [texts[x, 0.5] for x in range(6)] == ["2.3k"] * 4 + ["0", "9.44M"]
    assert len(cells.patches) == 11


def test_front_uniform_and_chosen() -> None:
    front = figure(ALLOCATED).axes[-1]
    expected = pareto_front(SMALL, points=12, pin=8)
    lines = {label.partition(" points")[2] or label: ys for label, ys in named(front).items()}
    assert lines[" of the Pareto front"] == pytest.approx([a.damage for a in expected])
    assert lines["chosen"] == [pytest.approx(ALLOCATED.damage)]
    ends, wide = 4.0**-8 * (1 + 1) + 0.0, 4.0**-8
    inner = [5 * 4.0**-bits + 5 * wide for bits in WEIGHTS]  # mid.0 counts twice and mid.1 three times
    uniform = lines["one width for all, first and last layers as chosen"]
    assert uniform == pytest.approx([damage + ends for damage in inner])
    assert [text.get_text() for text in front.texts] == ["W2", "W4", "W8"]
    assert front.get_yscale() == "log" and "KiB" in front.get_xlabel()


def test_uniform_takes_the_next_width_there_is_and_leaves_what_is_fixed() -> None:
    narrow = layer("narrow", weights=(4, 8))
    fixed = replace(layer("fixed"), fixed=True, given=Choice(4, 8))
    found = measured([narrow, layer("wide"), fixed])
    uniform = named(figure(Allocation(found, (Choice(4, 8),) * 3, pin=None)).axes[-1])["one width for all"]
    assert uniform[0] == pytest.approx(4.0**-4 + 2 * 4.0**-2 + 3 * 4.0**-4 + 6 * 4.0**-8)


def test_the_front_may_choose_float_where_the_allocation_did() -> None:
    by_bits = replace(ALLOCATED, choices=(Choice(8, 8), Choice(4, 8), Choice(4, 8), Choice(8, 8)))
    to_float = replace(ALLOCATED, choices=(Choice(8, 8), FLOAT, Choice(4, 8), Choice(8, 8)))
    least = [min(figure(a).axes[-1].get_lines()[0].get_ydata()) for a in (by_bits, to_float)]
    assert least[1] < least[0]
