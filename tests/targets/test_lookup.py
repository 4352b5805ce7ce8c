"""Rows of integers, gathered and dequantized: both targets against the table dequantized as a whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx import affine
from qfx.operators import OPS
from qfx.ops import pack
from qfx.patterns import NoMatch
from qfx.targets import TARGETS, Leaf, LookupRegion, QParams, Target

AVAILABLE = [target for target in TARGETS.values() if target.unavailable() is None]
each_target = pytest.mark.parametrize("target", AVAILABLE, ids=lambda t: t.name)

LAYOUTS = {"row": (0, None), "group": (-1, 5), "whole row": (-1, -1), "tensor": (None, None)}


def region(
    rows: int = 9,
    length: int = 13,
    bits: int = 8,
    *,
    signed: bool = True,
    affine_: bool = False,
    layout: str | tuple[int | None, int | None] = "row",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[LookupRegion, Tensor]:
    """A region of random integers, and what its table stands for, float32."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    held = torch.int8 if signed else torch.uint8
    q = torch.randint(low, high + 1, (rows, length), generator=generator).to(held)
    axis, group_size = LAYOUTS[layout] if isinstance(layout, str) else layout
    shape = affine.scale_shape(q, axis, group_size)
    scale = 0.01 + torch.rand(shape, generator=generator)
    middle = torch.full(shape, 0 if signed else 1 << (bits - 1), dtype=torch.int32)
    zero_point = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32) if affine_ else middle
    table = affine.dequantize(q, scale, zero_point, axis=axis, group_size=group_size)
    qparams = QParams(scale, zero_point, axis, group_size, low, high, held)
    return LookupRegion(OPS["embedding"], pack(q, bits), bits, signed, length, qparams, dtype), table


def leaf_of(target: Target, made: LookupRegion) -> Leaf:
    leaf = target.lower_lookup(made)
    assert isinstance(leaf, Leaf)
    return leaf


@each_target
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 12),
    length=st.integers(1, 40),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    affine_=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 1000),
)
def test_equals_the_lookup_in_the_dequantized_table(
    target: Target, rows, length, bits, signed, affine_, layout, dtype, shape, index_dtype, seed
) -> None:
    made, table = region(
        rows, length, bits, signed=signed, affine_=affine_, layout=layout, dtype=dtype, seed=seed
    )
    indices = torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed), dtype=index_dtype)
    got, want = leaf_of(target, made)(indices), F.embedding(indices, table.to(dtype))
    assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)


@each_target
@pytest.mark.parametrize("layout", [(1, None), (-1, None), (0, 4)])
def test_declines_scales_across_rows(target: Target, layout: tuple[int, int | None]) -> None:
    found = target.lower_lookup(region(layout=layout)[0])
    assert isinstance(found, NoMatch) and "scales across its rows" in found.reason


@each_target
@pytest.mark.parametrize("index", [9, -1])
def test_an_index_outside_the_table_is_the_float_models_error(target: Target, index: int) -> None:
    made, table = region()
    with pytest.raises(IndexError) as of_float:
        F.embedding(torch.tensor([index]), table)
    with pytest.raises(IndexError) as of_leaf:
        leaf_of(target, made)(torch.tensor([[0, index]]))
    assert str(of_leaf.value) == str(of_float.value)


@each_target
def test_an_empty_table_takes_no_indices(target: Target) -> None:
    made, _ = region(rows=0)
    assert leaf_of(target, made)(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 13)


@each_target
def test_a_symmetric_table_keeps_one_zero_point(target: Target) -> None:
    assert leaf_of(target, region()[0]).zero_point.shape == ()
    assert leaf_of(target, region(affine_=True)[0]).zero_point.shape == (9,)


@each_target
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_pickles_and_holds_the_regions_own_table(target: Target, bits: int) -> None:
    made, _ = region(bits=bits)
    leaf, indices = leaf_of(target, made), torch.tensor([[1, 0], [8, 8]])
    assert leaf.weight is made.table, "another layer may hold it too"
    for twin in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert torch.equal(twin(indices), leaf(indices)) and twin.extra_repr() == leaf.kernel


@each_target
@pytest.mark.parametrize("bits", [4, 8])
def test_compiles_and_exports(target: Target, bits: int) -> None:
    leaf, indices = leaf_of(target, region(bits=bits)[0]), torch.tensor([[1, 0, 3], [8, 8, 2]])
    compiled = torch.compile(leaf, fullgraph=True, backend="aot_eager", dynamic=True)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    exported = torch.export.export(leaf, (indices,), dynamic_shapes=shapes).module()
    for some in (indices, indices[:, :2].repeat(3, 1)):
        assert torch.equal(compiled(some), leaf(some)) and torch.equal(exported(some), leaf(some))
