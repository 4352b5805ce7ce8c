"""Degradation: the largest children that can be captured, in a copy of the user's own module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.capture import is_captured
from qfx.errors import CaptureError
from qfx.meta import graph_info
from qfx.origin import layer_path
from qfx.regions import capture_regions


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        return x + self.mlp(self.norm(x)), {"mask": mask}


class Branch(nn.Module):
    """Decides by values; its two layers do not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:  # stops the branch
            y = y * 2
        return self.b(y)


class Shrinks(nn.Module):
    """Called with another constant every time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor, by: int) -> Tensor:
        return self.lin(x / by)


class InPlace(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.mul_(2))


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.branches = nn.ModuleList([Branch(width), Branch(width)])
        self.shrinks = Shrinks(width)
        self.in_place = InPlace(width)
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, 20)
        self.label = "net"
        self.calls = 0

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        self.calls += 1
        x = self.emb(ids)
        for block in self.blocks:
            x, _ = block(x, mask=mask)
        for branch in self.branches:
            x = branch(x)
        x = self.shrinks(self.shrinks(x, 1), 2)
        x = self.in_place(x + 0)
        if float(x.detach().mean()) > 100:  # stops the whole
            x = x - 1
        return {"logits": self.head(x), "vocabulary": self.head.bias.shape[0]}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.lin(x) if mask is None else self.lin(x) * mask.unsqueeze(-1)


class DropsMask(nn.Module):
    """Passes None on where the mask hides nothing, as some of transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 4)
        self.layer = Attends()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.emb(ids), None if mask.all() else mask)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.fixture(scope="module")
def net() -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, capture_regions(model, (torch.randint(0, 20, (1, 6)),))


def test_the_largest_children_that_export_become_graphs(net: tuple[Net, Any]) -> None:
    model, regions = net
    assert list(regions.graphs) == [
        "blocks.0",
        "blocks.1",
        "branches.0.a",
        "branches.0.b",
        "branches.1.a",
        "branches.1.b",
        "shrinks.lin",
        "in_place.lin",
    ]
    assert isinstance(regions.model, Net) and regions.model.label == "net"
    assert all(regions.model.get_submodule(path) is graph for path, graph in regions.graphs.items())
    assert all(graph_info(graph).stage == "CAPTURED" for graph in regions.graphs.values())
    assert is_captured(regions.model) and not is_captured(model)


def test_what_stays_python_code_says_why(net: tuple[Net, Any]) -> None:
    skipped = net[1].skipped
    assert skipped["shrinks"] == "it is called with different structures or constants"
    assert skipped["in_place"] == "it writes to its inputs"
    assert "no attribute 'bias'" in skipped["head"]
    assert "Branch cannot be exported" in skipped["branches.0"]
    assert skipped["branches.1"] == "another Branch was refused"
    assert "branches" not in skipped and "emb" not in skipped


def test_the_source_line_that_stopped_the_whole_is_told(net: tuple[Net, Any]) -> None:
    place, _, reason = net[1].stopped_by.partition(": ")
    file, _, line = place.rpartition(":")
    with open(file) as source:
        assert "stops the branch" in source.read().splitlines()[int(line) - 1]
    assert reason.startswith("Net cannot be exported: ")


@pytest.mark.parametrize(("batch", "length"), [(1, 6), (3, 6), (8, 3), (2, 9)])
def test_the_copy_computes_what_the_model_does(net: tuple[Net, Any], batch: int, length: int) -> None:
    model, regions = net
    ids = torch.randint(0, 20, (batch, length))
    for copied in (regions.model, copy.deepcopy(regions.model), pickle.loads(pickle.dumps(regions.model))):
        got = copied(ids)
        assert torch.allclose(got["logits"], model(ids)["logits"], atol=1e-6) and got["vocabulary"] == 20


def test_nodes_tell_their_place_in_the_whole_model(net: tuple[Net, Any]) -> None:
    graph = net[1].graphs["blocks.1"]
    linear = [n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [layer_path(n) for n in linear] == ["blocks.1.mlp.0", "blocks.1.mlp.2"]
    assert linear[0].args[1].target == "mlp.0.weight"


def test_the_model_itself_is_untouched(net: tuple[Net, Any]) -> None:
    model, regions = net
    fresh = Net().eval()
    regions_of_fresh = capture_regions(fresh, (torch.randint(0, 20, (1, 6)),))
    assert fresh.calls == 0 and regions_of_fresh.model.calls == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fresh.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in regions_of_fresh.model.modules())
    assert (
        regions.graphs["blocks.0"].mlp.get_submodule("0").weight.data_ptr() == model.blocks[0].mlp[0].weight.data_ptr()
    )


@pytest.mark.parametrize("hidden", [False, True])
def test_regions_hold_for_masks_that_hide_and_that_do_not(hidden: bool) -> None:
    model = DropsMask().eval()
    ids, mask = torch.randint(0, 20, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, 0] = int(not hidden)
    regions = capture_regions(model, (ids, mask))
    assert list(regions.graphs) == ["layer.lin"]
    for other in (torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 0, 1], [1, 1, 0]])):
        ids = torch.randint(0, 20, tuple(other.shape))
        assert torch.equal(regions.model(ids, other), model(ids, other))


def test_a_region_that_is_called_otherwise_tells_its_place(net: tuple[Net, Any]) -> None:
    with pytest.raises(CaptureError, match=r"Block: argument mask should be None.*\[layer blocks\.0\]"):
        net[1].model(torch.randint(0, 20, (1, 6)), torch.ones(1, 6))


def test_the_number_of_exports_is_bounded() -> None:
    regions = capture_regions(Net().eval(), (torch.randint(0, 20, (1, 6)),), tries=2)
    assert list(regions.graphs) == ["blocks.0", "blocks.1"]
    assert regions.skipped["branches.0.a"] == "the limit of exports is reached"


def test_a_model_that_can_be_captured_is_one_region() -> None:
    regions = capture_regions(Whole().eval(), torch.randn(1, 3))
    assert list(regions.graphs) == [""] and regions.graphs[""] is regions.model and not regions.stopped_by


class Hopeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch(3)
        self.inner.a = nn.Identity()
        self.inner.b = nn.Identity()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.weight


def test_a_model_of_which_nothing_can_be_captured_is_an_error_with_its_line() -> None:
    with pytest.raises(CaptureError, match="nothing of Hopeless can be captured") as caught:
        capture_regions(Hopeless().eval(), torch.randn(2, 3))
    assert "test_regions.py" in caught.value.source


def test_errors_of_the_example_are_not_hidden_by_degradation() -> None:
    with pytest.raises(CaptureError, match="argument 'ids' is missing"):
        capture_regions(Net().eval(), ())


class FixedLoop(nn.Module):
    """Runs at the example's batch only, and decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x.reshape(1, 6))
        return y if y.sum() > 0 else -y


def test_a_model_that_knows_one_batch_has_regions_of_that_batch() -> None:
    model = FixedLoop().eval()
    regions = capture_regions(model, torch.randn(1, 6))
    x = torch.randn(1, 6)
    assert list(regions.graphs) == ["lin"] and torch.equal(regions.model(x), model(x))
