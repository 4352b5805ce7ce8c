"""The before/after node table: one row for each operator, with what became of it and why."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL
from qfx.node_table import crossings, region_graph, regions, tensor_bytes
from qfx.ops import dequantize, quantize

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


class Net(nn.Module):
    """A residual block, a layer norm, linear layers and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix, self.norm = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        y = F.relu(y + self.mix(y))
        y = self.fc(self.norm(F.max_pool2d(y, 2).flatten(2).mean(2)))
        return self.head(y), torch.matmul(y, y.t()).softmax(-1)


X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def qnet() -> fx.GraphModule:
    torch.manual_seed(0)
    made = qfx.quantize(Net().eval(), X, target="reference", verbose=False)
    assert isinstance(made, fx.GraphModule)
    return made


@pytest.fixture(scope="module")
def report(qnet: fx.GraphModule) -> qfx.Report:
    return qfx.report(qnet)


def test_one_row_for_each_operator_in_order(report: qfx.Report) -> None:
    assert [(row.operator, row.layer) for row in report.rows] == [
        ("conv2d", "conv"),
        ("relu", ""),
        ("conv2d", "mix"),
        ("add", ""),
        ("relu", ""),
        ("max_pool2d", ""),
        ("flatten", ""),
        ("mean", ""),
        ("layer_norm", "norm"),
        ("linear", "fc"),
        ("linear", "head"),
        ("t", ""),
        ("matmul", ""),
        ("softmax", ""),
    ]


def test_what_became_of_each(report: qfx.Report) -> None:
    after = [(row.integer, row.after, row.kernel) for row in report.rows]
    assert after[0] == after[1] == (True, "uint8 → uint8", "reference conv2d+relu")
    assert after[2] == after[3] == after[4] == (True, "uint8 → float32", "reference conv2d+add+relu")
    assert after[5] == after[6] == after[7] == after[8] == (False, "float", "")
    assert after[11] == (True, "uint8 → uint8", "moves integers")
    assert after[12] == (True, "uint8 → float32", "reference matmul")
    bits = [(row.weight_bits, row.activation_bits) for row in report.rows if row.operator in ("conv2d", "linear")]
    assert bits == [(8, 8)] * 4
    assert all(row.weight_bits is None for row in report.rows if row.operator not in ("conv2d", "linear"))


def test_every_float_operator_has_a_reason(report: qfx.Report) -> None:
    assert all(row.reason for row in report.rows if not row.integer)
    by_name = {row.operator: row.reason for row in report.rows}
    assert "LayerNorm stays float" in by_name["layer_norm"] and "Softmax stays float" in by_name["softmax"]
    assert by_name["add"] == "runs inside the kernel of conv2d_1"


def test_multiply_accumulates(report: qfx.Report) -> None:
    counted = [row.macs for row in report.rows if row.macs]
    pixels, batch = 64, 64
    assert counted == [
        batch * pixels * 8 * 3 * 9,
        batch * pixels * 8 * 8,
        batch * 8 * 8,
        batch * 8 * 4,
        batch * batch * 8,
    ]
    assert report.product_macs == batch * batch * 8 and report.integer_macs == 1.0
    conv_only = dataclasses.replace(
        report, rows=tuple(dataclasses.replace(r, integer=r.operator == "conv2d") for r in report.rows)
    )
    convs, linears = counted[0] + counted[1], counted[2] + counted[3]
    assert math.isclose(conv_only.integer_macs, convs / (convs + linears))
    assert dataclasses.replace(report, rows=()).integer_macs == 0.0


def test_the_quality_column_and_the_output(qnet: fx.GraphModule, report: qfx.Report) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    assert all(row.sqnr_db is not None and row.sqnr_db > 25 for row in report.rows)
    with torch.no_grad():
        pairs = list(zip(model(X[:4]), qnet(X[:4]), strict=True))
    assert report.output_sqnr_db == pytest.approx(min(sqnr_db(a, b) for a, b in pairs), abs=0.2)


def test_counts_are_those_of_the_graph(qnet: fx.GraphModule, report: qfx.Report) -> None:
    assert report.nodes_after == len(qnet.graph.nodes) < report.nodes_before
    left = [n for n in qnet.graph.nodes if n.target in (quantize, dequantize)]
    assert report.crossings == crossings(qnet) == len(left)
    assert report.regions == regions(qnet) == 2
    assert report.quantized == sum(row.integer for row in report.rows)
    assert report.weight_bytes_after == tensor_bytes(qnet)
    assert report.weight_bytes_before == tensor_bytes(Net())


def test_the_region_graph_is_networkx(qnet: fx.GraphModule) -> None:
    graph = region_graph(qnet)
    assert isinstance(graph, nx.DiGraph) and nx.is_directed_acyclic_graph(graph)
    assert set(graph) == {n.name for n in qnet.graph.nodes}
    inside = {name for name, data in graph.nodes(data=True) if data["integer"]}
    assert inside and all(n.meta["val"].dtype == torch.uint8 for n in qnet.graph.nodes if n.name in inside)
    assert regions(qnet) == nx.number_weakly_connected_components(graph.subgraph(inside))


def test_a_split_of_integers_does_not_cut_a_region() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).relu().chunk(2, -1)
            return self.second(torch.cat([b, a], -1))

    qmodel = qfx.quantize(Split().eval(), torch.randn(64, 8), target="reference", verbose=False)
    assert isinstance(qmodel, fx.GraphModule)
    assert any(n.target is operator.getitem for n in qmodel.graph.nodes)
    assert qfx.report(qmodel).regions == 1 and qfx.report(qmodel).integer_macs == 1.0


