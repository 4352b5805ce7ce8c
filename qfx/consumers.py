"""Who reads an exported file, in which form, and what each of them rejects.

Sources of the rules: TensorRT, "Working with Quantized Types" (symmetric INT8, INT4 for weights only, scales that are
constants when the engine is built) and ``IDequantizeLayer`` (zero points of zero); ExecuTorch, "XNNPACK backend:
quantization" (8-bit symmetric weights, 8-bit asymmetric activations, no weight-only layers); OpenVINO 2026.4 itself.
What is accepted but slow is not refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from qfx.errors import ConfigError, UnsupportedError
from qfx.integer_constants import integer_constants
from qfx.meta import info
from qfx.onnx_graph import DEFAULT_FORM, Clip, Form, Int4, reads_integers
from qfx.operators import is_constant, lookup
from qfx.ops import dequantize, quantize
from qfx.rewrite import evaluate

ACTIVATION, WEIGHT, BIAS = "activation", "weight", "bias"


@dataclass(frozen=True)
class Use:
    """One tensor that a graph holds as integers: ``role`` in ``layer``, and how it is quantized.

    ``group_size`` is None for scales per tensor (``axis`` None) or per axis, -1 for scales per token. ``ragged``: the
    last group is smaller. ``data_is_float``: of a weight, that its layer reads float data.
    """

    layer: str
    role: str
    bits: int
    signed: bool
    symmetric: bool
    axis: int | None
    group_size: int | None
    dynamic: bool = False
    ragged: bool = False
    data_is_float: bool = False

    def __str__(self) -> str:
        words = [f"{'int' if self.signed else 'uint'}{self.bits}", "symmetric" if self.symmetric else "affine"]
        words.append(
            "per tensor"
            if self.axis is None
            else f"per axis {self.axis}"
            if self.group_size is None
            else "per token"
            if self.group_size == -1
            else f"per group of {self.group_size}"
        )
        return " ".join([*words, *["dynamic"] * self.dynamic])


@dataclass(frozen=True)
class Refusal:
    """``refuses`` a use, and ``why``."""

    refuses: Callable[[Use], bool]
    why: str


@dataclass(frozen=True)
class Consumer:
    """An engine: the ``form`` it reads, what it refuses (the first that matches is told), and the ``recipe`` for it."""

    name: str
    form: Form = DEFAULT_FORM
    refusals: tuple[Refusal, ...] = ()
    recipe: str = "int8"


def _activation(use: Use) -> bool:
    return use.role == ACTIVATION


def _weight(use: Use) -> bool:
    return use.role == WEIGHT


_TENSORRT_GROUPS = (64, 128)
_EVENLY = "its groups divide the weight evenly"

CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer("onnxruntime", Form(int4=Int4.WEIGHT_ONLY)),
        Consumer(
            "openvino",
            Form(int4=Int4.WEIGHT_ONLY, clip=Clip.REALS),
            (Refusal(lambda u: u.ragged, _EVENLY),),
            recipe="openvino",
        ),
        Consumer(
            "tensorrt",
            Form(float_bias=True, int4=Int4.GROUPS, clip=Clip.REALS),
            (
                Refusal(lambda u: u.dynamic, "it needs scales that are constants when the engine is built"),
                Refusal(lambda u: u.role != BIAS and not u.signed, "it has no unsigned integers"),
                Refusal(lambda u: u.role != BIAS and not u.symmetric, "its zero points are zero"),
                Refusal(
                    lambda u: _weight(u) and u.group_size is not None and u.bits > 4,
                    "it takes scales per group for 4-bit weights only",
                ),
                Refusal(
                    lambda u: _weight(u) and u.group_size not in (None, *_TENSORRT_GROUPS),
                    f"its groups have {' or '.join(map(str, _TENSORRT_GROUPS))} weights",
                ),
                Refusal(lambda u: u.ragged, _EVENLY),
            ),
            recipe="tensorrt",
        ),
        Consumer(
            "xnnpack",
            Form(int4=Int4.GROUPS),
            (
                Refusal(lambda u: u.data_is_float, "it has no layers of integer weights and float data"),
                Refusal(lambda u: u.dynamic, "its dynamic activations are affine and chosen by operators of its own"),
                Refusal(lambda u: _activation(u) and not u.signed, "its activations are int8"),
                Refusal(lambda u: _weight(u) and not (u.signed and u.symmetric), "its weights are int8 and symmetric"),
                Refusal(lambda u: u.group_size is not None, "it takes scales per tensor or per channel"),
            ),
            recipe="xnnpack",
        ),
    )
}


def consumer_named(name: str | None) -> Consumer:
    """The consumer; for None one that refuses nothing.

    Raises:
        ConfigError: there is none of that name; the text lists those there are.
    """
    if name is None:
        return Consumer("")
    if name not in CONSUMERS:
        near = difflib.get_close_matches(str(name), CONSUMERS, n=1)
        raise ConfigError(
            f"there is no consumer {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint="choose one of " + ", ".join(CONSUMERS) + ", or None",
        )
    return CONSUMERS[name]


def check(gm: fx.GraphModule, consumer: Consumer) -> None:
    """Refuse a CONVERTED graph that ``consumer`` would reject.

    Raises:
        UnsupportedError: the text names the layer, how its tensor is quantized, why the engine rejects that, and the
            recipe that gives what it accepts.
    """
    if not consumer.refusals:
        return
    for use in uses(gm):
        refusal = next((r for r in consumer.refusals if r.refuses(use)), None)
        if refusal is not None:
            raise UnsupportedError(
                f"{consumer.name} rejects this {use.role}, {use}: {refusal.why}",
                where=use.layer,
                hint=f"quantize with recipe={consumer.recipe!r}, or leave the layer float with Recipe.skip",
            )


def uses(gm: fx.GraphModule) -> Iterator[Use]:
    """Every tensor that the graph holds as integers: activations in graph order, then constants."""
    for node in gm.graph.nodes:
        if node.target is quantize:
            yield _of_activation(gm, node)
    for found in integer_constants(gm):
        reader = next(iter(found.node.users))
        row = lookup(reader)
        anchor = row is not None and row.weight is not None
        axis, group = found.axis, found.group_size
        length = 0 if axis is None else found.integers.shape[axis]
        yield Use(
            layer=reading_layer(found.node),
            role=BIAS if found.is_bias else WEIGHT,
            bits=32 if found.is_bias else found.bits,
            signed=found.integers.dtype != torch.uint8,
            symmetric=found.symmetric,
            axis=axis,
            group_size=group,
            ragged=bool(group and length % group),
            data_is_float=anchor and not found.is_bias and not reads_integers(reader),
        )


def _of_activation(gm: fx.GraphModule, node: fx.Node) -> Use:
    scale, zero_point, axis, group_size, low, high, dtype = node.args[1:8]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    assert isinstance(low, int) and isinstance(high, int)
    dynamic = not is_constant(scale)
    return Use(
        layer=reading_layer(node),
        role=ACTIVATION,
        bits=(high - low).bit_length(),
        signed=dtype == torch.int8,
        symmetric=_symmetric_choice(scale) if dynamic else not bool(evaluate(gm, zero_point).any()),
        axis=axis,  # type: ignore[arg-type]
        group_size=group_size,  # type: ignore[arg-type]
        dynamic=dynamic,
    )


def _symmetric_choice(scale: fx.Node) -> bool:
    """How the operator that chose ``scale`` at run time was told to choose."""
    chosen = scale.args[0]
    return isinstance(chosen, fx.Node) and chosen.args[3] is True


def reading_layer(node: fx.Node) -> str:
    """The layer that reads the integers of ``node``, by its path in the user's model."""
    reader = node
    while reader.target in (quantize, dequantize) and reader.users:
        reader = next(iter(reader.users))
    return info(reader).origin or info(node).origin or reader.name
