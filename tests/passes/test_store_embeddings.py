"""Tables of embeddings are stored in integers, their lookups stay float."""
# ruff: noqa: E501  lines of goldens

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qfx
from qfx import calibration
from qfx.attributes import get_tensor, nbytes
from qfx.calling import flat_inputs
from qfx.errors import ConfigError
from qfx.examples import as_example
from qfx.meta import graph_info, info
from qfx.models import MODELS_SMALL
from qfx.operators import name_of
from qfx.parity import converted, lockstep
from qfx.passes import (
    Annotate,
    CancelPairs,
    Canonicalize,
    Convert,
    EliminateDeadCode,
    FoldWeights,
    Functionalize,
    FuseEpilogues,
    InsertObservers,
    Lower,
    ShareScales,
    StoreEmbeddings,
)
from qfx.patterns import NoMatch
from qfx.pipeline import run_pass
from qfx.recipe import Recipe
from qfx.spec import INT8 as INT8_TYPE
from qfx.spec import PerTensor, QuantSpec, Scheme
from qfx.targets import TARGETS, Leaf, LookupRegion, Reference
from qfx.testing import assert_graph, run_passes

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

IDS = torch.tensor([[0, 3, 5], [5, 1, 2]])
INT8, W8, W4 = (Recipe.preset(name).with_embedding_storage(8) for name in ("int8", "w8a16", "w4a16"))
# Not native, which compiles for seconds: tests/native has its own.
AVAILABLE = [name for name, target in TARGETS.items() if name != "native" and target.unavailable() is None]
each_target = pytest.mark.parametrize("target", AVAILABLE)


def annotated(model: nn.Module, recipe: Recipe, *args: Tensor) -> fx.GraphModule:
    front = (Functionalize(), Canonicalize(), FuseEpilogues(), Annotate(recipe, Reference()))
    return run_passes(model, args or IDS, *front, StoreEmbeddings(recipe))


