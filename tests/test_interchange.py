"""A graph as others take it: names, sizes, and examples that are found again where capture's are lost."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qfx
from qfx.errors import UnsupportedError
from qfx.interchange import (
    SIZE,
    example_tensors,
    export_called,
    export_flat,
    free_dimensions,
    input_names,
    output_names,
    own_copy,
)
from qfx.meta import value
from qfx.portable import portable
from qfx.structure import flatten


@dataclass
class Result:
    scores: Tensor
    rest: tuple[Tensor, Tensor]


class Named(nn.Module):
    """Results that bear an input's name, none, or a place in a tuple; a second input of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor], mask: Tensor) -> Any:
        y = self.fc(batch["x"]) * mask
        return {"mask": y, "result": Result(y + 1, (y * 2, y * 3)), "none": None}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).relu()
        return y


def named() -> nn.Module:
    example = ({"x": torch.randn(2, 5, 4)}, torch.ones(2, 5, 1, dtype=torch.int64))
    return qfx.quantize(Named().eval(), example, target="reference", verbose=False)


def plain(**options: Any) -> nn.Module:
    return qfx.quantize(Plain().eval(), torch.randn(4, 3, 8, 8), target="reference", verbose=False, **options)


def test_names_are_the_users() -> None:
    gm = own_copy(named())
    assert input_names(gm) == ("batch_x", "mask")
    assert output_names(gm) == ("mask_output", "result_scores", "result_rest_0", "result_rest_1")
    assert output_names(own_copy(plain())) == ("output",)


def test_sizes_are_free_where_they_are_in_the_graph() -> None:
    gm = own_copy(named())
    assert [set(free) for free in free_dimensions(gm)] == [{0}, {0}]
    assert [set(free) for free in free_dimensions(own_copy(plain()))] == [{0}]


@pytest.mark.parametrize("make", [named, plain])
def test_pickled_models_have_lost_their_examples(make: Any) -> None:
    model = make()
    gm = portable(pickle.loads(pickle.dumps(model)))
    assert all(value(n) is None for n in gm.graph.nodes if n.op == "placeholder")
    invented, known = example_tensors(gm), example_tensors(portable(model))
    assert [(t.dtype, t.ndim) for t in invented] == [(t.dtype, t.ndim) for t in known]
    gm = own_copy(gm)
    assert all(value(n) is not None for n in gm.graph.nodes if n.op == "placeholder")


def test_free_sizes_that_were_lost_are_invented() -> None:
    free = Dim.AUTO
    model = plain(dynamic_shapes={"x": {0: free, 2: free, 3: free}})
    (example,) = example_tensors(portable(pickle.loads(pickle.dumps(model))))
    assert example.shape == (2, 3, SIZE, SIZE)


def test_the_copy_is_ones_own() -> None:
    model = plain()
    before = str(portable(model).graph)
    gm = own_copy(model)
    gm.graph.erase_node(next(n for n in reversed(gm.graph.nodes) if n.op == "output"))
    assert str(portable(model).graph) == before


def test_a_flat_program_computes_the_same() -> None:
    model = named()
    x, mask = torch.randn(3, 5, 4), torch.ones(3, 5, 1, dtype=torch.int64)
    got = export_flat(own_copy(model)).module()(x, mask)
    want = flatten(portable(model)({"x": x}, mask))[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_called_program_needs_results_that_torch_knows() -> None:
    with pytest.raises(UnsupportedError, match="register a pytree"):
        export_called(own_copy(named()))


def test_what_torch_cannot_export_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no words for that")

    gm = own_copy(plain())
    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot take .*RuntimeError: no words for that"):
        export_flat(gm)
