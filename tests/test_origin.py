"""Where nodes and errors come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.capture import capture
from qfx.origin import clean_path, error_line, layer_path, module_classes, source_line


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)  # the call of the layer


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Inner(), Inner())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.layers[0](x) + 1  # a second call


def told(place: str) -> str:
    file, _, line = place.rpartition(":")
    with open(file) as source:
        return source.read().splitlines()[int(line) - 1]


def test_nodes_tell_layer_class_and_line() -> None:
    graph = capture(Outer().eval(), torch.randn(2, 3))
    linear = [n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [layer_path(n) for n in linear] == ["layers.0.lin", "layers.1.lin", "layers.0.lin"]
    assert module_classes(linear[0]) == ("Outer", "Sequential", "Inner", "Linear")
    assert all("the call of the layer" in told(source_line(n)) for n in linear)
    add = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    assert layer_path(add) == "" and "a second call" in told(source_line(add))


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("L['self'].layer1.0", "layer1.0"),
        ("L__self__", ""),
        ("L__self__.head", "head"),
        ("layer@1", "layer"),
        ("a@2.b", "a.b"),
        ("a.b", "a.b"),
    ],
)
def test_paths_are_the_users(path: str, clean: str) -> None:
    assert clean_path(path) == clean


def test_a_node_of_nowhere_has_no_origin() -> None:
    node = fx.Graph().placeholder("x")
    assert (layer_path(node), source_line(node), module_classes(node)) == ("", "", ())


def test_an_error_tells_the_line_behind_the_frames_of_torch() -> None:
    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.ones(4, 4))  # fails

    try:
        try:
            nn.Sequential(nn.Identity())(torch.ones(2))
            forward(torch.ones(2, 3))
        except RuntimeError as error:
            raise ValueError("wrapped") from error
    except ValueError as wrapped:
        assert error_line(wrapped)
        assert "fails" in told(error_line(wrapped.__cause__ or wrapped))