def test_integers_that_the_user_gives_are_no_region() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.float() / 255)

    x = torch.randint(0, 256, (64, 8), dtype=torch.uint8)
    assert qfx.report(qfx.quantize(Bytes().eval(), x, target="reference", verbose=False)).regions == 1


def test_tied_tensors_count_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    assert tensor_bytes(nn.Sequential(first, second)) == 8 * 8 * 4


# --- as text --------------------------------------------------------------------------------------------------------


def test_the_printed_table(report: qfx.Report) -> None:
    lines = str(report).splitlines()
    header = re.split(r"\s{2,}", lines[0])
    assert header == ["operator", "layer", "shape", "before → after", "w", "a", "kernel", "SQNR dB", "reason"]
    assert len(report.table().splitlines()) == 2 + len(report.rows)
    assert re.split(r"\s{2,}", lines[2])[:6] == ["conv2d", "conv", "*, 8, 8, 8", "uint8 → uint8", "8", "8"]


def test_the_printed_summary(report: qfx.Report) -> None:
    text = report.summary()
    for part in (
        "int8, reference",
        "9 of 14 operators in integers",
        "100.0%",
        f"{report.crossings}, 2 integer regions, 4 share groups",
        "1.8 KiB",
        f"{report.output_sqnr_db:.1f} dB",
    ):
        assert part in text, part
    assert str(report).index(report.table()) < str(report).index(text)


def test_notes_by_topic_are_cut(report: qfx.Report) -> None:
    many = dataclasses.replace(report, notes=tuple(("topic", f"line {i}") for i in range(9)))
    assert "topic: line 3" in many.remarks() and "topic: line 4" not in many.remarks()
    assert "topic: … and 5 more (report.notes)" in many.remarks()


def test_long_names_are_cut_and_values_are_whole(report: qfx.Report) -> None:
    row = dataclasses.replace(report.rows[0], layer="a" * 100, reason="b" * 100)
    long = dataclasses.replace(report, rows=(row,))
    assert max(len(line) for line in long.table().splitlines()) < 200 and "…" in long.table()
    assert long.rows[0].layer == "a" * 100


def test_noise_of_nothing_is_called_exact(report: qfx.Report) -> None:
    row = dataclasses.replace(report.rows[0], sqnr_db=math.inf)
    none = dataclasses.replace(report, rows=(row, dataclasses.replace(row, sqnr_db=None)), output_sqnr_db=None)
    assert none.table().count("exact") == 1 and "SQNR of the output" in none.summary()


def test_as_plain_values(report: qfx.Report) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["integer_macs"] == 1.0 and len(values["rows"]) == len(report.rows)
    assert values["rows"][0]["layer"] == "conv" and values["recipe"] == "int8"


def test_reports_are_values(report: qfx.Report) -> None:
    assert dataclasses.replace(report) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("recipe", ["int8_dynamic", "w8a16", "w4a16"])
def test_presets_for_linear_layers(recipe: str) -> None:
    torch.manual_seed(0)
    qmodel = qfx.quantize(Net().eval(), X, recipe=recipe, target="reference", verbose=False)
    rows = {row.layer: row for row in qfx.report(qmodel).rows if row.layer}
    assert not rows["conv"].integer and recipe in rows["conv"].reason and rows["conv"].sqnr_db == math.inf
    assert rows["fc"].integer and rows["fc"].after == "float32 → float32"
    assert rows["fc"].weight_bits == (4 if recipe == "w4a16" else 8)
    assert rows["fc"].activation_bits == (8 if recipe == "int8_dynamic" else None)
    assert qfx.report(qmodel).crossings == 0


def test_skipped_and_refined_layers() -> None:
    torch.manual_seed(0)
    recipe = qfx.Recipe.int8().skip("fc", why="it is small").set("head", weight=4)
    rows = {
        row.layer: row
        for row in qfx.report(qfx.quantize(Net().eval(), X, recipe=recipe, target="reference", verbose=False)).rows
        if row.layer
    }
    assert not rows["fc"].integer and rows["fc"].reason == "it is small" and rows["fc"].weight_bits is None
    assert rows["head"].weight_bits == 4 and rows["head"].activation_bits == 8


def test_models_of_several_graphs() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if y.sum() < 1e9 else y

    report = qfx.report(qfx.quantize(Parts().eval(), torch.randn(64, 8), target="reference", verbose=False))
    assert [row.layer for row in report.rows] == ["first", "second"]
    assert report.nodes_after > 4 and report.regions == 2 and report.float_parts
    assert "capture stopped there" in str(report) and "100.0% of those in graphs" in report.summary()


@pytest.mark.parametrize("name", MODELS_SMALL)
def test_every_reference_model_explains_every_operator(name: str) -> None:
    model, example = MODELS_SMALL[name]()
    made = qfx.report(qfx.quantize(model, example, target="reference", verbose=False))
    assert all(row.reason for row in made.rows if not row.integer)
    assert all(row.kernel for row in made.rows if row.integer)
    assert all(row.layer for row in made.rows if row.weight_bits)
    assert made.model == type(model).__name__ and len({row.name for row in made.rows}) == len(made.rows)
