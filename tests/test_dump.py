"""``qfx.dump``: stages, differences, explanations, passes, bisection, measurements and formats."""

from __future__ import annotations

import inspect
import json
import math
import re
import textwrap
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx.artifact import load, save
from qfx.dump_bisect import bisect
from qfx.dump_diff import differences, successors
from qfx.dump_formats import FORMATS, Shown
from qfx.dump_measures import measured
from qfx.dump_model import Dump, Edit, Histogram, Integers, NodeView, plain, shown_db
from qfx.dump_noise import BINS, histograms_of
from qfx.dump_why import explain, in_layer
from qfx.operators import name_of
from qfx.printer import show
from qfx.recording import Recording, record, record_quantized
from qfx.stage import Stage
from qfx.targets.reference import Reference

from .dump_subject import Small, X, small

STAGES = tuple(stage.name.lower() for stage in Stage)

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


def text(golden: str) -> str:
    return textwrap.dedent(golden).strip("\n")


@pytest.fixture(scope="module")
def recording() -> Recording:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return record(small(), X, target="reference", keep=True)


@pytest.fixture(scope="module")
def taken(recording: Recording) -> Dump:
    return measured(recording)


@pytest.fixture(scope="module")
def qmodel() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        return qfx.quantize(small(), X, target="reference", verbose=False)


def node(dump: Dump, stage: str, name: str) -> NodeView:
    (view,) = dump.at(stage)
    return view.by_name[name]


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_every_stage_in_order(recording: Recording) -> None:
    assert recording.dump.reached == STAGES
    assert [len(recording.dump.at(stage)) for stage in STAGES] == [1] * len(STAGES)


def test_the_compile_is_the_normal_one(recording: Recording, qmodel: nn.Module) -> None:
    """Watched passes make the same graph, and leave the model as it was."""
    (lowered,) = recording.lowered.values()
    assert show(lowered) == show(qmodel)  # type: ignore[arg-type]
    (view,) = recording.dump.at("lowered")
    assert "".join(n.text + "\n" for n in view.nodes) == show(lowered)
    assert recording.model is not None
    kept = recording.model.state_dict()
    assert all(torch.equal(t, kept[name]) for name, t in small().state_dict().items())


def test_passes_are_counted_timed_and_compared(recording: Recording) -> None:
    passes = {p.name: p for p in recording.dump.passes}
    assert list(passes) == [p.name for p in qfx.Pipeline.default("int8", "reference")]
    fold = passes["fuse-conv-bn"]
    assert (fold.stage, fold.rewrites, fold.nodes_before, fold.nodes_after) == ("canonical", 1, 17, 15)
    edits = {c.name: c.edit for c in fold.changes}
    assert edits["batch_norm"] is Edit.REMOVED and edits["conv2d"] is Edit.CHANGED and edits["mul_tensor"] is Edit.ADDED
    assert all(p.milliseconds >= 0.0 for p in passes.values()) and fold.milliseconds > 0.0
    wrote = {c.name: c.fields for c in passes["annotate"].changes}
    assert wrote["conv2d"] == ("bits", "inputs") and wrote["layer_norm"] == ("reason",)
    assert not passes["fuse-linear-bn"].changes


def test_facts_of_nodes(recording: Recording) -> None:
    dump = recording.dump
    conv = node(dump, "annotated", "conv2d")
    assert (conv.layer, conv.kind, conv.bits, conv.macs) == ("conv", "f32[*, 4, 4, 4]", 8, 2 * 4 * 16 * 18)
    assert conv.source.startswith(inspect.getfile(Small)) and conv.fused == ("conv2d", "relu")
    assert conv.rule.startswith("the default of int8: weight: int8 symmetric per axis 0")
    assert conv.integer and conv.region == 0 and not conv.crossing
    assert not node(dump, "fused", "conv2d").integer
    assert not node(dump, "annotated", "layer_norm").integer
    assert node(dump, "annotated", "layer_norm").reason.startswith("LayerNorm stays float")
    assert node(dump, "fused", "mul_tensor").constant and not node(dump, "fused", "mean").constant
    assert node(dump, "captured", "conv2d").layer == "conv", "before any pass has written it down"


