"""The page of a dump: one file that loads nothing, holds the whole dump, and is safe with any names."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import qfx
from qfx.dump_measures import measured
from qfx.dump_model import Dump, Histogram, Integers, NodeView, StageView
from qfx.dump_page import DAGRE, SHARED, packed, page, unpacked
from qfx.recording import record
from qfx.tools import bench_dump
from qfx.tools.bench_figures import Options

from .dump_subject import X, small

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }}",
    "</td></table>",
    "]]>&lt;",
)

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


@pytest.fixture(scope="module")
def dump() -> Dump:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return measured(record(small(), X, target="reference"))


class Page(HTMLParser):
    """Tags in order, attributes, and the text of every element by its tag; scripts by their ids."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1] if self.tags else ""
        self.texts.append((tag, data.strip()))
        if tag == "script" and data.strip():
            known, before = self.scripts[-1]
            self.scripts[-1] = (known, before + data)

    def words(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag and text]

    @property
    def data(self) -> dict[str, Any]:
        (text,) = (text for known, text in self.scripts if known.get("id") == "dump")
        found: dict[str, Any] = json.loads(text)
        return found


def told(node: dict[str, Any]) -> dict[str, Any]:
    """A node without its empty fields."""
    return {key: value for key, value in node.items() if not (value is None or value is False or value in ("", []))}


