"""Rows of tables by index in native programs: results, indices that lead out, and whose memory the table is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import jit
from qfx.targets.native.compiled import Compiled
from qfx.targets.native.inlined import inlined

from .nets import Net, assert_agrees, assert_near, calls_of, native, region_of

pytestmark = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")

ROWS = 4001
TOKENS = torch.randint(0, ROWS, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def body(s: Net, i: Tensor) -> tuple[Tensor, ...]:
    """Tokens, positions, and kinds of few, all read by layers or norms; and rows of one index for each sample."""
    places = torch.arange(i.shape[1])
    y = s.words(i) + s.places(places) + s.kinds((i > 9).long())
    return s.n(y), s.a(s.n(y)), s.words(i[:, 0]), s.b(s.words(i)), s.words(i[:, 1::2])


@pytest.fixture(scope="module")
def made() -> fx.GraphModule:
    torch.manual_seed(0)
    tables = {"places": nn.Embedding(9, 12), "kinds": nn.Embedding(2, 12)}
    tables["words"] = nn.Embedding(ROWS, 12, padding_idx=3)
    net = Net(body, **tables, n=nn.LayerNorm(12), a=nn.Linear(12, 5), b=nn.Linear(12, 3))
    net.words.weight.data[3] = 1.5  # a row that only training leaves alone
    return native(net, TOKENS)


def program(made: fx.GraphModule) -> Compiled:
    made(TOKENS)
    return region_of(made).programs[0]


@pytest.mark.parametrize("batch, threads", [(1, 1), (5, 3), (0, 1), (2, 16)])
def test_rows_of_tables(made: fx.GraphModule, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    tokens = torch.randint(0, ROWS, (batch, 7))
    tokens[:, :2] = torch.tensor([3, ROWS - 1])
    found = assert_agrees(made, tokens, regions=len(calls_of(made, TOKENS)), lsb=1)
    assert sum("embedding" in d.node.name for d in found) >= 3


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("wrong", [ROWS, -1, 2**40, -(2**40)])
def test_an_index_that_leads_out(made: fx.GraphModule, wrong: int, threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.no_grad():
        before = made(TOKENS)
        for place in ((0, 0), (3, 6), (2, 1)):
            bad = TOKENS.clone()
            bad[place] = wrong
            with pytest.raises(IndexError, match="index out of range in self"):
                made(bad)
        after = made(TOKENS)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_tables_stay_where_they_are(made: fx.GraphModule) -> None:
    held = program(made)
    (table,) = {t.data_ptr() for t in held._tables if t.shape == (ROWS, 12)}
    assert table in {t.data_ptr() for t in made.state_dict().values()}
    assert held.constant_bytes < ROWS * 12


def test_a_copy_has_tables_of_its_own(made: fx.GraphModule) -> None:
    twin = copy.deepcopy(made)
    with torch.no_grad():
        before = made(TOKENS)
        for one, other in zip(before, twin(TOKENS), strict=True):
            assert torch.equal(one, other)
        for tensor in region_of(twin).state_dict().values():
            if tensor.shape == (ROWS, 12):
                tensor.zero_()
        assert not twin(TOKENS)[2].any()
        assert all(torch.equal(one, other) for one, other in zip(before, made(TOKENS), strict=True))


def test_new_tables_are_read(made: fx.GraphModule) -> None:
    """Behind ``load_state_dict`` and where tensors are put elsewhere, also where they are new objects."""
    for how in ("copied", "assigned", "moved"):
        twin = copy.deepcopy(made)
        twin(TOKENS)
        state = {name: t * 2 if t.shape == (ROWS, 12) else t for name, t in twin.state_dict().items()}
        with torch.no_grad():
            if how == "moved":
                twin._apply(lambda t: t * 2 if t.shape == (ROWS, 12) else t.clone())
            else:
                twin.load_state_dict(state, assign=how == "assigned")
            assert torch.equal(twin(TOKENS)[2], made(TOKENS)[2] * 2)
            assert_near(twin(TOKENS), inlined(twin)(TOKENS))


def test_saved_and_loaded(made: fx.GraphModule, tmp_path: Path) -> None:
    qfx.save(made, tmp_path / "model.qfx")
    loaded = qfx.load(tmp_path / "model.qfx", target="native")
    assert isinstance(loaded, fx.GraphModule)
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(made(TOKENS), loaded(TOKENS), strict=True))
    held = program(loaded)
    assert {t.data_ptr() for t in held._tables} <= {t.data_ptr() for t in loaded.state_dict().values()}


def test_int32_indices() -> None:
    net = Net(lambda s, i: s.a(s.words(i)), words=nn.Embedding(50, 8), a=nn.Linear(8, 3))
    made = native(net, tokens := torch.randint(0, 50, (4, 7), dtype=torch.int32))
    with torch.no_grad():
        assert_near(made(tokens), net(tokens), tolerance=0.1)
        assert_near(made(tokens[:2]), inlined(made)(tokens[:2]))
        with pytest.raises(IndexError):
            made(tokens + 50)
