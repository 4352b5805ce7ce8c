"""W8A8 with one scale a weight, for machines that know no scales by channel."""

from __future__ import annotations

from dataclasses import replace

from qfx import PerTensor, QConfig, QuantRule, Recipe


def one_scale() -> Recipe:
    """``int8`` with weights per tensor; products of activations stay float."""
    default = Recipe.int8().default
    assert default.weight is not None
    weight = replace(default.weight, granularity=PerTensor())
    why = "one-scale keeps products of activations float"
    rules = tuple(QuantRule(None, op=op, why=why, own=True) for op in ("matmul", "bmm"))
    return Recipe("one-scale", QConfig(default.activation, weight), rules)