def test_scales_are_known_from_calibration_on(recording: Recording, qmodel: nn.Module) -> None:
    scale, zero_point = float(qmodel.x_scale), int(qmodel.x_zero_point)  # type: ignore[arg-type]
    stages = ("prepared", "calibrated", "converted")
    before, *behind = (node(recording.dump, stage, "conv2d").inputs[0] for stage in stages)
    assert before == Integers("uint8 affine per tensor", 8)
    assert behind == [Integers("uint8 affine per tensor", 8, 1, (scale, scale), (zero_point, zero_point))] * 2
    weight = node(recording.dump, "calibrated", "conv2d").inputs[1]
    assert weight is not None and weight.scales == 4 and weight.scale[0] < weight.scale[1]  # type: ignore[index]
    leaf = node(recording.dump, "lowered", "conv2d_leaf")
    assert leaf.inputs == node(recording.dump, "converted", "conv2d").inputs
    assert (leaf.covers, leaf.kernel, leaf.rule) == (
        ("conv2d", "relu"),
        "reference conv2d+relu",
        node(recording.dump, "annotated", "conv2d").rule,
    )


def test_regions_and_crossings_are_those_of_the_report(recording: Recording) -> None:
    (view,) = recording.dump.at("lowered")
    report = recording.dump.report
    assert report is not None
    assert len({n.region for n in view.nodes} - {None}) == report.regions == 2
    assert sum(n.crossing for n in view.nodes) == report.crossings == 2
    assert [n.name for n in view.nodes if n.region == 0] == ["x_quantize", "conv2d_leaf"]
    (prepared,) = recording.dump.at("prepared")
    assert [n.name for n in prepared.nodes if n.crossing] == ["x_fake_quant", "layer_norm_fake_quant"], "no weights"


def test_text_of_integers() -> None:
    known = Integers("uint8 affine per tensor", 8)
    assert str(known) == "uint8 affine per tensor"
    assert str(replace(known, scales=1, scale=(0.5, 0.5), zero_point=(3, 3))).endswith(", scale 0.5, zero point 3")
    many = replace(known, scales=4, scale=(0.25, 0.5), zero_point=(0, 0))
    assert str(many).endswith(", 4 scales 0.25 to 0.5, zero point 0")
    assert str(replace(many, zero_point=(1, 5))).endswith(", zero points 1 to 5")


# --- stages -----------------------------------------------------------------------------------------------------------


def test_text_is_the_golden_format(recording: Recording) -> None:
    assert shown(recording.dump, "text", "fused") == text("""
        %x: f32[*, 2, 6, 6] = input
        %conv_weight: f32[4, 2, 3, 3] = @conv.weight  {layer conv}
        %conv_weight_factor: f32[4, 1, 1, 1] = @conv.weight_factor  {layer conv}
        %mul_tensor: f32[4, 2, 3, 3] = mul.Tensor(%conv_weight, %conv_weight_factor)  {layer conv}
        %conv_bias_folded: f32[4] = @conv.bias_folded  {layer conv}
        %conv2d: f32[*, 4, 4, 4] = conv2d(%x, %mul_tensor, %conv_bias_folded)  {layer conv; fused conv2d+relu}
        %relu: f32[*, 4, 4, 4] = relu(%conv2d)  {fused conv2d+relu}
        %mean: f32[*, 4] = mean.dim(%relu, [2, 3])
        %norm_weight: f32[4] = @norm.weight  {layer norm}
        %norm_bias: f32[4] = @norm.bias  {layer norm}
        %layer_norm: f32[*, 4] = layer_norm(%mean, [4], %norm_weight, %norm_bias, 1e-05, False)  {layer norm}
        %head_weight: f32[3, 4] = @head.weight  {layer head}
        %head_bias: f32[3] = @head.bias  {layer head}
        %linear: f32[*, 3] = linear(%layer_norm, %head_weight, %head_bias)  {layer head}
        return (%linear)
    """) + "\n"


def shown(dump: Dump, format: str, *stages: str, **options: Any) -> str:
    return FORMATS[format].write(Shown(dump, stages or dump.reached[-1:], **options))