def in_integers(model: nn.Module, recipe: Recipe, *args: Tensor) -> fx.GraphModule:
    """The CONVERTED graph."""
    gm = annotated(model, recipe, *args)
    for p in (ShareScales(), InsertObservers()):
        run_pass(p, gm)
    calibration.observe_weights(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration.run(gm, [gm], [args or IDS], as_example(args or IDS))
    for p in (Convert(), FoldWeights(), CancelPairs()):
        run_pass(p, gm)
    return gm


def lowered(model: nn.Module, recipe: Recipe, *args: Tensor, target: Any = None) -> fx.GraphModule:
    gm = in_integers(model, recipe, *args)
    for p in (Lower(target or Reference()), EliminateDeadCode()):
        run_pass(p, gm)
    return gm


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def lookups(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if name_of(n).startswith("embedding")]


def notes(gm: nn.Module) -> list[str]:
    return [text for topic, text in graph_info(gm).notes if topic == "embedding storage"]


def stored(gm: fx.GraphModule) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a CONVERTED graph that hold integers of tables and weights."""
    read = {str(n.target): get_tensor(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    return {path: (t.dtype, tuple(t.shape)) for path, t in read.items() if t.dtype in (torch.int8, torch.uint8)}


# --- goldens ----------------------------------------------------------------------------------------------------------


class Lookup(nn.Module):
    def __init__(self, rows: int = 6, length: int = 4, **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(rows, length, **options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids) + 1.0


def test_golden_annotated() -> None:
    assert_graph(annotated(seeded(Lookup), INT8), """
        %ids: i64[*, *] = input
        %emb_weight: f32[6, 4] = @emb.weight  {layer emb}
        %embedding: f32[*, *, 4] = embedding(%emb_weight, %ids)  {layer emb; in int8 symmetric per axis 0, float; embeddings stay float, the table in 8 bits}
        %add: f32[*, *, 4] = add.Tensor(%embedding, 1.0)  {its input embedding is float}
        return (%add)
    """)


def test_golden_8_bits() -> None:
    assert_graph(in_integers(seeded(Lookup), INT8), """
        %ids: i64[*, *] = input
        %emb_weight_scale: f32[6] = @emb_weight_scale
        %emb_weight_zero_point: i32[6] = @emb_weight_zero_point
        %emb_weight_1: i8[6, 4] = @emb.weight
        %emb_weight_dequantize: f32[6, 4] = qfx.dequantize(%emb_weight_1, %emb_weight_scale, %emb_weight_zero_point, 0, None, f32)
        %embedding: f32[*, *, 4] = embedding(%emb_weight_dequantize, %ids)
        %add: f32[*, *, 4] = add.Tensor(%embedding, 1.0)
        return (%add)
    """, with_info=False)


def test_golden_4_bits() -> None:
    assert_graph(in_integers(seeded(lambda: Lookup(length=40)), INT8.with_embedding_storage(4)), """
        %ids: i64[*, *] = input
        %emb_weight_scale: f32[6, 2] = @emb_weight_scale
        %emb_weight_zero_point: i32[6, 2] = @emb_weight_zero_point
        %emb_weight_packed: u8[6, 20] = @emb.weight_packed
        %unpack_default: i8[6, 40] = qfx.unpack(%emb_weight_packed, 4, True, 40)
        %emb_weight_dequantize: f32[6, 40] = qfx.dequantize(%unpack_default, %emb_weight_scale, %emb_weight_zero_point, -1, 32, f32)
        %embedding: f32[*, *, 40] = embedding(%emb_weight_dequantize, %ids)
        %add: f32[*, *, 40] = add.Tensor(%embedding, 1.0)
        return (%add)
    """, with_info=False)


def test_golden_lowered() -> None:
    gm = lowered(seeded(Lookup), INT8)
    assert_graph(gm, """
        %ids: i64[*, *] = input
        %embedding_leaf: f32[*, *, 4] = LookupLeaf<emb>(%ids)  {layer emb; fused embedding; embeddings stay float, the table in 8 bits}
        %add: f32[*, *, 4] = add.Tensor(%embedding_leaf, 1.0)  {its input embedding is float}
        return (%add)
    """)
    assert [name for name, _ in gm.named_buffers()] == ["emb.weight", "emb.scale", "emb.zero_point"]


# --- the recipe's field -----------------------------------------------------------------------------------------------


def test_it_is_off_by_default() -> None:
    gm = annotated(seeded(Lookup), Recipe.int8())
    assert info(lookups(gm)[0]).reason == "embeddings stay float: a lookup multiplies nothing"
    assert Recipe.int8().embedding_storage is None and not notes(gm)
    assert run_pass(StoreEmbeddings(Recipe.int8()), gm) == 0


def test_the_recipe_is_a_value() -> None:
    assert INT8 == Recipe.int8().with_embedding_storage() != Recipe.int8()
    assert INT8.with_embedding_storage(None) == Recipe.int8()
    assert "embeddings stored in 8 bits" in str(INT8) and "embedding" not in str(Recipe.int8())
    assert INT8.skip("head").embedding_storage == 8


@pytest.mark.parametrize("bits", [0, 2, 16, True, "8", "int8"])
def test_other_widths_are_refused(bits: Any) -> None:
    with pytest.raises(ConfigError, match=r"embeddings cannot be stored in .* bits") as raised:
        Recipe.int8().with_embedding_storage(bits)
    assert raised.value.hint == "choose 4 or 8, or None for float"


def test_a_model_without_embeddings_is_told() -> None:
    gm = annotated(seeded(lambda: nn.Sequential(nn.Linear(3, 3))), INT8, torch.randn(2, 3))
    assert notes(gm) == ["Sequential has no embedding to store in 8 bits"]


# --- declined ---------------------------------------------------------------------------------------------------------


def float_notes(model: nn.Module, recipe: Recipe = INT8, *args: Tensor) -> list[str]:
    """The notes of a model whose embeddings all stay float."""
    gm = annotated(model, recipe, *args)
    assert not any(info(n).quantized or info(n).bits for n in lookups(gm))
    return notes(gm)


@pytest.mark.parametrize("rule", [{"layer": "emb"}, {"layer": nn.Embedding}, {"op": "embedding"}])
def test_declines_what_the_recipe_skips(rule: dict[str, Any]) -> None:
    skipping = INT8.skip(**rule, why="rare words")
    assert float_notes(seeded(Lookup), skipping) == ["embedding: its table stays float: rare words"]


def test_a_presets_own_rules_skip_no_table() -> None:
    assert W8.resolve(qfx.recipe.Subject("embedding", "emb"))[0] is None
    assert info(lookups(annotated(seeded(Lookup), W8))[0]).bits == 8


def test_declines_a_table_that_an_operator_changes() -> None:
    found = float_notes(seeded(lambda: Lookup(max_norm=1.0)))
    assert found == ["embedding: its table stays float: an in-place operator changes it"]


class Computed(Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.emb.weight * ids.float().mean())


def test_declines_a_table_computed_from_inputs() -> None:
    assert float_notes(seeded(Computed)) == ["embedding: its table stays float: it is computed from inputs"]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 4, mode="sum")

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


def test_declines_bags() -> None:
    model = seeded(Bag)
    found = float_notes(model)
    assert found == ["embedding_bag: its table stays float: embedding_bag has no kernel for integers"]
    assert torch.equal(qfx.quantize(model, IDS, recipe=INT8, verbose=False)(IDS), model(IDS))


class Summed(Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        return self.emb(ids) + self.emb.weight[:1].exp().sum()


def test_declines_a_table_that_is_read_in_float_too() -> None:
    assert float_notes(seeded(Summed)) == ["embedding: its table stays float: add reads it in float"]


class Tied(nn.Module):
    """A language model whose output layer has the embedding's weight, under a name of its own or not."""

    def __init__(self, rows: int = 9, length: int = 64, *, renamed: bool = True) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(rows, length), nn.Linear(length, length)
        self.head = nn.Linear(length, rows, bias=False) if renamed else None
        if self.head is not None:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.emb(ids))
        return F.linear(x, self.emb.weight) if self.head is None else self.head(x)


