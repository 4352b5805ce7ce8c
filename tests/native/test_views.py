"""Views of a native program's memory against what torch makes of the same strides."""

from __future__ import annotations

from itertools import accumulate
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qfx.targets.native.views import BATCH, Border, Buffer, View, natural_strides, numel

SAMPLES = 101  # a prime that no other size holds: what torch cannot split or join is then the batch
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def fresh(sizes: tuple[int, ...], offset: int = 0) -> View:
    """A view of the whole of a new buffer, behind ``offset`` elements."""
    buffer = Buffer("arena", 0, "float", numel(sizes) + offset)
    return View(buffer, sizes, natural_strides(sizes, buffer.size), offset)


def tensor_of(view: View, samples: int = SAMPLES) -> Tensor:
    """What torch sees through the view, over a buffer that counts its elements."""
    memory = torch.arange(view.buffer.size * samples)
    sizes = [samples if size == BATCH else size for size in view.sizes]
    return memory.as_strided(sizes, view.strides, view.offset)


@st.composite
def views(draw: st.DrawFn) -> tuple[View, Tensor]:
    """A view after some permutations, narrowings and selections, and torch's tensor after the same."""
    view = fresh((BATCH, *draw(SIZES)), draw(st.integers(0, 3)))
    tensor = tensor_of(view)
    for move in draw(st.lists(st.sampled_from(("permute", "narrow", "select")), max_size=4)):
        dims = len(view.sizes)
        if move == "permute":
            order = tuple(draw(st.permutations(range(dims))))
            view, tensor = view.permute(order), tensor.permute(order)
            continue
        within = [d for d in range(dims) if view.sizes[d] != BATCH]
        if not within:
            continue
        dim = draw(st.sampled_from(within))
        size = view.sizes[dim]
        start = draw(st.integers(0, size - 1))
        if move == "select":
            view, tensor = view.select(dim, start), tensor.select(dim, start)
        else:
            step = draw(st.integers(1, 2))
            end = draw(st.integers(start + 1, size))
            view = view.narrow(dim, start, -(-(end - start) // step), step)
            tensor = tensor[(slice(None),) * dim + (slice(start, end, step),)]
    return view, tensor


@given(views())
def test_moves_are_those_of_torch(pair: tuple[View, Tensor]) -> None:
    view, tensor = pair
    assert torch.equal(tensor_of(view), tensor)
    assert numel(view.sizes) * SAMPLES == tensor.numel()


@given(views(), st.data())
def test_reshape_is_none_exactly_where_torch_needs_a_copy(pair: tuple[View, Tensor], data: st.DataObject) -> None:
    view, tensor = pair
    at = view.sizes.index(BATCH)
    parts = [data.draw(factors(prod(sizes))) for sizes in (view.sizes[:at], view.sizes[at + 1 :])]
    sizes = (*parts[0], BATCH, *parts[1])
    made = view.reshape(sizes)
    try:
        expected = tensor.view([SAMPLES if size == BATCH else size for size in sizes])
    except RuntimeError:
        assert made is None
        return
    assert made is not None
    assert made.sizes == sizes and torch.equal(tensor_of(made), expected)


@st.composite
def factors(draw: st.DrawFn, number: int) -> tuple[int, ...]:
    """Sizes whose product is ``number``."""
    found = []
    while number > 1:
        found.append(draw(st.sampled_from([d for d in range(2, number + 1) if number % d == 0])))
        number //= found[-1]
    for _ in range(draw(st.integers(0, 2))):
        found.insert(draw(st.integers(0, len(found))), 1)
    return tuple(found)


@given(SIZES, st.data())
def test_reshape_never_splits_or_joins_the_batch(sizes: list[int], data: st.DataObject) -> None:
    """A batch in another place among the elements is another tensor."""
    view = fresh((BATCH, *sizes))
    other = data.draw(factors(prod(sizes)))
    place = data.draw(st.integers(0, len(other)))
    made = view.reshape((*other[:place], BATCH, *other[place:]))
    assert (made is None) == (prod(other[:place]) > 1)


def test_sizes_of_zero_are_not_reshaped() -> None:
    assert fresh((BATCH, 0, 3)).reshape((BATCH, 3, 0)) is None


@given(views())
def test_contiguous_is_the_whole_of_a_buffer_in_order(pair: tuple[View, Tensor]) -> None:
    view, tensor = pair
    whole = numel(view.sizes) == view.buffer.size and tensor.is_contiguous()
    if view.contiguous:
        assert whole and torch.equal(tensor.flatten(), torch.arange(tensor.numel()))
    elif whole and view.offset == 0 and view.sizes[0] == BATCH and 1 not in view.sizes:
        raise AssertionError("declined though it is in order")


@given(views())
def test_batched(pair: tuple[View, Tensor]) -> None:
    view, _ = pair
    assert view.batched == (view.sizes.index(BATCH) == 0)


def test_channels_last() -> None:
    view = fresh((BATCH, 5, 6, 3))
    assert view.permute((0, 3, 1, 2)).channels_last
    assert not view.channels_last
    assert fresh((BATCH, 1, 6, 3)).channels_last, "one channel lies beside itself"
    assert not fresh((BATCH, 4, 4)).channels_last


@pytest.mark.parametrize(
    "move", [lambda v: v.narrow(2, 1, 2), lambda v: v.permute((0, 1, 3, 2)), lambda v: v.select(2, 0)]
)
def test_what_is_cut_out_of_an_image_has_no_border(move: object) -> None:
    """Around a part of an image lies the rest of it, and not the zeros that a padded window reads."""
    assert callable(move)
    sizes, border = (BATCH, 2, 4, 4), Border(1, 1, 1, 1)
    image = View(Buffer("arena", 0, "uint8_t", 72), sizes, (72, 1, 12, 2), 14, border)
    assert move(image).border == Border()


SIDES = st.tuples(*[st.integers(0, 3)] * 4)


@given(SIDES, SIDES)
def test_the_union_of_borders_holds_both(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    one, other = Border(*a), Border(*b)
    both = one | other
    assert both.holds(one) and both.holds(other)
    assert both.sides == tuple(map(max, a, b))
    assert one.holds(other) == all(x >= y for x, y in zip(a, b, strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_natural_strides_are_those_of_torch(sizes: list[int]) -> None:
    given_strides = natural_strides((BATCH, *sizes), prod(sizes))
    assert given_strides == (prod(sizes), *torch.empty(sizes).stride())
    ends = list(accumulate(reversed(sizes), lambda a, b: a * b, initial=1))
    assert list(reversed(given_strides)) == ends