def test_table_of_a_stage(recording: Recording) -> None:
    assert shown(recording.dump, "table", "annotated") == text("""
        node        operator     layer    value            reads                    w    kernel, or reason
        ----------  -----------  -------  ---------------  -----------------------  ---  -----------------------------------------------------------
        x           placeholder           f32[*, 2, 6, 6]
        conv2d      conv2d       conv     f32[*, 4, 4, 4]  uint8 affine per tensor  8
        relu        relu                  f32[*, 4, 4, 4]                                runs inside the kernel of conv2d
        mean        mean                  f32[*, 4]                                      nobody behind it computes in integers
        layer_norm  layer_norm   norm     f32[*, 4]                                      LayerNorm stays float: its statistics need more than 8 bits
        linear      linear       head     f32[*, 3]        uint8 affine per tensor  8
    """) + "\n"  # noqa: E501


def test_table_of_the_lowered_stage_is_the_report(recording: Recording) -> None:
    report = recording.dump.report
    assert report is not None
    assert shown(recording.dump, "table") == f"{report}\n"
    of_layer = shown(recording.dump, "table", layer="head")
    assert of_layer.splitlines()[2].startswith("linear") and len(of_layer.splitlines()) == 3


def test_dot(recording: Recording) -> None:
    assert shown(recording.dump, "dot") == text(r"""
        digraph "Small lowered" {
          label="Small lowered: int8, reference";
          node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];
          subgraph cluster_0 {
            label="integers, region 0"; color="#4c9a6a"; style=rounded;
            "x_quantize" [label="x_quantize\nqfx.quantize\nu8[*, 2, 6, 6]", fillcolor="#f6c177"];
            "conv2d_leaf" [label="conv2d_leaf\nreference conv2d+relu\nf32[*, 4, 4, 4]\nconv", fillcolor="#cfe8d5"];
          }
          subgraph cluster_1 {
            label="integers, region 1"; color="#4c9a6a"; style=rounded;
            "layer_norm_quantize" [label="layer_norm_quantize\nqfx.quantize\nu8[*, 4]\nnorm", fillcolor="#f6c177"];
            "linear_leaf" [label="linear_leaf\nreference linear\nf32[*, 3]\nhead", fillcolor="#cfe8d5"];
          }
          "x" [label="x\nf32[*, 2, 6, 6]", fillcolor="#e3e6ea"];
          "mean" [label="mean\nf32[*, 4]", fillcolor="#ffffff"];
          "layer_norm" [label="layer_norm\nf32[*, 4]\nnorm", fillcolor="#ffffff"];
          "output" [label="output", fillcolor="#e3e6ea"];
          "x" -> "x_quantize";
          "x_quantize" -> "conv2d_leaf";
          "conv2d_leaf" -> "mean";
          "mean" -> "layer_norm";
          "layer_norm" -> "layer_norm_quantize";
          "layer_norm_quantize" -> "linear_leaf";
          "linear_leaf" -> "output";
        }
    """) + "\n"


def test_dot_escapes_names(recording: Recording) -> None:
    hostile = replace(recording.dump, model='a"b\\c')
    assert 'digraph "a\\"b\\\\c lowered" {' in shown(hostile, "dot")


def test_json_holds_everything(taken: Dump) -> None:
    made = json.loads(shown(taken, "json", *STAGES), parse_constant=pytest.fail)
    assert made["schema"] == "qfx-dump/1" and made["model"] == "Small" and made["measured"] is True
    assert [s["stage"] for s in made["stages"]] == list(STAGES)
    for stage in made["stages"]:
        names = {n["name"] for n in stage["nodes"]}
        assert stage["edges"] and all(end in names for edge in stage["edges"] for end in edge)
    assert ["x", "conv2d"] in made["stages"][0]["edges"]
    conv = next(n for n in made["stages"][5]["nodes"] if n["name"] == "conv2d")
    assert conv["inputs"][0]["scale"][0] > 0.0 and len(conv["before"]["counts"]) == BINS
    assert {p["name"] for p in made["passes"]} >= {"annotate", "lower"}
    assert made["report"]["integer_macs"] == 1.0