def test_declines_where_the_tied_layer_stays_float() -> None:
    found = float_notes(seeded(Tied), INT8.skip("head"))
    assert found == ["embedding: its table stays float: head reads it in float"]


class Three(nn.Module):
    """Two embeddings of one table; the first has another table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.one, self.two = (nn.Embedding(6, 4) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.own(ids) + self.one(ids) + self.two(ids)


def test_one_skipped_embedding_keeps_the_table_of_all_that_share_it() -> None:
    gm = annotated(seeded(Three), INT8.skip("two"))
    assert [info(n).bits for n in lookups(gm)] == [8, None, None]
    assert notes(gm) == [
        "embedding_1: its table stays float: two reads it in float",
        "embedding_2: its table stays float: the recipe skips it",
    ]


@dataclass(frozen=True)
class NoLookups(Reference):
    """A target that gathers nothing."""

    name: ClassVar[str] = "no-lookups"

    def lower_lookup(self, region: LookupRegion) -> Leaf | NoMatch:
        return NoMatch("no lookups here")


def test_a_target_may_decline_and_the_portable_form_stays() -> None:
    model = seeded(Lookup)
    gm = lowered(model, INT8, target=NoLookups())
    (node,) = lookups(gm)
    assert info(node).reason == "float: no lookups here" and get_tensor(gm, "emb.weight").dtype == torch.int8
    assert ("not lowered", "embedding: no lookups here") in graph_info(gm).notes
    assert torch.equal(gm(IDS), lowered(model, INT8)(IDS))


# --- tables that several read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("renamed", [True, False])
def test_a_tied_output_layer_and_the_embedding_share_integers(renamed: bool) -> None:
    model = seeded(lambda: Tied(renamed=renamed))
    gm = in_integers(model, INT8)
    assert stored(gm) == {"emb.weight": (torch.int8, (9, 64)), "fc.weight": (torch.int8, (64, 64))}
    (node,) = lookups(gm)
    assert info(node).reason.startswith("embeddings stay float, the table in 8 bits, shared with ")
    run_pass(Lower(Reference()), gm)
    leaves = [m for m in gm.modules() if isinstance(m, Leaf)]
    assert leaves[0].weight is leaves[-1].weight and leaves[0].weight.shape == (9, 64)


def test_more_bits_of_a_tied_layer_serve_the_embedding_too() -> None:
    """4 bits beside the layer's 8 would be more memory for less accuracy."""
    gm = in_integers(seeded(Tied), INT8.with_embedding_storage(4))
    assert stored(gm) == {"emb.weight": (torch.int8, (9, 64)), "fc.weight": (torch.int8, (64, 64))}
    assert info(lookups(gm)[0]).bits == 8


