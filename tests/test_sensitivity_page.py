"""The page of a sensitivity or an allocation: well formed, complete, self-contained, and safe with any names."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import product

import pytest

from qfx.bit_allocation import Allocation
from qfx.choices import FLOAT, Choice, LayerFacts
from qfx.recipe import Recipe
from qfx.sensitivity_page import page
from qfx.sensitivity_table import Agreement, Sensitivity
from qfx.widths import Trial

WIDTHS = (("weight", 2), ("weight", 4), ("weight", 8), ("activation", 4), ("activation", 8))
VOID = {"meta", "link", "img"}
LINKS = {"src", "href", "xlink:href", "data", "action", "srcset"}


def measured(
    paths: Sequence[str] = ("first", "mid", "last"),
    damage: Callable[[int, Trial], float] = lambda i, t: (1 + i) * 10.0**-t.bits,
    widths: Sequence[tuple[str, int]] = WIDTHS,
) -> Sensitivity:
    choices = (*(Choice(w, a) for w, a in product((2, 4, 8), (4, 8))), FLOAT)
    given, qconfig = Choice(8, 8), Recipe.int8().default
    layers = tuple(
        LayerFacts(f"{p}:linear", p, "linear", (4, 300), 4, 1_500_000, False, qconfig, given, False, choices)
        for p in paths
    )
    found = {t: damage(i, t) for i, x in enumerate(layers) for p, b in widths if (t := Trial(x.key, p, b))}
    groups = tuple((i,) for i in range(len(layers)))
    return Sensitivity("Net", Recipe.int8(), "x86", "kl", "nats", "only", 32, layers, groups, found, found)


@dataclass
class Cell:
    attributes: dict[str, str | None]
    text: str = ""

    @property
    def chosen(self) -> bool:
        return self.attributes.get("class") == "chosen"

    @property
    def level(self) -> float:
        return float(str(self.attributes["style"]).removeprefix("--level: "))


@dataclass
class Page(HTMLParser):
    """What a page holds; fails where an element is not closed in its place."""

    source: str
    tags: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr" and "tbody" in self.open:
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(Cell(dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in LINKS]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())
        if "td" in self.open:
            self.rows[-1][-1].text += data.strip()


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the page does not depend on the drawing, which takes longest."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def headings(found: Page) -> list[str]:
    return found.texts["button"]


# --- with the drawing -------------------------------------------------------------------------------------------------


def test_the_drawing_is_in_the_page() -> None:
    pytest.importorskip("matplotlib")
    source = page(Allocation(measured(), (Choice(4, 8),) * 3, pin=8))
    found = Page(source)
    assert found.tags.count("svg") == 1 and "There is no drawing" not in source
    assert "Pareto front" in source
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"\w+://[^\"' <]*", source)) == namespaces
    assert found.links and all(link.startswith("#") for link in found.links)
    assert "@import" not in source and source.count("url(") == source.count("url(#") > 0


# --- without ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_page_says_so() -> None:
    source = page(measured())
    assert "qfx[plot]" in source and "http" not in source
    assert "svg" not in Page(source).tags
    assert measured().html() == source


@pytest.mark.usefixtures("without_matplotlib")
def test_what_was_measured() -> None:
    agreed = replace(measured(), agreement=Agreement("kl", 0.93, 16), score="fisher", seconds=12.34)
    found = Page(page(agreed))
    assert found.texts["h1"] == ["Net"] and found.texts["title"] == ["Net: sensitivity"]
    facts = dict(zip(found.texts["dt"], found.texts["dd"], strict=True))
    assert facts["score"] == "fisher in nats"
    assert facts["measured"] == "each tensor rounded alone, on 32 rows of data, in 12.3 s"
    assert facts["agreement"] == "rank correlation with kl: 0.93 over 16 trials"
    assert facts["recipe, target"] == "int8, x86"
    assert "not checked" in page(measured())


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize("count", [1, 300])
def test_a_row_for_each_layer(count: int) -> None:
    sensitivity = measured([f"blocks.{i}.fc" for i in range(count)])
    found = Page(page(sensitivity))
    assert headings(found) == ["#", "layer", "operator", "weights", "MMAC", "w2", "w4", "w8", "a4", "a8"]
    assert [row[1].text for row in found.rows] == [facts.path for facts in sensitivity.layers]
    assert [cell.text for cell in found.rows[0]] == [
        *("1", "blocks.0.fc", "linear", "1,200", "1.5"),
        *("0.01", "0.0001", "1e-08", "0.0001", "1e-08"),
    ]
    assert found.rows[0][3].attributes["data-key"] == "1200", "sorted as a number"
    assert not any(cell.chosen for row in found.rows for cell in row)


@pytest.mark.usefixtures("without_matplotlib")
def test_colours_follow_the_damage_on_a_logarithmic_scale() -> None:
    found = Page(page(measured(["a"], lambda i, t: {2: 1e-1, 4: 1e-3, 8: 1e-5}[t.bits])))
    assert [cell.level for cell in found.rows[0][5:]] == [1.0, 0.5, 0.0, 0.5, 0.0]


@pytest.mark.usefixtures("without_matplotlib")
def test_damages_off_the_scale() -> None:
    """0 where nothing changed, infinite where the outputs overflowed; an infinite SQNR is the best."""
    worst = measured(["a"], lambda i, t: {2: math.inf, 4: 1e-3, 8: 0.0}[t.bits])
    cells = Page(page(replace(worst, score="sqnr", scores=dict.fromkeys(worst.scores, math.inf)))).rows[0][5:]
    assert [cell.level for cell in cells] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert [cell.attributes["data-key"] for cell in cells[:3]] == ["Infinity", "0.001", "0.0"]
    assert {cell.text for cell in cells} == {"exact"}
    assert [cell.level for cell in Page(page(measured(["a"], lambda i, t: 0.0))).rows[0][5:]] == [0.0] * 5


@pytest.mark.usefixtures("without_matplotlib")
def test_what_was_not_measured_is_empty() -> None:
    some = measured(widths=WIDTHS[3:])
    lacking = {t: score for t, score in some.scores.items() if t != Trial("mid:linear", "activation", 8)}
    found = Page(page(replace(some, scores=lacking, damages=lacking)))
    assert headings(found)[5:] == ["a4", "a8"]
    assert [bool(row[-1].text) for row in found.rows] == [True, False, True]


@pytest.mark.usefixtures("without_matplotlib")
def test_the_chosen_cells_are_marked() -> None:
    found = Page(page(Allocation(measured(), (Choice(2, 8), Choice(8, 4), FLOAT), pin=8)))
    by_heading = [dict(zip(headings(found), row, strict=True)) for row in found.rows]
    marked = [[name for name, cell in row.items() if cell.chosen] for row in by_heading]
    assert marked == [["w2", "a8"], ["w8", "a4"], ["bits"]]
    assert [row["bits"].text for row in by_heading] == ["W2A8", "W8A4", "float"]
    assert "chosen" in str(by_heading[0]["w2"].attributes["title"])


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize(("pin", "shown"), [(8, "8"), ("float", "float"), (None, "as the search found")])
def test_bits_and_costs(pin: int | None, shown: str) -> None:
    allocation = Allocation(measured(), (Choice(2, 8), Choice(2, 8), Choice(8, 8)), pin=pin)
    found = Page(page(allocation))
    facts = dict(zip(found.texts["dt"], found.texts["dd"], strict=True))
    assert facts["layers"] == "W2A8: 2, W8A8: 1"
    assert facts["bits of first and last layers"] == shown
    assert facts["bits of a weight, mean"] == "4.00"
    assert facts["damage of all layers"] == "0.03"
    assert facts["weights with their scales"] == f"{allocation.costs['weight_bytes'] / 1024:.2f} KiB"
    assert facts["bit operations"] == "0.14 G"


@pytest.mark.usefixtures("without_matplotlib")
@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '" onmouseover="alert(1)', "{{ 7 * 7 }}", "</td></table>", "&lt;", "<!--"]
)
def test_hostile_names(name: str) -> None:
    plain = Page(page(measured(["a", "b"])))
    hostile = replace(measured([name, "b"]), model=name)
    hostile = replace(hostile, score=name, unit=name, recipe=replace(hostile.recipe, name=name), target=name)
    found = Page(page(hostile))
    assert found.tags == plain.tags
    assert found.rows[0][1].text == name == found.rows[0][1].attributes["title"] == "".join(found.texts["h1"])
    assert set(found.rows[0][1].attributes) == {"title"}


@pytest.mark.usefixtures("without_matplotlib")
def test_characters_that_are_not_seen() -> None:
    source = page(measured(["a\x00b\ud800\u202ec"]))
    assert "a?b??c" in source
    source.encode()