def test_plain_values_are_json() -> None:
    given = {"a": (1.0, math.inf, -math.inf, math.nan), "b": Edit.ADDED, "c": Histogram(0.0, 1.0, (1, 2))}
    assert plain(given) == {
        "a": [1.0, "inf", "-inf", "nan"],
        "b": "added",
        "c": {"low": 0.0, "high": 1.0, "counts": [1, 2]},
    }


def test_layers_are_patterns_as_in_recipes() -> None:
    assert in_layer("layer1.0.conv1", "layer1.*") and in_layer("layer1.0.conv1", "layer1")
    assert in_layer("head", "head.*")
    assert not in_layer("layer10.0", "layer1.*") and not in_layer("", "layer1")


def test_layer_filters_nodes(qmodel: nn.Module) -> None:
    found = qfx.dump(qmodel, layer="nor*", stages=("lowered",))
    assert [line.partition(":")[0] for line in found.splitlines()] == [
        "%norm_weight",
        "%norm_bias",
        "%layer_norm",
        "%layer_norm_scale",
        "%layer_norm_zero_point",
        "%layer_norm_quantize",
    ]


# --- differences ------------------------------------------------------------------------------------------------------


def everything(_: str) -> bool:
    return True


def test_what_became_of_each_node(recording: Recording) -> None:
    (found,) = differences(recording.dump, "fused", "lowered", lambda layer: layer in ("conv", "norm"))
    assert str(found) == text("""
        fused → lowered: 15 nodes → 14
        --- fused
        +++ lowered
        @@ conv: annotate, insert-observers, convert, fold-weights, lower @@
        - %conv_weight: f32[4, 2, 3, 3] = @conv.weight  {layer conv}
        - %conv_weight_factor: f32[4, 1, 1, 1] = @conv.weight_factor  {layer conv}
        - %mul_tensor: f32[4, 2, 3, 3] = mul.Tensor(%conv_weight, %conv_weight_factor)  {layer conv}
        - %conv_bias_folded: f32[4] = @conv.bias_folded  {layer conv}
        - %conv2d: f32[*, 4, 4, 4] = conv2d(%x, %mul_tensor, %conv_bias_folded)  {layer conv; fused conv2d+relu}
        - %relu: f32[*, 4, 4, 4] = relu(%conv2d)  {fused conv2d+relu}
        + %conv2d_leaf: f32[*, 4, 4, 4] = AnchorLeaf<conv>(%x_quantize)  {layer conv; fused conv2d+relu}
        @@ norm: annotate, share-scales, convert @@
          %layer_norm: f32[*, 4] = layer_norm(%mean, [4], %norm_weight, %norm_bias, 1e-05, False)
          + group layer_norm
          + LayerNorm stays float: its statistics need more than 8 bits
        + %layer_norm_scale: f32[] = @layer_norm_scale  {layer norm}
        + %layer_norm_zero_point: i32[] = @layer_norm_zero_point  {layer norm}
        + %layer_norm_quantize: u8[*, 4] = qfx.quantize(%layer_norm, %layer_norm_scale, %layer_norm_zero_point, None, None, 0, 255, u8)  {layer norm}
    """)  # noqa: E501


def test_a_batch_norm_is_part_of_its_convolution(recording: Recording) -> None:
    (old,), (new,) = recording.dump.at("captured"), recording.dump.at("canonical")
    became = successors(old, new)
    assert became["batch_norm"] == became["bn_weight"] == became["conv2d"] == ("conv2d",)
    (found,) = differences(recording.dump, "captured", "canonical", lambda layer: layer == "conv")
    assert [n.name for n in found.hunks[-1].before][-1] == "batch_norm"


def test_every_node_is_in_one_hunk(recording: Recording) -> None:
    for before, after in pairwise(STAGES):
        (found,) = differences(recording.dump, before, after, everything)
        names = [[n.name for h in found.hunks for n in side(h)] for side in (lambda h: h.before, lambda h: h.after)]
        assert all(len(side) == len(set(side)) for side in names)
        (old,), (new,) = recording.dump.at(before), recording.dump.at(after)
        gone, came = old.by_name.keys() - new.by_name.keys(), new.by_name.keys() - old.by_name.keys()
        assert gone <= set(names[0]) and came <= set(names[1])