def test_groups_of_a_tied_layer_serve_the_embedding_too() -> None:
    gm = in_integers(seeded(Tied), W4.with_embedding_storage(4))
    assert stored(gm) == {"emb.weight_packed": (torch.uint8, (9, 32)), "fc.weight_packed": (torch.uint8, (64, 32))}
    assert info(lookups(gm)[0]).reason == "embeddings stay float, the table in 4 bits, shared with head"
    run_pass(Lower(Reference()), gm)
    leaves = [m for m in gm.modules() if isinstance(m, Leaf)]
    assert leaves[0].weight is leaves[-1].weight, "packed once for both"


ONE_SCALE = QuantSpec(INT8_TYPE, Scheme.SYMMETRIC, PerTensor())


@pytest.mark.parametrize(
    "recipe",
    [W4, INT8.set("head", weight=4), INT8.set("head", weight=ONE_SCALE)],
    ids=["groups of 4 bits", "4 bits", "one scale"],
)
def test_a_tied_layer_at_fewer_bits_or_one_scale_leaves_the_embedding_its_own_copy(recipe: Recipe) -> None:
    gm = in_integers(seeded(Tied), recipe)
    tables = {path: shape for path, (_, shape) in stored(gm).items() if shape[0] == 9}
    assert len(tables) == 2 and (9, 64) in tables.values()
    assert info(lookups(gm)[0]).reason == "embeddings stay float, the table in 8 bits"
    assert not any(n.op == "get_attr" and n.meta["val"].shape == (9, 64) and n.meta["val"].is_floating_point() for n in gm.graph.nodes)


def test_embeddings_share_a_table() -> None:
    gm = in_integers(seeded(Three), INT8)
    assert stored(gm) == {"own.weight": (torch.int8, (6, 4)), "one.weight": (torch.int8, (6, 4))}
    assert [info(n).reason.partition("bits")[2] for n in lookups(gm)] == ["", "", ", shared with one"]


def test_a_tied_layer_does_not_change_what_the_embedding_gives() -> None:
    model = seeded(Tied)
    alone = Lookup(9, 64)
    alone.emb.weight = model.emb.weight
    first = next(m for m in lowered(model, INT8).modules() if isinstance(m, Leaf))
    assert torch.equal(first(IDS) + 1.0, lowered(alone.eval(), INT8)(IDS))


