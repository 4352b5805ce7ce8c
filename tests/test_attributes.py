"""Tensors and modules by dotted path."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qfx.attributes import (
    drop_unused,
    exists,
    free_path,
    get_tensor,
    nbytes,
    set_buffer,
    set_module,
    tensors,
)


def model() -> nn.Module:
    root = nn.Module()
    root.block = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    return root


def test_get() -> None:
    root = model()
    root.plain = torch.ones(2)
    assert get_tensor(root, "block.0.weight") is root.block[0].weight
    assert get_tensor(root, "plain") is root.plain
    for path in ("block", "block.0"):
        with pytest.raises(AssertionError, match="is no tensor"):
            get_tensor(root, path)
    with pytest.raises(AttributeError):
        get_tensor(root, "block.0.scale")


def test_set_replaces_whatever_table_it_is_in() -> None:
    root = model()
    set_buffer(root, "block.0.weight", torch.ones(3, 2, requires_grad=True))
    assert dict(root.named_buffers())["block.0.weight"].requires_grad is False
    assert "block.0.weight" not in dict(root.named_parameters())
    set_buffer(root, "block.0.weight", torch.zeros(3, 2))
    assert not dict(root.named_buffers())["block.0.weight"].any()


def test_set_makes_containers() -> None:
    root = model()
    set_buffer(root, "a.b.scale", torch.ones(()))
    set_module(root, "a.c", nn.ReLU())
    assert float(root.a.b.scale) == 1.0 and isinstance(root.a.c, nn.ReLU)
    set_module(root, "a.c", nn.Sigmoid())
    assert isinstance(root.a.c, nn.Sigmoid)


def test_free_path() -> None:
    root = model()
    assert free_path(root, "scale") == "scale"
    set_buffer(root, "scale", torch.ones(()))
    assert free_path(root, "scale") == "scale_1"
    set_buffer(root, "scale_1", torch.ones(()))
    assert free_path(root, "scale") == "scale_2"
    assert exists(root, "block.0.weight") and not exists(root, "block.5.weight")


def test_drop_unused() -> None:
    root = model()
    root.spare = nn.Sequential(nn.Linear(2, 2))
    root.leaf = nn.Linear(3, 3)
    g = fx.Graph()
    x = g.placeholder("x")
    weight = g.get_attr("block.0.weight")
    g.output(g.call_module("leaf", (g.call_function(torch.ops.aten.linear.default, (x, weight)),)))
    gm = fx.GraphModule(root, g)
    gm.block = root.block
    gm.spare = root.spare
    count = drop_unused(gm)
    assert sorted(gm.state_dict()) == ["block.0.weight", "leaf.bias", "leaf.weight"]
    assert count == 6  # a bias, a ReLU, two tensors of the spare layer, and its two modules
    assert drop_unused(gm) == 0


def test_tensors_and_bytes() -> None:
    root = nn.Module()
    root.a, root.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    root.b.weight = root.a.weight
    root.register_buffer("view", root.a.weight.detach()[:1])
    assert [name for name, _ in tensors(root)] == ["a.weight", "b.weight", "view"]
    assert nbytes(t for _, t in tensors(root)) == 16