def test_no_difference(recording: Recording) -> None:
    (found,) = differences(recording.dump, "prepared", "calibrated", everything)
    assert str(found) == "prepared → calibrated: 19 nodes → 19, no difference"


# --- why --------------------------------------------------------------------------------------------------------------


def test_a_story(taken: Dump) -> None:
    (story,) = explain(taken, "conv2d")
    facts = dict(story.facts)
    assert (story.name, story.layer) == ("conv2d", "conv") and story.source.startswith(inspect.getfile(Small))
    assert facts["operator"] == "conv2d, f32[*, 4, 4, 4], 2,304 multiply-accumulates"
    assert facts["became"].endswith("kernel 'reference conv2d+relu', together with relu")
    assert facts["target"] == "reference takes it"
    reads = [text for what, text in story.facts if what == "reads"]
    assert [r.partition(":")[0] for r in reads] == ["x", "mul_tensor", "conv_bias_folded"]
    assert ", scale 0." in reads[0] and "4 scales" in reads[1] and "int32 at" in reads[2]
    row = next(row for row in taken.report.rows if row.name == "conv2d")  # type: ignore[union-attr]
    assert facts["SQNR"].startswith(shown_db(row.sqnr_db or 0.0)) and facts["time"].endswith("ms in %conv2d_leaf")
    steps = [what for what, _ in story.history]
    assert [s for s in steps if s in STAGES] == list(STAGES)
    assert steps.index("fuse-conv-bn") < steps.index("canonical") < steps.index("annotate") < steps.index("annotated")
    assert dict(story.history)["calibrated"] == "the same"
    assert str(story).startswith("conv2d  [layer conv, ") and "\n  history\n" in str(story)


def test_a_layer_that_is_gone_has_a_story(taken: Dump) -> None:
    (story,) = explain(taken, "bn")
    assert story.name == "batch_norm" and dict(story.facts)["became"].startswith("part of %conv2d_leaf")
    assert ("fuse-conv-bn", "  removed %batch_norm") in story.history


def test_a_pattern_has_a_story_for_each_operator(taken: Dump) -> None:
    assert [story.name for story in explain(taken, "[bhn]*")] == ["batch_norm", "layer_norm", "linear"]


def test_near_misses_rules_and_refusals_are_told() -> None:
    @dataclass(frozen=True)
    class NoMean(Reference):
        def refuses(self, node: fx.Node, op: Any, qconfig: Any) -> str | None:
            return "no sums here" if op.name == "mean" else super().refuses(node, op, qconfig)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head((self.bn(y) + y).mean((2, 3)))

    recipe = qfx.Recipe.int8().set(op="add", activation=7).skip("head", why="it is the classifier")
    dump = record(Two().eval(), X, recipe=recipe, target=NoMean()).dump
    ((conv,), (head,), (mean,)) = (explain(dump, what) for what in ("conv", "head", "mean"))
    assert any(w == "note" and "conv2d: it has a second user, add" in text for w, text in conv.facts)
    assert dict(head.facts)["rule"] == "rule 1 of 2 of int8: layer='head': float (it is the classifier)"
    assert dict(head.facts)["reason"] == "it is the classifier"
    assert dict(head.facts)["became"].startswith("it stays float")
    assert dict(mean.facts)["target"] == "reference refuses it: no sums here"
    assert "target" not in dict(head.facts), "nobody asked it"


# --- bisection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A pass with a bug: relu clips."""

    name: ClassVar[str] = "clip"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.CANONICAL, Stage.CANONICAL)
    writes: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule) -> int:
        for n in [n for n in gm.graph.nodes if name_of(n) == "relu"]:
            n.target, n.args = torch.ops.aten.hardtanh.default, (n.args[0], 0.0, 0.1)
        return 1


