"""Who shares one scale."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qfx.meta import info
from qfx.passes import Annotate, Canonicalize, FuseEpilogues, ShareScales
from qfx.passes.share_scales import share_graph
from qfx.recipe import Recipe
from qfx.targets import Reference
from qfx.testing import run_passes

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def shared(model: nn.Module, recipe: Recipe | None = None) -> fx.GraphModule:
    annotate = Annotate(recipe or Recipe.int8(), Reference())
    return run_passes(model, X, Canonicalize(), FuseEpilogues(), annotate, ShareScales())


def groups(gm: fx.GraphModule) -> dict[str, str]:
    return {n.name: info(n).group for n in gm.graph.nodes if info(n).group}


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (
            lambda self, x: self.b(F.max_pool2d(self.a(x), 2)),
            {"x": "x", "conv2d": "conv2d", "max_pool2d": "conv2d"},
        ),
        (
            lambda self, x: self.c(torch.cat([self.a(x), self.b(x)], 1)),
            {"x": "x", "conv2d": "conv2d", "conv2d_1": "conv2d", "cat": "conv2d"},
        ),
        (
            lambda self, x: self.b(torch.cat(self.a(x).split(2, 1)[::-1], 1)),
            {name: "conv2d" for name in ("conv2d", "split", "getitem", "getitem_1", "cat")} | {"x": "x"},
        ),
        (
            lambda self, x: self.b(torch.stack(self.a(x).unbind(1), 1)),
            {f"getitem{i}": "conv2d" for i in ("", "_1", "_2", "_3")}
            | {"x": "x", "conv2d": "conv2d", "unbind": "conv2d", "stack": "conv2d"},
        ),
        (
            lambda self, x: self.b(F.avg_pool2d(self.a(x), 2)),  # a scale of its own
            {"x": "x", "conv2d": "conv2d", "avg_pool2d": "avg_pool2d"},
        ),
        (
            lambda self, x: self.a(x).softmax(1),
            {"x": "x"},
        ),
    ],
)
def test_groups(net, forward: Any, expected: dict[str, str]) -> None:
    gm = shared(net(forward, a=conv(), b=conv(), c=conv(8)))
    assert groups(gm) == expected


def test_dynamic_and_weight_only_specs_share_nothing(net) -> None:
    model = net(lambda self, x: self.fc(x), fc=nn.Linear(6, 6))
    assert groups(shared(model, Recipe.int8_dynamic())) == groups(shared(model, Recipe.w8a16())) == {}


def test_the_graph_view(net) -> None:
    gm = shared(net(lambda self, x: self.b(F.max_pool2d(self.a(x), 2).flip(3)), a=conv(), b=conv()))
    components = [{n.name for n in component} for component in nx.connected_components(share_graph(gm))]
    assert sorted(components, key=len) == [{"x"}, {"conv2d", "max_pool2d", "flip"}]
