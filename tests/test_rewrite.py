"""Edits of graphs that passes share."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import fx, nn

from qfx.capture import capture
from qfx.meta import info, update, value
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, propagate, replace_all

aten = torch.ops.aten


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


@pytest.fixture
def gm() -> fx.GraphModule:
    graph = capture(Layer().eval(), torch.randn(2, 3))
    for n in graph.graph.nodes:
        update(n, origin="fc" if n.name == "linear" else "")
    return graph


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_inserted_calls_have_values_and_an_origin(gm: fx.GraphModule) -> None:
    linear = node(gm, "linear")
    with gm.graph.inserting_after(linear):
        new = insert_call(gm, aten.sum.dim_IntList, linear, [1], like=linear, name="total")
    assert new.name == "total" and value(new).shape == value(linear).shape[:1] and info(new).origin == "fc"


def test_inserted_buffers_have_values(gm: fx.GraphModule) -> None:
    relu = node(gm, "relu")
    with gm.graph.inserting_before(relu):
        scale = insert_buffer(gm, "fc.scale", torch.ones(4), like=relu)
        new = insert_call(gm, aten.mul.Tensor, node(gm, "linear"), scale, like=relu)
    assert type(value(scale)).__name__ == "FakeTensor" and value(new).shape == value(relu).shape
    assert "fc.scale" in gm.state_dict()


def test_propagate(gm: fx.GraphModule) -> None:
    linear = node(gm, "linear")
    assert propagate(aten.add.Tensor, (linear, linear), {"alpha": 2}).dtype == torch.float32
    del linear.meta["val"]
    assert propagate(aten.relu.default, (linear,)) is None


def test_equal_examples_are_computed_once(gm: fx.GraphModule) -> None:
    linear, relu = node(gm, "linear"), node(gm, "relu")
    first = propagate(aten.sin.default, (linear,))
    assert propagate(aten.sin.default, (relu,)) is first
    for target, args, kwargs in (
        (aten.cos.default, (linear,), {}),
        (aten.mul.Tensor, (linear, 2.0), {}),
        (aten.mul.Tensor, (linear, 3.0), {}),
        (aten.sin.default, (node(gm, "x"),), {}),
    ):
        assert propagate(target, args, kwargs) is not first
    assert propagate(aten.add.Tensor, (linear, linear), {"alpha": 2}).shape == value(linear).shape
    assert propagate(aten.sum.dim_IntList, (linear, [0])).shape == (4,)
    assert propagate(aten.sum.dim_IntList, (linear, [1])).shape == value(linear).shape[:1]


def test_types_and_strides_tell_examples_apart(gm: fx.GraphModule) -> None:
    linear = node(gm, "linear")
    with gm.graph.inserting_after(linear):
        half = insert_call(gm, aten.to.dtype, linear, torch.float16, like=linear)
        other = insert_call(gm, aten.clone.default, linear, like=linear)
    other.meta["val"] = value(linear).t().contiguous().t()
    first = propagate(aten.sin.default, (linear,))
    assert propagate(aten.sin.default, (half,)).dtype == torch.float16
    assert propagate(aten.sin.default, (other,)).stride() != first.stride()


def test_views_and_writes_have_examples_of_their_own(gm: fx.GraphModule) -> None:
    """What aliases its input, or whose size data decide, is not what it was for another node."""
    linear = node(gm, "linear")
    views = [propagate(aten.t.default, (linear,)) for _ in range(2)]
    assert views[0] is not views[1]
    found = [propagate(aten.nonzero.default, (linear,)) for _ in range(2)]
    assert found[0] is not found[1]


def test_examples_go_with_their_nodes(gm: fx.GraphModule) -> None:
    linear = node(gm, "linear")
    held = weakref.ref(propagate(aten.sin.default, (linear,)))
    gc.collect()
    assert held() is None


def test_buffers_of_one_size_share_an_example(gm: fx.GraphModule) -> None:
    relu = node(gm, "relu")
    with gm.graph.inserting_before(relu):
        a, b, c, d = (
            insert_buffer(gm, name, tensor, like=relu)
            for name, tensor in (
                ("a", torch.ones(4)),
                ("b", torch.zeros(4)),
                ("c", torch.ones(4, dtype=torch.int32)),
                ("d", torch.ones(1, 4)),
            )
        )
    assert value(a) is value(b)
    assert value(c).dtype == torch.int32 and value(d).shape == (1, 4) and gm.b.sum() == 0


def test_evaluate_constants(gm: fx.GraphModule) -> None:
    weight = node(gm, "fc_weight")
    with gm.graph.inserting_after(weight):
        turned = gm.graph.call_function(aten.t.default, (weight,))
    with gm.graph.inserting_after(turned):
        clamped = gm.graph.call_function(aten.clamp.default, (turned,), {"max": 0.0})
    result = evaluate(gm, clamped)
    assert torch.equal(result, gm.fc.weight.t().clamp(max=0.0)) and not result.requires_grad


def test_erase_dead_follows_inputs_and_spares_readers(gm: fx.GraphModule) -> None:
    linear, relu = node(gm, "linear"), node(gm, "relu")
    erase_dead(gm, relu)
    assert not relu._erased
    relu.replace_all_uses_with(node(gm, "x"))
    erase_dead(gm, relu)
    assert relu._erased and linear._erased and [n.name for n in gm.graph.nodes] == ["x", "output"]


def test_erase_dead_spares_writes(gm: fx.GraphModule) -> None:
    linear = node(gm, "linear")
    with gm.graph.inserting_after(linear):
        write = gm.graph.call_function(aten.add_.Tensor, (linear, 1.0))
    with gm.graph.inserting_after(write):
        reader = gm.graph.call_function(aten.sin.default, (write,))
    erase_dead(gm, reader)
    assert reader._erased and not write._erased


def test_replace_all_spares_the_new_node(gm: fx.GraphModule) -> None:
    linear, relu = node(gm, "linear"), node(gm, "relu")
    with gm.graph.inserting_after(linear):
        new = gm.graph.call_function(aten.sin.default, (linear,))
    replace_all(linear, new)
    assert new.args == (linear,) and relu.args == (new,)