def test_calibration_is_where_rounding_begins(recording: Recording) -> None:
    found = bisect(recording, 60.0)
    trail = dict(found.trail)
    names = [p.name for p in recording.dump.passes]
    assert list(trail) == ["capture", *names[:10], "calibrate", *names[10:]] and names[10] == "convert"
    assert trail["capture"] == math.inf and trail["insert-observers"] > 100.0
    assert (found.culprit, found.before, found.after) == ("calibrate", trail["insert-observers"], trail["calibrate"])
    assert abs(trail["calibrate"] - trail["lower"]) < 1.0
    report = recording.dump.report
    assert report is not None and trail["eliminate-dead-code"] == pytest.approx(report.output_sqnr_db, abs=1e-3)
    noise = {row.name: row.sqnr_db for row in report.rows}
    assert found.node_db == pytest.approx(min(noise.values()), abs=1e-3)
    assert noise[found.node] == pytest.approx(found.node_db)
    assert str(found).splitlines()[-1].startswith("calibrate brings it from ")


def test_a_broken_pass_and_its_node_are_named() -> None:
    pipeline = qfx.Pipeline.default("int8", "reference").after("fuse-conv-bn", Clip())
    found = bisect(record(small(), X, target="reference", pipeline=pipeline, keep=True), 60.0)
    assert found.culprit == "clip" and found.after is not None and found.after < 60.0
    assert found.node in ("relu", "mean", "layer_norm", "linear") and found.node_db is not None and found.node_db < 60.0


@dataclass(frozen=True)
class Coarse(Reference):
    """A target with a bug: its linear layers forget their bias."""

    name: ClassVar[str] = "coarse"

    def lower_anchor(self, region: Any) -> Any:
        if region.op.name != "linear":
            return super().lower_anchor(region)
        return super().lower_anchor(replace(region, bias=torch.full_like(region.bias, 10_000)))


def test_a_broken_kernel_is_found() -> None:
    found = bisect(record(small(), X, target=Coarse(), keep=True), 20.0)
    assert (found.culprit, found.node, found.layer) == ("lower", "linear_leaf", "head")


def test_parts_cannot_be_bisected(recording: Recording) -> None:
    with pytest.raises(qfx.ConfigError, match="captured whole"):
        bisect(replace(recording, steps=()), 20.0)


def test_a_bound_that_holds(recording: Recording) -> None:
    found = bisect(recording, 5.0)
    assert not found.culprit and str(found).endswith("no pass brings it below the bound")


# --- measurements -----------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_report(taken: Dump) -> None:
    assert taken.report is not None
    for row in taken.report.rows:
        assert node(taken, "calibrated", row.name).sqnr_db == pytest.approx(row.sqnr_db, abs=1e-6)
    assert node(taken, "captured", "conv2d").sqnr_db is None, "its batch norm is not in it yet"
    assert node(taken, "lowered", "conv2d_leaf").sqnr_db == node(taken, "fused", "relu").sqnr_db


def test_noise_is_that_of_the_report_on_several_items() -> None:
    recording = record(small(), X, target="reference", calibration=[X, 0.25 * X + 0.1])
    dump = measured(recording)
    assert dump.report is not None
    for row in dump.report.rows:
        assert node(dump, "calibrated", row.name).sqnr_db == row.sqnr_db


def test_histograms_before_and_after(taken: Dump) -> None:
    x = node(taken, "fused", "x")
    assert x.before is not None and x.after is not None
    want = torch.histc(X, BINS, float(X.min()), float(X.max()))
    assert sum(x.before.counts) == sum(x.after.counts) == X.numel()
    assert (torch.tensor(x.before.counts) - want).abs().max() <= 1
    assert (x.before.low, x.before.high) == (x.after.low, x.after.high)
    weight = node(taken, "fused", "mul_tensor")
    assert weight.before is not None and sum(weight.before.counts) == 72 and weight.before != weight.after
    leaf = node(taken, "lowered", "conv2d_leaf")
    assert leaf.before == node(taken, "fused", "relu").before


def test_histograms_of_odd_values() -> None:
    before, after = histograms_of(torch.ones(3), torch.ones(3)) or pytest.fail("none")
    assert sum(before.counts) == 3 and before.low < 1.0 < before.high and before == after
    assert histograms_of(torch.tensor([1.0, math.nan]), torch.ones(2)) is None
    assert histograms_of(torch.zeros(0), torch.zeros(0)) is None
    big = torch.randn(3, 8, 64, 64).to(memory_format=torch.channels_last)
    pair = histograms_of(big, big)
    assert pair is not None and sum(pair[0].counts) == 2**14


