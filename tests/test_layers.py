"""The layers whose widths can be chosen, first and last ones, and who must choose alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx import api
from qfx.errors import QfxWarning
from qfx.layers import Layer, coupled, ends_of, layers_of, weight_of
from qfx.recipe import Recipe

X = torch.randn(4, 3, 6, 6)
ROWS = torch.randn(4, 6)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module.eval()


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def prepared(model: nn.Module, example: Any, recipe: str | Recipe = "int8") -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return api.graphs(api.prepare(model, example, recipe=recipe, target="reference"))[""]


def groups(model: nn.Module, example: Any, recipe: str | Recipe = "int8") -> list[set[str]]:
    gm = prepared(model, example, recipe)
    layers = layers_of(gm)
    found = coupled(gm, layers)
    assert sorted(i for group in found for i in group) == list(range(len(layers)))
    assert list(found) == sorted(found)
    return [{layers[i].key for i in group} for group in found]


def by_key(model: nn.Module, example: Any, recipe: str | Recipe = "int8") -> dict[str, Layer]:
    layers = layers_of(prepared(model, example, recipe))
    found = {layer.key: layer for layer in layers}
    assert len(found) == len(layers)  # scores are kept by key
    return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = conv(3, 4), conv(4, 4), conv(4, 4, 1), nn.Linear(4, 5)
        self.bn = nn.BatchNorm2d(4)
        self.bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


# --- layers -----------------------------------------------------------------------------------------------------------


def test_what_is_known_of_each() -> None:
    layers = by_key(Residual().eval(), X)
    assert list(layers) == ["stem:conv2d", "left:conv2d", "right:conv2d", "head:linear"]
    assert [layer.shape for layer in layers.values()] == [(4, 3, 3, 3), (4, 4, 3, 3), (4, 4, 1, 1), (5, 4)]
    assert [layer.macs for layer in layers.values()] == [4 * 36 * k for k in (4 * 27, 4 * 36, 4 * 4)] + [4 * 20]
    assert [layer.end for layer in layers.values()] == [True, False, False, True]
    assert all(layer.observed and layer.weight == 1 and layer.data == (0,) for layer in layers.values())


def test_the_weight_is_the_one_that_is_read_batch_norm_folded_in() -> None:
    model = Residual().eval()
    gm = prepared(model, X)
    with torch.no_grad():
        factor = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
        expected = model.stem.weight * factor[:, None, None, None]
    torch.testing.assert_close(weight_of(gm, layers_of(gm)[0]), expected)


def test_a_module_that_is_used_twice_is_one_layer() -> None:
    layers = by_key(net(lambda self, x: self.b(self.a(self.a(x)).relu()), a=nn.Linear(6, 6), b=nn.Linear(6, 2)), ROWS)
    assert [len(layer.calls) for layer in layers.values()] == [2, 1]
    assert layers["a:linear"].macs == 2 * 4 * 36


def test_a_product_of_activations_has_no_weight() -> None:
    model = net(lambda self, x: self.b(torch.matmul(self.a(x), self.a(x).t())), a=nn.Linear(6, 6), b=nn.Linear(4, 2))
    product = by_key(model, ROWS)["matmul"]
    assert (product.weight, product.shape, product.data, product.end) == (None, (), (0, 1), False)
    assert product.qconfig.weight is None and product.observed


def test_layers_that_stay_float_are_none() -> None:
    model = Residual().eval()
    recipe = Recipe.int8().skip("left")
    assert "left:conv2d" not in by_key(model, X, recipe)
    dynamic = by_key(model, X, "int8_dynamic")
    assert list(dynamic) == ["head:linear"] and not dynamic["head:linear"].observed
    assert layers_of(prepared(net(lambda self, x: x.softmax(-1)), ROWS)) == ()


def test_several_weights_at_one_place_are_several_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first).relu(), self.second)

    model = net(forward, first=nn.Parameter(torch.randn(8, 6)), second=nn.Parameter(torch.randn(3, 8)))
    layers = by_key(model, ROWS)
    assert [layer.shape for layer in layers.values()] == [(8, 6), (3, 8)]
    assert list(layers) == ["linear:first", "linear:second"]
    assert groups(model, ROWS) == [{"linear:first", "linear:second"}]  # no rule of a recipe tells them apart


def test_multi_head_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layers = by_key(model, torch.randn(4, 3, 8))
    assert [layer.shape for layer in layers.values()][:2] == [(24, 8), (8, 8)]
    assert [layer.path for layer in layers.values()] == ["self_attn", "self_attn", "linear1", "linear2"]


# --- first and last ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "ends"),
    [
        (lambda self, x: self.c(self.b(self.a(x))), {"a", "c"}),
        (lambda self, x: (self.b(self.a(x)), self.c(self.a(x))), {"a", "b", "c"}),  # two heads
        (lambda self, x: self.c(self.a(x) + self.b(x)), {"a", "b", "c"}),  # two stems
        (lambda self, x: self.c(x).softmax(-1), {"c"}),  # first and last
        (lambda self, x: self.c(self.b(self.a(x) + x).relu() + x) * 2.0, {"a", "c"}),
    ],
)
def test_ends_are_found_in_the_graph(forward: Callable[..., Any], ends: set[str]) -> None:
    gm = prepared(net(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6)), ROWS)
    assert {layer.path for layer in layers_of(gm) if layer.end} == ends
    assert {str(n.name) for n in ends_of(gm)} == {c.name for x in layers_of(gm) if x.end for c in x.calls}


# --- who chooses alike ------------------------------------------------------------------------------------------------


def test_layers_that_feed_one_addition() -> None:
    assert groups(Residual().eval(), X) == [{"stem:conv2d"}, {"left:conv2d", "right:conv2d"}, {"head:linear"}]


@pytest.mark.parametrize(
    ("forward", "together"),
    [
        (lambda self, x: self.c(self.a(x).relu() + F.max_pool2d(self.b(x), 1)), {"a:conv2d", "b:conv2d"}),
        (lambda self, x: self.c(self.a(x) + x), set()),  # only one side is a layer's
        (lambda self, x: self.c(self.a(x) * self.b(self.a(x))), set()),  # a product has a kernel of its own
    ],
)
def test_what_meets_in_an_addition(forward: Callable[..., Any], together: set[str]) -> None:
    found = groups(net(forward, a=conv(3, 3), b=conv(3, 3, 1), c=conv(3, 3)), X)
    inside = {key for group in found for key in group if len(group) > 1}
    assert inside >= together and (together or "c:conv2d" not in inside)


def test_layers_that_read_one_value() -> None:
    model = net(
        lambda self, x: self.o(self.q(x.relu()) * self.k(x.relu()).sigmoid()),
        q=nn.Linear(6, 6),
        k=nn.Linear(6, 6),
        o=nn.Linear(6, 2),
    )
    # each relu is a value of its own; one value read by both has one scale
    shared = net(lambda self, x: self.o(self.q(x) * self.k(x).sigmoid()), q=model.q, k=model.k, o=model.o)
    assert groups(shared, ROWS) == [{"q:linear", "k:linear"}, {"o:linear"}]


def test_layers_that_read_one_share_group() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        both = torch.cat([y, z], 1)
        return self.d(y) + self.e(both).mean()

    model = net(forward, a=conv(3, 4), b=conv(3, 4), d=conv(4, 2), e=conv(8, 2))
    found = groups(model, X)
    assert {"d:conv2d", "e:conv2d"} in found and {"a:conv2d", "b:conv2d"} in found


def test_tied_weights() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    model = net(lambda self, x: self.c(self.b(self.a(x).relu()).relu()), a=a, b=b, c=nn.Linear(6, 6))
    assert groups(model, ROWS) == [{"a:linear", "b:linear"}, {"c:linear"}]


def test_independent_layers_choose_for_themselves() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert groups(model, ROWS) == [{"0:linear"}, {"2:linear"}, {"4:linear"}]
