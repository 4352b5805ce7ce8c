"""The page of a dump in a browser: it draws every node, answers clicks and keys, and asks the network for nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.dump_measures import measured
from qfx.dump_model import Dump, NodeView
from qfx.dump_page import page
from qfx.models import MODELS
from qfx.recording import record

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("ignore::qfx.QfxWarning"),
    pytest.mark.xdist_group("browser"),  # one worker starts it, once
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def dumped(model: nn.Module, example: Any, target: str = "reference") -> Dump:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return measured(record(model, example, target=target))


class Shown:
    """A page that is open; ``wrong`` gathers what must not happen."""

    def __init__(self, browser: Any, dump: Dump, folder: Path) -> None:
        file = folder / "page.html"
        file.write_text(page(dump), encoding="utf-8")
        self.wrong: list[str] = []
        self.tab = browser.new_page(viewport={"width": 1400, "height": 900})
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("request", lambda request: request.url == file.as_uri() or self.wrong.append(request.url))
        self.tab.goto(file.as_uri())

    def drawn(self) -> list[str]:
        """Names of the nodes that are drawn."""
        found: list[str] = self.tab.eval_on_selector_all("#graph .node", "all => all.map(one => one.dataset.name)")
        return found

    def panel(self) -> str:
        text: str = self.tab.inner_text("#panel")
        return text

    def stage(self, name: str) -> None:
        self.tab.click(f"#stages [data-stage={name}]")

    def selected(self) -> list[str]:
        found: list[str] = self.tab.eval_on_selector_all("#graph .node.selected", "all => all.map(n => n.dataset.name)")
        return found


def names(dump: Dump, stage: str, *, constants: bool = False) -> list[str]:
    """Of the nodes that a stage's drawing must have, sorted."""
    return sorted(n.name for view in dump.at(stage) for n in view.nodes if constants or not n.constant)


def in_layer(dump: Dump, stage: str, layer: str) -> NodeView:
    nodes = (n for view in dump.at(stage) for n in view.nodes if n.layer == layer and not n.constant)
    return next(n for n in nodes if n.bits is not None)


def scale_of(node: NodeView) -> str:
    """Of the data that a node reads, as the panel writes it: four digits."""
    known = node.inputs[0]
    assert known is not None and known.scale is not None
    return f"{float(f'{known.scale[0]:.4g}'):.10f}".rstrip("0")


def walk(shown: Shown, dump: Dump, layer: str) -> None:
    """What every page must do, on one layer of the model."""
    tab, last = shown.tab, dump.reached[-1]
    for stage in dump.reached:
        shown.stage(stage)
        assert sorted(shown.drawn()) == names(dump, stage)
    node = in_layer(dump, last, layer)
    tab.fill("#search", layer)
    assert node.name in tab.eval_on_selector_all("#graph .node.match", "all => all.map(one => one.dataset.name)")
    assert tab.inner_text("#found").endswith(" found")
    tab.press("#search", "Enter")
    assert len(shown.selected()) == 1 and layer in shown.panel()
    tab.press("#search", "Escape")
    assert tab.locator(".node.match").count() == 0

    tab.click("#start")
    tab.evaluate("name => drawing.reveal(name)", node.name)
    tab.click(f'#graph .node[data-name="{node.name}"]')
    assert shown.selected() == [node.name]
    said = shown.panel()
    assert scale_of(node) in said and node.kernel in said and " dB" in said and " ms" in said
    assert tab.locator("#panel svg rect.after").count() > 1
    assert tab.locator(".bar.selected").get_attribute("data-name") == node.name
    near = {n for edge in dump.at(last)[0].edges if node.name in edge for n in edge} - {node.name}
    shadow = {n.name for n in dump.at(last)[0].nodes if n.constant}
    assert set(tab.eval_on_selector_all(".node.near", "all => all.map(n => n.dataset.name)")) == near - shadow

    for stage in ("fused", last):
        shown.stage(stage)
        (name,) = shown.selected()
        assert node.name == name or name in node.covers, "the layer stays selected"
    assert shown.selected() == [node.name] and not shown.wrong


class Small(nn.Module):
    """Integers, then a LayerNorm in float, then integers; a layer's name that is made to break pages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3)
        self.add_module("</script><img src=x onerror=alert(1)>", nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = self.get_submodule("</script><img src=x onerror=alert(1)>")
        return last(self.head(self.norm(self.conv(x).relu().mean((2, 3)))))


def test_a_small_model(browser: Any, tmp_path: Path) -> None:
    dump = dumped(Small().eval(), torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    shown = Shown(browser, dump, tmp_path)
    tab = shown.tab
    walk(shown, dump, "head")
    assert tab.locator("img").count() == 0

    crossings = [n for n in dump.at("lowered")[0].nodes if n.crossing and not n.constant]
    assert tab.locator("#graph .node.crossing").count() == len(crossings) > 1
    tab.check("#constants")
    assert sorted(shown.drawn()) == names(dump, "lowered", constants=True)
    tab.uncheck("#constants")

    tab.focus("#stages [aria-selected=true]")
    tab.keyboard.press("ArrowLeft")
    assert tab.get_attribute("[data-stage=converted]", "aria-selected") == "true"
    assert sorted(shown.drawn()) == names(dump, "converted")
    tab.focus("#graph")
    tab.keyboard.press("Escape")
    assert shown.selected() == []
    tab.keyboard.press("ArrowRight")
    assert shown.selected() == ["x"]
    tab.keyboard.press("ArrowRight")
    assert shown.selected() == ["x_quantize"]

    before = tab.get_attribute("#graph > g", "transform")
    tab.mouse.move(500, 500)
    tab.mouse.wheel(0, -240)
    zoomed = tab.get_attribute("#graph > g", "transform")
    tab.mouse.down()
    tab.mouse.move(560, 520, steps=3)
    tab.mouse.up()
    assert len({before, zoomed, tab.get_attribute("#graph > g", "transform")}) == 3
    assert shown.selected() == ["x_quantize"], "a drag selects nothing"

    tab.click(".bar >> nth=-1")
    assert len(shown.selected()) == 1
    tab.click("#tab-report")
    assert tab.locator("#rows tbody tr").count() == len(dump.report.rows if dump.report else ())
    tab.click("#rows tbody tr >> nth=0")
    assert tab.is_visible("#graph") and dump.report is not None and dump.report.rows[0].layer in shown.panel()
    tab.click("#tab-about")
    assert "Chris Pettitt" in tab.inner_text("#page-about pre")
    assert not shown.wrong


@pytest.mark.slow
def test_resnet18(browser: Any, tmp_path: Path) -> None:
    dump = dumped(*MODELS["resnet18"](), "auto")
    walk(Shown(browser, dump, tmp_path), dump, "layer2.0.conv2")


@pytest.mark.slow
def test_bert_small(browser: Any, tmp_path: Path) -> None:
    """Four layers of 512 with 8 heads: the drawing of any stage is laid out while one waits."""
    dump = dumped(*MODELS["bert_small"](), "auto")
    shown = Shown(browser, dump, tmp_path)
    walk(shown, dump, "layers.2.intermediate")
    slowest = shown.tab.evaluate(
        """() => Math.max(...views.map(view => {
             layouts.clear();
             const start = performance.now();
             layoutOf(view, false);
             return performance.now() - start;
           }))"""
    )
    assert slowest < 5000, "about 300 ms on a quiet machine"