# --- numerics ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 20),
    length=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    magnitude=st.floats(-6, 6),
    seed=st.integers(0, 1000),
)
def test_a_stored_row_is_within_half_a_step(rows: int, length: int, bits: int, magnitude: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Lookup(rows, length).eval()
    with torch.no_grad():
        model.emb.weight.copy_(torch.randn(rows, length, generator=generator) * 10**magnitude)
    leaf = next(m for m in lowered(model, INT8.with_embedding_storage(bits), torch.zeros(2, 3).long()).modules() if isinstance(m, Leaf))
    got, want = leaf(torch.arange(rows)), model.emb.weight.detach()
    step = leaf.scale.unsqueeze(1) if bits == 8 else leaf.scale.repeat_interleave(32, 1)[:, :length]
    # The extreme positive value of a symmetric range is half a step beyond the greatest integer.
    assert bool(((got - want).abs() <= step * 0.5001).all())


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_floats_stay_narrow(target: str, dtype: torch.dtype) -> None:
    model = seeded(lambda: Lookup(50, 32)).to(dtype)
    qmodel = qfx.quantize(model, IDS, recipe=W8, target=target, verbose=False)
    want = model(IDS)
    assert qmodel(IDS).dtype == dtype and qfx.metrics.sqnr_db(want, qmodel(IDS)) > 40


@each_target
def test_the_row_of_padding_stays_zero(target: str) -> None:
    model = seeded(lambda: Lookup(padding_idx=3))
    qmodel = qfx.quantize(model, IDS, recipe=INT8, target=target, verbose=False)
    assert torch.equal(qmodel(torch.tensor([[3, 3]])), torch.ones(1, 2, 4))


class Positions(nn.Module):
    """Positions come from a buffer, at any length, as transformers do it."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(6, 4), nn.Embedding(16, 4)
        self.register_buffer("ids", torch.arange(16).unsqueeze(0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.word(ids) + self.position(self.ids[:, : ids.shape[1]])


@each_target
def test_ids_of_any_shape(target: str) -> None:
    model = seeded(Positions)
    qmodel = qfx.quantize(model, IDS, recipe=INT8, target=target, verbose=False)
    for ids in (IDS, IDS[:1], IDS.repeat(3, 2), IDS[:, :0]):
        want = model(ids)
        assert qmodel(ids).shape == want.shape and torch.allclose(qmodel(ids), want, atol=0.05)
    deep = seeded(Lookup)
    block = torch.randint(6, (2, 3, 4, 5))
    assert qfx.quantize(deep, block, recipe=INT8, target=target, verbose=False)(block).shape == (2, 3, 4, 5, 4)


# --- the whole --------------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("name", ["bert_base", "llama"])
def test_reference_models(name: str, target: str) -> None:
    model, example = MODELS_SMALL[name]()
    plain, small = (
        qfx.report(qfx.quantize(model, example, recipe=recipe, target=target, verbose=False))
        for recipe in (W8.with_embedding_storage(None), W8)
    )
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    rows = [row for row in small.rows if row.operator == "embedding"]
    # Each table read by a lookup becomes bytes and a scale a row; that of a tied layer was in the report twice.
    saved = {row.layer: model.get_submodule(row.layer).weight for row in rows}
    tied = name == "llama"
    expected = sum(4 * t.numel() - (0 if tied else t.numel()) - 4 * len(t) - 4 for t in saved.values())
    assert rows and len(rows) <= len(tables)
    assert plain.weight_bytes_after - small.weight_bytes_after == expected
    assert plain.output_sqnr_db is not None and small.output_sqnr_db is not None
    assert small.output_sqnr_db > 32 and plain.output_sqnr_db - small.output_sqnr_db < 12
    for row in rows:
        assert row.weight_bits == 8 and row.after == "float" and not row.integer and row.activation_bits is None
        assert row.reason.startswith("embeddings stay float, the table in 8 bits") and "rows of int8" in row.kernel
        assert row.sqnr_db is not None and 38 < row.sqnr_db < 60, "the noise of the table itself"
    assert small.quantized == plain.quantized and not small.crossings


@pytest.mark.parametrize(("name", "bits"), [("bert_base", 4), ("llama", 8)])
@pytest.mark.skipif("x86" not in AVAILABLE, reason="needs x86")
def test_x86_equals_reference(name: str, bits: int) -> None:
    model, example = MODELS_SMALL[name]()
    gm = converted(model, example, recipe=INT8.with_embedding_storage(bits), target="x86")
    assert isinstance(gm, fx.GraphModule)
    call = as_example(example)
    found = lockstep(gm, flat_inputs(gm, call.args, dict(call.kwargs)), "x86")
    differences = [d.relative for d in found if "rows of int" in d.kernel]
    assert differences and set(differences) == {0.0}


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _through_file(m),
    "to": lambda m: copy.deepcopy(m).to("cpu"),
    "state dict": lambda m: _reloaded(m),
}


def _through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _reloaded(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for t in twin.buffers():
        t.zero_()
    twin.load_state_dict(model.state_dict())
    return twin


@functools.cache
def tied(recipe: Recipe, target: str) -> nn.Module:
    return qfx.quantize(seeded(Tied), IDS, recipe=recipe, target=target, verbose=False)


@each_target
@pytest.mark.parametrize("recipe", [INT8, W4.with_embedding_storage(4)], ids=["int8", "w4a16"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same_and_stays_tied(way: str, recipe: Recipe, target: str) -> None:
    qmodel = tied(recipe, target)
    want = qmodel(IDS)
    twin = WAYS[way](qmodel)
    assert torch.equal(twin(IDS), want)
    assert nbytes(twin.buffers()) == nbytes(qmodel.buffers()) == qfx.report(qmodel).weight_bytes_after


@each_target
def test_compiles(target: str) -> None:
    qmodel = qfx.quantize(seeded(Tied), IDS, recipe=W8, target=target, verbose=False)
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IDS), qmodel(IDS), atol=1e-5)


def test_the_users_model_stays_as_it_is() -> None:
    model = seeded(Tied)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    qfx.quantize(model, IDS, recipe=INT8, verbose=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_inplace_gives_up_the_float_table() -> None:
    model = seeded(Tied)
    copied = qfx.quantize(model, IDS, recipe=INT8, verbose=False)
    qmodel = qfx.quantize(model, IDS, recipe=INT8, inplace=True, verbose=False)
    assert all(p.is_meta for p in model.parameters()) and torch.equal(qmodel(IDS), copied(IDS))
    assert qfx.report(qmodel).weight_bytes_after == qfx.report(copied).weight_bytes_after


def test_a_prepared_model_computes_what_the_float_model_computes() -> None:
    model = seeded(Tied)
    prepared = qfx.prepare(model, IDS, recipe=INT8)
    assert torch.equal(prepared(IDS), model(IDS))
    qfx.calibrate(prepared, [IDS])
    assert torch.equal(prepared(IDS), model(IDS)) and prepared.get_parameter("emb.weight") is not None


def test_gradients_pass_where_only_weights_are_integers() -> None:
    """A lookup has integers for inputs: it stops no gradient."""
    model = seeded(lambda: Mixed())
    x = torch.randn(2, 3, 64, requires_grad=True)
    qfx.quantize(model, (IDS, x), recipe=W8, verbose=False)(IDS, x).sum().backward()
    assert x.grad is not None and bool(x.grad.ne(0).any())


class Mixed(Tied):
    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.fc(self.emb(ids) + x)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_rounds_the_table(sparse: bool) -> None:
    """The prepared model computes with the rounded table, so that converting it changes nothing."""
    model = Lookup(sparse=sparse)
    prepared = qfx.prepare(model, IDS, recipe=W8, mode="qat").train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared(IDS).square().mean().backward()
    optimizer.step()
    prepared.eval()
    want = prepared(IDS).detach()
    assert torch.equal(qfx.convert(prepared)(IDS), want)
    assert not torch.equal(want - 1.0, F.embedding(IDS, prepared.get_parameter("emb.weight"))), "it was rounded"