def test_times_are_of_the_calls_of_the_lowered_graph(taken: Dump) -> None:
    (view,) = taken.at("lowered")
    timed = [n.name for n in view.nodes if n.milliseconds is not None]
    assert timed == [n.name for n in view.nodes if n.op in ("call_function", "call_module")]
    assert all(n.milliseconds > 0.0 for n in view.nodes if n.milliseconds is not None)
    assert all(n.milliseconds is None for n in taken.at("converted")[0].nodes)


# --- models at other stages -------------------------------------------------------------------------------------------


def test_a_quantized_model(qmodel: nn.Module, recording: Recording) -> None:
    assert qfx.dump(qmodel) == show(qmodel)  # type: ignore[arg-type]
    found = qfx.dump(qmodel, stages="converted,lowered")
    assert found.startswith("== converted\n%x: ") and "\n\n== lowered\n" in found
    assert qfx.dump(qmodel, format="table") == f"{qfx.report(qmodel)}\n"
    made = json.loads(qfx.dump(qmodel, X, format="json"))
    assert [s["stage"] for s in made["stages"]] == ["converted", "lowered"] and made["passes"] == []
    leaf = next(n for n in made["stages"][1]["nodes"] if n["name"] == "linear_leaf")
    assert leaf["milliseconds"] > 0.0 and leaf["rule"].startswith("the default of int8")
    assert "AnchorLeaf<conv>" in qfx.dump(qmodel, diff="converted..lowered", layer="conv")
    assert "%conv2d_leaf" in qfx.dump(qmodel, why="conv")


def test_a_prepared_model() -> None:
    prepared = qfx.prepare(small(), X, target="reference")
    assert qfx.dump(prepared) == show(prepared)  # type: ignore[arg-type]
    qfx.calibrate(prepared, [X])
    made = json.loads(qfx.dump(prepared, X, format="json"))
    assert [s["stage"] for s in made["stages"]] == ["calibrated"]
    assert any(n["sqnr_db"] for n in made["stages"][0]["nodes"])


