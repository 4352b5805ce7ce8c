"""The C++ expression of what follows a layer's sums: addition, activation, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qfx.targets.base import Step
from qfx.targets.native.images import base
from qfx.targets.native.program import Program
from qfx.targets.native.views import Buffer, View
from qfx.targets.reference import MatmulLeaf, QParamsBuffers
from qfx.targets.x86_post_ops import real_bounds
from qfx.targets.x86_static import StaticLeaf

FUNCTIONS: dict[str, Callable[..., str]] = {
    "hardswish": lambda: "HardSwish{}",
    "hardsigmoid": lambda: "HardSigmoid{}",
    "leaky_relu": lambda slope=0.01: f"LeakyRelu{{{number(slope)}}}",
    "silu": lambda: "Silu{}",
    "sigmoid": lambda: "Sigmoid{}",
    "tanh": lambda: "Tanh{}",
    "gelu": lambda approximate="none": "GeluTanh{}" if approximate == "tanh" else "Gelu{}",
}
"""Activations beside those that only bound their values: C++ expressions made of the step's arguments."""


@dataclass(frozen=True)
class Epilogue:
    """``code`` declares a C++ ``epilogue``; ``reads``: buffers that it reads besides the constants."""

    code: str
    reads: tuple[Buffer, ...]
    other: View | None


def refusal(steps: tuple[Step, ...]) -> str | None:
    """Why the steps behind a layer have no epilogue, or None."""
    for step in steps:
        if step.name != "add" and step.name not in FUNCTIONS and real_bounds(step) is None:
            return f"no native epilogue for {step.name}"
    return None


def epilogue_of(
    program: Program,
    leaf: StaticLeaf | MatmulLeaf,
    steps: tuple[Step, ...],
    out: View,
    other: View | None,
    channels: tuple[str, str, str],
) -> Epilogue:
    """The epilogue of ``leaf``; ``channels``: C++ pointers to bias, scale and shift by output channel."""
    limits = leaf.output.limits if leaf.output is not None else None
    low, high = (-math.inf, math.inf) if limits is None else (float(limits["quant_min"]), float(limits["quant_max"]))
    activation, activation_type = "Identity{}", "Identity"
    for step in steps:
        if step.name == "add":
            continue
        bounds = real_bounds(step)
        if bounds is None:
            activation = "f32::" + FUNCTIONS[step.name](*step.args, *dict(step.kwargs).values())
            activation_type = activation.partition("{")[0]
        elif leaf.output is not None:  # rounding keeps order: bounding the integers afterwards gives the same
            ends = leaf.output.quantize(leaf.output.scale.new_tensor(bounds))
            low, high = float(ends[0]), float(ends[1])
        else:
            activation, activation_type = f"f32::Clamp{{{number(bounds[0])}, {number(bounds[1])}}}", "f32::Clamp"
    other_type, other_value, reads = _other(leaf, other)
    out_type, out_value = _out(leaf, out, low, high)
    bias, scale, shift = channels
    type_ = f"Epilogue<{other_type}, {activation_type}, {out_type}>"
    code = f"const {type_} epilogue{{{bias}, {scale}, {shift}, {other_value}, {activation}, {out_value}}};"
    program.headers.add("epilogue.h")
    return Epilogue(code, reads, other)


def _other(leaf: StaticLeaf | MatmulLeaf, other: View | None) -> tuple[str, str, tuple[Buffer, ...]]:
    if other is None:
        return "NoOther", "{}", ()
    name, reader = base(other), leaf.others[0] if len(leaf.others) else None
    if not isinstance(reader, QParamsBuffers):
        return "FloatOther", f"{{{name}}}", (other.buffer,)
    affine = f"{number(float(reader.scale))}, {int(reader.zero_point)}"
    return f"IntegerOther<{other.element}>", f"{{{name}, {affine}}}", (other.buffer,)


def _out(leaf: StaticLeaf | MatmulLeaf, out: View, low: float, high: float) -> tuple[str, str]:
    name = base(out)
    if leaf.output is None:
        return "Floats", f"{{{name}}}"
    inverse, zero_point = float(torch.reciprocal(leaf.output.scale.float())), int(leaf.output.zero_point)
    ends = f"{number(low - zero_point)}, {number(high - zero_point)}"
    return f"Quantized<{out.element}>", f"{{{name}, {number(inverse)}, {zero_point}, {ends}}}"


def quantize_to(qparams: QParamsBuffers) -> str:
    """``1 / scale, zero point, low, high`` in C++."""
    inverse = float(torch.reciprocal(qparams.scale.float()))
    ends = (float(qparams.limits["quant_min"]), float(qparams.limits["quant_max"]))
    return ", ".join(number(v) for v in (inverse, float(qparams.zero_point), *ends))


def number(value: float) -> str:
    """A float literal of C++ that is exactly the float32 of ``value``."""
    if math.isinf(value):
        return "-INFINITY" if value < 0 else "INFINITY"
    single = float(torch.tensor(value, dtype=torch.float32))
    return f"{float.hex(single)}f"
