"""What other engines reject: every rule of the table, with the layer, the spec and the way out in its text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.consumers import ACTIVATION, BIAS, CONSUMERS, WEIGHT, Use, check, consumer_named, uses
from qfx.errors import ConfigError, UnsupportedError
from qfx.portable import portable
from qfx.recipe import Recipe

USE = Use("layer", WEIGHT, bits=8, signed=True, symmetric=True, axis=0, group_size=None)
DATA = replace(USE, role=ACTIVATION, axis=None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv(x).relu().flatten(1))
        return y


@cache
def quantized(recipe: str | Recipe) -> Any:
    torch.manual_seed(0)
    example = torch.randn(4, 3, 6, 6)
    made = qfx.quantize(Net().eval(), example, recipe=recipe, target="reference", verbose=False)
    return portable(made)


@pytest.mark.parametrize(
    ("consumer", "use", "why"),
    [
        ("tensorrt", replace(DATA, group_size=-1, axis=-1, dynamic=True), "constants when the engine is built"),
        ("tensorrt", replace(DATA, signed=False), "no unsigned integers"),
        ("tensorrt", replace(DATA, symmetric=False), "zero points are zero"),
        ("tensorrt", replace(USE, symmetric=False), "zero points are zero"),
        ("tensorrt", replace(USE, group_size=128), "for 4-bit weights only"),
        ("tensorrt", replace(USE, group_size=32, bits=4), "groups have 64 or 128 weights"),
        ("tensorrt", replace(USE, group_size=64, bits=4, ragged=True), "divide the weight evenly"),
        ("openvino", replace(USE, group_size=64, bits=4, ragged=True), "divide the weight evenly"),
        ("xnnpack", replace(USE, data_is_float=True), "integer weights and float data"),
        ("xnnpack", replace(DATA, dynamic=True), "dynamic activations"),
        ("xnnpack", replace(DATA, signed=False), "activations are int8"),
        ("xnnpack", replace(USE, symmetric=False), "int8 and symmetric"),
        ("xnnpack", replace(USE, group_size=32), "per tensor or per channel"),
    ],
)
def test_every_refusal(consumer: str, use: Use, why: str) -> None:
    first = next(r for r in CONSUMERS[consumer].refusals if r.refuses(use))
    assert why in first.why


@pytest.mark.parametrize("name", CONSUMERS)
def test_each_takes_its_own_recipe(name: str) -> None:
    check(quantized(CONSUMERS[name].recipe), CONSUMERS[name])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic", "w4a16"])
def test_these_take_all(name: str, recipe: str) -> None:
    check(quantized(recipe), CONSUMERS[name])


@pytest.mark.parametrize(
    ("consumer", "recipe", "layer", "spec"),
    [
        ("tensorrt", "int8", "conv", "uint8 affine per tensor"),
        ("tensorrt", "xnnpack", "conv", "int8 affine per tensor"),
        ("tensorrt", "int8_dynamic", "fc", "int8 symmetric per token dynamic"),
        ("tensorrt", Recipe.w4a16(32), "fc", "int4 symmetric per group of 32"),
        ("xnnpack", "int8", "conv", "uint8 affine per tensor"),
        ("xnnpack", "w8a16", "fc", "int8 symmetric per axis 0"),
    ],
)
def test_the_text_names_layer_spec_and_way_out(consumer: str, recipe: str | Recipe, layer: str, spec: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{consumer} rejects this .*{spec}") as caught:
        check(quantized(recipe), CONSUMERS[consumer])
    assert caught.value.where == layer
    assert f"recipe='{CONSUMERS[consumer].recipe}'" in caught.value.hint


def test_a_skipped_layer_is_not_asked_about() -> None:
    check(quantized(Recipe.int8().skip("conv").skip("fc")), CONSUMERS["tensorrt"])


def test_uses_of_a_graph() -> None:
    found = list(uses(quantized(Recipe.int8().set("fc", weight=4))))
    assert [(u.layer, u.role, u.bits) for u in found if u.role != ACTIVATION] == [
        ("conv", WEIGHT, 8),
        ("conv", BIAS, 32),
        ("fc", WEIGHT, 4),
    ]
    assert {(u.layer, str(u)) for u in found if u.role == ACTIVATION} >= {("conv", "uint8 affine per tensor")}
    assert not any(u.dynamic or u.ragged or u.data_is_float for u in found)


def test_one_group_a_row_is_said_per_axis() -> None:
    (weight,) = [u for u in uses(quantized(Recipe.w4a16(128))) if u.role == WEIGHT]
    assert (weight.axis, weight.group_size, weight.data_is_float) == (0, None, True)


def test_an_unknown_consumer() -> None:
    with pytest.raises(ConfigError, match="no consumer 'tensort'; did you mean 'tensorrt'") as caught:
        consumer_named("tensort")
    assert all(name in caught.value.hint for name in CONSUMERS)
    assert consumer_named(None).refusals == ()