def test_it_loads_nothing(dump: Dump) -> None:
    source = page(dump)
    found = Page(source)
    assert not {"link", "img", "iframe", "object", "embed", "base", "audio", "video"} & set(found.tags)
    assert not {"src", "href", "srcset", "action", "background", "style"} & {name for name, _ in found.attributes}
    assert not any(name.startswith("on") for name, _ in found.attributes)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", source))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of a vocabulary, which nobody loads"
    assert not re.search(r"url\((?!#)|@import|sourceMappingURL|fetch\(|XMLHttpRequest|importScripts|WebSocket", source)
    (policy,) = (value for name, value in found.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_the_data_are_the_dump(dump: Dump) -> None:
    data = Page(page(dump)).data
    wanted = json.loads(json.dumps(dump.to_dict(), allow_nan=False))["stages"]
    got = unpacked(data)
    assert [(v["stage"], v["graph"]) for v in got] == [(v["stage"], v["graph"]) for v in wanted]
    for view, want in zip(got, wanted, strict=True):
        assert list(map(told, view["nodes"])) == list(map(told, want["nodes"]))
    assert any("before" in node for view in got for node in view["nodes"])


def test_values_are_written_once(dump: Dump) -> None:
    data = packed(dump)
    written = [json.dumps(value) for value in data["values"]]
    assert not [text for text, count in Counter(written).items() if count > 1 and text != "[]"]
    places = {node[field] for view in data["stages"] for node in view["nodes"] for field in SHARED if field in node}
    assert places == set(range(len(written))), "every value is of some node"
    assert len(json.dumps(data)) < 0.5 * len(json.dumps(dump.to_dict()))


def test_what_zero_means() -> None:
    """Zeros are values; what is missing is not written."""
    node = NodeView("a", "call_function", "add", "", "", (), "", "", "", False, True, False, 0, sqnr_db=0.0)
    node = replace(node, output=Integers("u8", 8, 1, (0.5, 0.5), (0, 0)), before=Histogram(0.0, 1.0, (0, 0)), bits=0)
    (view,) = unpacked(packed(Dump("", "", "", (StageView("fused", "", (node,)),))))
    (got,) = view["nodes"]
    assert got == {
        **{"name": "a", "op": "call_function", "target": "add", "integer": True, "region": 0, "bits": 0, "macs": 0},
        "sqnr_db": 0.0,
        "output": {"spec": "u8", "bits": 8, "scales": 1, "scale": [0.5, 0.5], "zero_point": [0, 0]},
        "before": {"low": 0.0, "high": 1.0, "counts": [0, 0]},
    }


def test_numbers_that_json_has_not() -> None:
    node = NodeView("a", "call_function", "add", "", "", (), "", "", "", False, False, False, None)
    nodes = tuple(replace(node, name=str(x), sqnr_db=x) for x in (math.inf, -math.inf, math.nan))
    data = Page(page(Dump("m", "r", "t", (StageView("lowered", "", nodes),)))).data
    assert [n["sqnr_db"] for n in data["stages"][0]["nodes"]] == ["inf", "-inf", "nan"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(dump: Dump, name: str) -> None:
    def told_with(word: str) -> Dump:
        nodes = dump.stages[-1].nodes
        nodes = tuple(replace(n, name=word + n.name, layer=word, reason=word, kernel=word) for n in nodes)
        report = dump.report
        assert report is not None
        row = replace(report.rows[0], layer=word, reason=word, name=word, kernel=word)
        passes = tuple(replace(p, graph=word, notes=((word, word),)) for p in dump.passes[:2])
        report = replace(report, rows=(row,), notes=((word, word),), recipe=word)
        views = (replace(dump.stages[-1], nodes=nodes, graph=word),)
        return replace(dump, model=word, recipe=word, target=word, stages=views, passes=passes, report=report)

    plain, found = Page(page(told_with("word"))), Page(page(told_with(name)))
    assert found.tags == plain.tags
    assert [n for n, _ in found.attributes] == [n for n, _ in plain.attributes]
    assert found.words("h1") == [name] and name in found.words("td")
    (view,) = unpacked(found.data)
    assert {n["layer"] for n in view["nodes"]} == {name} == {view["graph"]}


def test_characters_that_are_no_text(dump: Dump) -> None:
    strange = "a\x00b\ud800\u202ec\u2028d"
    nodes = tuple(replace(n, layer=strange) for n in dump.stages[-1].nodes)
    source = page(replace(dump, model=strange, stages=(replace(dump.stages[-1], nodes=nodes),)))
    source.encode()
    assert Page(source).words("h1") == ["a?b??c?d"]
    assert unpacked(Page(source).data)[0]["nodes"][0]["layer"] == strange


def test_the_report_is_whole(dump: Dump) -> None:
    report = dump.report
    assert report is not None
    long = "a.very" + ".long" * 20 + ".path"
    rows = (replace(report.rows[0], layer=long, reason="because " * 20, sqnr_db=math.inf), *report.rows[1:])
    found = Page(page(replace(dump, report=replace(report, rows=rows))))
    assert long in found.words("td") and ("because " * 20).strip() in found.words("td") and "exact" in found.words("td")
    summary = dict(zip(found.words("dt")[-6:], found.words("dd")[-6:], strict=True))
    assert summary["nodes"].startswith(f"{report.nodes_before} → {report.nodes_after}, ")
    assert summary["recipe, target"] == "int8, reference" and summary["SQNR of the output"].endswith(" dB")
    assert [value for name, value in found.attributes if name == "data-node"] == [row.name for row in report.rows]
    assert {"Graph", "Report", "Passes", "About"} <= set(found.words("button"))
    assert {p.name for p in dump.passes} <= set(found.words("td"))


def test_what_was_not_kept_has_no_tab() -> None:
    found = Page(qfx.dump(qfx.prepare(small(), X, target="reference"), format="html"))
    assert [word for word in found.words("button") if word[0].isupper()][:2] == ["Graph", "About"]
    assert [view["stage"] for view in found.data["stages"]] == ["prepared"]


def test_stages_and_layers_can_be_chosen() -> None:
    chosen = {"stages": "fused,lowered", "layer": "conv", "measure": False}
    data = Page(qfx.dump(small(), X, target="reference", format="html", **chosen)).data  # type: ignore[arg-type]
    assert [view["stage"] for view in data["stages"]] == ["fused", "lowered"]
    assert {n["layer"] for view in unpacked(data) for n in view["nodes"]} == {"conv"}
    assert "before" not in json.dumps(data["stages"])
    with pytest.raises(qfx.ConfigError, match="'html' shows stages alone"):
        qfx.dump(small(), X, target="reference", format="html", why="conv")


def test_the_layout_is_dagre_unchanged(dump: Dump) -> None:
    """As npm has it, @dagrejs/dagre 3.1.3: dist/dagre.min.js, and the licence, which the page shows."""
    folder = files("qfx").joinpath("vendor")
    script = folder.joinpath("dagre.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == "54a503e346f93ca0bb10abe7999587e037262935687aca45eb4e4b0f64bbb578"
    assert f'"{DAGRE}"'.encode() in script
    licence = folder.joinpath("dagre.LICENSE").read_text()
    source = page(dump)
    (shown,) = Page(source).words("pre")
    assert shown == licence.strip() and "Chris Pettitt" in shown
    assert script.decode().partition("//# source")[0] in source and f"dagre {DAGRE}" in source


def test_the_fields_that_the_script_knows() -> None:
    """A field that is left out where it is empty must have its empty value in the script."""
    script = files("qfx").joinpath("pages", "dump_model.js").read_text()
    (known,) = re.findall(r"const NOTHING = \{(.*?)\};", script, re.DOTALL)
    assert set(re.findall(r"(\w+):", known)) == set(NodeView.__dataclass_fields__) - {"name", "op"}


def test_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter((9.0, 30.0, 8.0))

    def run(arguments: Sequence[str]) -> float:
        assert arguments[:3] == ["resnet50", "--format", "html"] and "reference" in arguments
        Path(arguments[-1]).write_bytes(b"x" * (4 << 20))
        return next(taken)

    monkeypatch.setattr(bench_dump, "_run", run)
    seconds, size = bench_dump.dump_page(Options(target="reference"))
    assert (seconds.value, str(seconds.bar), seconds.good) == (9.0, "≤ 10", True)
    assert (size.value, str(size.bar), size.good) == (4.0, "≤ 3", False)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    command = ["resnet20", "--small", "--target", "reference", "--format", "html", "--output", str(path)]
    assert bench_dump._run(command) > 0
    assert len(Page(path.read_text(encoding="utf-8")).data["stages"]) == 8 and path.stat().st_size < 600_000
    with pytest.raises(RuntimeError, match="no reference model"):
        bench_dump._run(["no-such-model"])
