"""Which sizes of a graph's values are the batch."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from qfx.targets.native.not_native import NotNative
from qfx.targets.native.shapes import SEVERAL, rows_of_samples, sizes_of
from qfx.targets.native.views import BATCH

aten = torch.ops.aten


def graph_of(*calls: tuple[object, ...]) -> fx.GraphModule:
    """``x`` and ``y`` in, then calls whose arguments name earlier values by their numbers as strings."""
    graph = fx.Graph()
    values = {"x": graph.placeholder("x"), "y": graph.placeholder("y")}
    last = values["x"]
    for number, (target, *args) in enumerate(calls):
        given = fx.map_arg([_at(values, a) for a in args], lambda n: n)
        last = graph.call_function(target, tuple(given))  # type: ignore[arg-type]
        values[str(number)] = last
    graph.output(last)
    return fx.GraphModule(torch.nn.Module(), graph)


def _at(values: dict[str, fx.Node], arg: object) -> object:
    if isinstance(arg, list):
        return [_at(values, a) for a in arg]
    return values.get(arg, arg) if isinstance(arg, str) else arg


X, Y = torch.zeros(7, 4, 6), torch.zeros(7, 3, dtype=torch.int64)


def sizes(gm: fx.GraphModule, *inputs: torch.Tensor) -> dict[str, object]:
    return {node.name: size for node, size in sizes_of(gm, inputs).of.items()}


def test_the_batch_is_found_wherever_it_goes() -> None:
    gm = graph_of(
        (aten.permute.default, "x", [1, 0, 2]),
        (aten.view.default, "0", [4, -1, 2, 3]),
        (aten.sym_size.int, "x", 0),
        (aten.view.default, "x", ["2", 24]),
        (aten.unbind.int, "x", 1),
        (operator.getitem, "4", 1),
    )
    found = sizes(gm, X, Y)
    assert list(found.values())[:-1] == [
        (BATCH, 4, 6),
        (BATCH, 3),
        (4, BATCH, 6),
        (4, BATCH, 2, 3),
        BATCH,
        (BATCH, 24),
        ((BATCH, 6),) * 4,
        (BATCH, 6),
    ]


def test_sizes_of_the_model_that_are_small_numbers_are_not_the_batch() -> None:
    """2 and 3 samples are tried: sizes that are 2 and 3 are told from them."""
    gm = graph_of((aten.view.default, "x", [-1, 2, 3, 2]))
    found = sizes(gm, torch.zeros(2, 12), torch.zeros(2, 3))
    assert found["view_default"] == (BATCH, 2, 3, 2) and found["y"] == (BATCH, 3)


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 50])
def test_the_number_of_samples_does_not_matter(samples: int) -> None:
    gm = graph_of((aten.transpose.int, "x", 0, 1))
    assert sizes(gm, torch.zeros(samples, 5), torch.zeros(samples, 3))["transpose_int"] == (5, BATCH)


def test_rows_of_all_samples_in_one_dimension() -> None:
    gm = graph_of((aten.view.default, "x", [-1, 6]), (aten.sym_size.int, "0", 0), (aten.view.default, "0", [-1, 4, 6]))
    found = sizes_of(gm, (X, Y))
    rows, count, back, _ = list(gm.graph.nodes)[2:]
    assert found.joined == {rows: 0} and found.of[count] == SEVERAL
    assert found.of[rows] == found.of[back] == (BATCH, 4, 6)


def test_rows_of_all_samples_in_another_dimension() -> None:
    gm = graph_of(
        (aten.view.default, "x", [-1, 6]),
        (aten.view.default, "0", [-1, 2, 3]),
        (aten.permute.default, "1", [1, 0, 2]),
        (aten.select.int, "2", 0, 1),
    )
    found = sizes_of(gm, (X, Y))
    x, _, _, parts, turned, one, _ = gm.graph.nodes
    assert [found.of[n] for n in (parts, turned, one)] == [(BATCH, 4, 2, 3), (2, BATCH, 4, 3), (BATCH, 4, 3)]
    assert [found.joined.get(n) for n in (x, parts, turned, one)] == [None, 0, 1, 0]
    assert found.axes(x) == ((0,), (1,), (2,))
    assert found.axes(parts) == ((0, 1), (2,), (3,)) and found.axes(turned) == ((0,), (1, 2), (3,))


def test_all_nodes_that_mix_with_the_batch_are_named() -> None:
    gm = graph_of((aten.slice.Tensor, "x", 0, 1, 99), (aten.relu.default, "0"), (aten.relu.default, "x"))
    with pytest.raises(NotNative, match="slice") as caught:
        sizes_of(gm, (X, Y))
    assert [node.name for node in caught.value.nodes] == ["slice_tensor", "relu_default"]


def test_the_node_that_does_not_run_with_other_batches_is_named() -> None:
    gm = graph_of((aten.relu.default, "x"), (aten.view.default, "0", [7, 24]))
    with pytest.raises(NotNative, match="does not run with other batches") as caught:
        sizes_of(gm, (X, Y))
    assert [node.name for node in caught.value.nodes] == ["view_default"]


@pytest.mark.parametrize(
    ("found", "rows"),
    [
        (((2, 5), (3, 5), (1009, 5)), 1),
        (((8, 5), (12, 5), (4036, 5)), 4),
        (((5, 2), (5, 3), (5, 1009)), None),
        (((2, 2), (3, 3), (1009, 1009)), None),
        (((5, 6), (5, 6), (5, 6)), None),
        (((3, 6), (4, 6), (1010, 6)), None),
        (((), (), ()), None),
        ((2, 3, 1009), None),
        ((((2, 5),), ((3, 5),), ((1009, 5),)), None),
    ],
)
def test_rows_of_a_sample(found: tuple[object, ...], rows: int | None) -> None:
    assert rows_of_samples(found) == rows


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([(aten.slice.Tensor, "x", 0, 1, 9223372036854775807)], "depends on the batch by more than being it"),
        ([(aten.slice.Tensor, "x", 0, 0, 5)], "depends on the batch by more than being it"),
        (
            [(aten.sym_size.int, "x", 0), (operator.floordiv, "0", 2), (aten.slice.Tensor, "x", 1, 0, "1")],
            "depends on the batch by more than being it",
        ),
        ([(aten.view.default, "x", [7, 24])], "does not run with other batches"),
        ([(aten.unbind.int, "x", 0)], "one result for each sample"),
        ([(aten.mm.default, "y", "x")], "does not run with other batches"),
        ([(aten.select.int, "x", 1, 0), (aten.t.default, "0"), (aten.matmul.default, "0", "1")], "are the batch"),
    ],
)
def test_sizes_that_mix_with_the_batch(calls: list[tuple[object, ...]], reason: str) -> None:
    with pytest.raises(NotNative, match=reason):
        sizes(graph_of(*calls), X, Y)