def test_a_saved_model(qmodel: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.qfx"
    save(qmodel, path)
    assert qfx.dump(path, target="reference") == show(qmodel)  # type: ignore[arg-type]
    assert qfx.dump(str(path), format="table", target="reference").splitlines()[2].startswith("conv2d ")
    with pytest.raises(qfx.ConfigError, match="no stage 'fused': it has converted and lowered") as error:
        qfx.dump(path, stages="fused")
    assert "float model" in error.value.hint


def test_a_saved_model_has_types_and_scales(qmodel: nn.Module, tmp_path: Path, recording: Recording) -> None:
    save(qmodel, tmp_path / "small.qfx")
    dump = record_quantized(load(tmp_path / "small.qfx", target="reference")).dump
    for got, want in zip(dump.stages, recording.dump.stages[-2:], strict=True):
        facts = ("name", "integer", "crossing", "region", "kind", "rule", "kernel", "layer")
        assert [[getattr(n, f) for f in facts] for n in got.nodes] == [
            [getattr(n, f) for f in facts] for n in want.nodes
        ]
        scales = [[[i and (i.scale, i.zero_point) for i in n.inputs] for n in view.nodes] for view in (got, want)]
        assert scales[0] == scales[1]


def test_parts_of_a_model() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = small(), small()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y + self.second(x) if float(y.detach().sum()) < 1e9 else y

    dump = measured(record(Parts().eval(), X, target="reference"))
    assert [(v.stage, v.graph) for v in dump.stages[:3]] == [
        ("captured", "first"),
        ("captured", "second"),
        ("canonical", "first"),
    ]
    assert {p.graph for p in dump.passes} == {"first", "second"} and len(dump.passes) == 32
    assert len(differences(dump, "fused", "lowered", everything)) == len(explain(dump, "conv2d")) == 2
    assert all(v.by_name["layer_norm"].sqnr_db is not None for v in dump.at("calibrated"))
    assert "== lowered of second" in shown(dump, "text")


def test_bits_that_are_searched() -> None:
    auto = qfx.AutoRecipe(average_weight_bits=6.0, weight_bits=(4, 8), pin_first_last=None, rows=2)
    dump = measured(record(small(), X, recipe=auto, target="reference"))
    (calibrated,) = dump.at("calibrated")
    assert {"measure-sensitivity", "annotate-again"} <= {p.name for p in dump.passes}
    assert {calibrated.by_name[name].bits for name in ("conv2d", "linear")} == {4, 8}
    noise = {row.name: row.sqnr_db for row in dump.report.rows}  # type: ignore[union-attr]
    assert calibrated.by_name["linear"].sqnr_db == pytest.approx(noise["linear"], abs=1e-6)
    assert any(what == "sensitivity" for what, _ in explain(dump, "conv2d")[0].facts)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"format": "svg"}, "no format 'svg'", "table, text, dot, json"),
        ({"format": "dot", "why": "conv"}, "'dot' shows stages alone", "table, text, json"),
        ({"stages": "fused,lowred"}, "no stage 'lowred'; did you mean 'lowered'", "captured, canonical"),
        ({"diff": "fused"}, "'fused' names no two stages", r"fused\.\.lowered"),
        ({"diff": "lowered..fused"}, "lowered does not come before fused", r"fused\.\.lowered"),
        ({"diff": "fused..fusd"}, "no stage 'fusd'", ""),
        ({"stages": "fused"}, "no stage 'fused': it has converted and lowered", "float model"),
        ({"diff": "fused..lowered"}, "no stage 'fused'", "float model"),
        ({"pass_by_pass": True}, "ran long ago", "float model"),
        ({"bisect": 20.0}, "ran long ago", "float model"),
        ({"layer": "haed"}, "no layer 'haed'", "'head'"),
        ({"why": "conv3d"}, "no node and no layer 'conv3d'", "'conv2d'"),
    ],
)
def test_refusals(qmodel: nn.Module, options: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(qfx.ConfigError, match=what) as error:
        qfx.dump(qmodel, **options)
    assert re.search(hint, error.value.hint)


def test_what_cannot_be_shown() -> None:
    with pytest.raises(qfx.ConfigError, match="Small is a float model"):
        qfx.dump(small())
    with pytest.raises(qfx.ConfigError, match="int cannot be shown"):
        qfx.dump(3)  # type: ignore[arg-type]
    with pytest.raises(qfx.ConfigError, match="no stage 'lowered': it has prepared, and remembers no other"):
        qfx.dump(qfx.prepare(small(), X, target="reference"), stages="lowered")


def test_all_at_once() -> None:
    options = {"stages": "annotated,fused", "diff": "fused..annotated", "why": "conv", "pass_by_pass": True}
    options["bisect"] = 20.0
    found = qfx.dump(small(), X, target="reference", **options)  # type: ignore[arg-type]
    heads = ("== fused\n%x: f32", "== annotated\n%x: f32", "== fused → annotated: ", "\nconv2d  [layer conv")
    places = [found.index(head) for head in (*heads, "\npass  ", "\nSQNR of the output against the float model, ")]
    assert places == sorted(places)
    made = json.loads(qfx.dump(small(), X, target="reference", format="json", **options))  # type: ignore[arg-type]
    assert made["bisection"]["culprit"] == "" and [s["name"] for s in made["why"]] == ["conv2d"]
    assert made["diff"][0]["hunks"][0]["after"] and [s["stage"] for s in made["stages"]] == ["fused", "annotated"]


def test_nothing_is_printed(qmodel: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    qfx.dump(qmodel, format="json")
    assert capsys.readouterr() == ("", "")


def test_a_report_in_a_notebook(qmodel: nn.Module) -> None:
    report = qfx.report(qmodel)
    hostile = replace(report, rows=(replace(report.rows[0], layer="<b>x"),), notes=(("topic", "a < b"),))
    html = hostile._repr_html_()
    assert html.count("<table>") == 2 and "&lt;b&gt;x" in html and "topic: a &lt; b" in html and "<b>" not in html
    assert "multiply-accumulates in integer" in html


