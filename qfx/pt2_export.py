"""``qfx.export_pt2``: the CONVERTED graph in the quantize and dequantize operators that Inductor and ExecuTorch read.

These operators, ``torch.ops.quantized_decomposed.*``, are registered by a module of torch that is deprecated along with
the rest of its old quantization. It is imported when an export asks for it, by name, and nowhere else: qfx works
without it. A process that loads such a file imports it first.
"""

from __future__ import annotations

import importlib
import io
import os
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from qfx.affine import MIN_SCALE
from qfx.attributes import free_path
from qfx.consumers import reading_layer
from qfx.errors import ConfigError, UnsupportedError
from qfx.integer_constants import IntegerConstant, integer_constants, store, to_float
from qfx.interchange import export_called, own_copy
from qfx.meta import describe, value
from qfx.operators import is_constant
from qfx.ops import choose_qparams, dequantize, quantize
from qfx.rewrite import erase_dead, evaluate, insert_buffer, insert_call, replace_all
from qfx.whole_file import write_whole

DIALECT, REGISTERED_BY = "quantized_decomposed", "torch.ao.quantization.fx._decomposed"


def export_pt2(qmodel: nn.Module, path: str | os.PathLike[str] | None = None) -> ExportedProgram:
    """The quantized model as an ExportedProgram in torch's own quantize and dequantize operators.

    It is called like the user's model, with the same sizes free, and computes what the CONVERTED graph computes. Biases
    are float, as readers of the dialect expect; weights of fewer than 8 bits are int8. For a program in qfx's own
    operators call ``torch.export.export(qmodel, ...)``.

    Args:
        qmodel: what ``qfx.quantize`` or ``qfx.convert`` returned.
        path: where to write it, as ``model.pt2``; the file is written whole or not at all. None: nowhere.

    Returns:
        The program.

    Raises:
        ConfigError: no quantized model, or a torch that no longer has these operators.
        UnsupportedError: a layer is quantized in a way that they cannot say, such as weights in groups.
        OSError: the file cannot be written.
    """
    gm = own_copy(qmodel)
    _to_dialect(gm, _dialect())
    program = export_called(gm)
    if path is not None:
        content = io.BytesIO()
        torch.export.save(program, content)
        write_whole(path, content.getvalue())
    return program


def _dialect() -> Any:
    """The namespace of the operators, registered.

    Raises:
        ConfigError: torch has removed them.
    """
    try:
        importlib.import_module(REGISTERED_BY)
    except ImportError as error:
        raise ConfigError(
            f"torch {torch.__version__} has no {REGISTERED_BY}, which registers {DIALECT}",
            hint="call torch.export.export(qmodel, ...): the program is in qfx's own operators",
        ) from error
    return getattr(torch.ops, DIALECT)


def _to_dialect(gm: fx.GraphModule, ops: Any) -> None:
    for found in integer_constants(gm):
        if found.is_bias:
            to_float(gm, found)
        else:
            _constant(gm, found, ops)
    for node in list(gm.graph.nodes):
        if node.target in (quantize, dequantize):
            _activation(gm, node, ops)
    for node in [n for n in gm.graph.nodes if n.target is choose_qparams]:
        _choice(gm, node, ops)


def _constant(gm: fx.GraphModule, found: IntegerConstant, ops: Any) -> None:
    if found.group_size is not None:
        raise _refusal(found.node, f"weights per group of {found.group_size}", "they have scales per channel at most")
    node = store(gm, found)
    integers, scale, _, axis, _, dtype = node.args
    signed = found.integers.dtype == torch.int8
    low = -(1 << (found.bits - 1)) if signed else 0
    limits = (low, low + (1 << found.bits) - 1, found.integers.dtype)
    if axis is None:
        qparams = (found.scale.item(), int(found.zero_point))
        _replace(gm, node, ops.dequantize_per_tensor.default, (integers, *qparams, *limits), dtype)
        return
    with gm.graph.inserting_before(node):
        path = free_path(gm, f"{found.path}_zero_points")
        zero_points = insert_buffer(gm, path, found.zero_point.to(torch.int64), like=node)
    _replace(gm, node, ops.dequantize_per_channel.default, (integers, scale, zero_points, axis, *limits), dtype)


def _activation(gm: fx.GraphModule, node: fx.Node, ops: Any) -> None:
    x, scale, zero_point, axis, _ = node.args[:5]
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    if axis is not None:
        raise _refusal(node, "activations per token", "they choose other scales per token, max / 127")
    quantizes = node.target is quantize
    made = node if quantizes else x
    limits = tuple(made.args[5:8]) if made.target is quantize else _limits(value(made).dtype)
    dtype = None if quantizes else node.args[5]
    if is_constant(scale):
        op = ops.quantize_per_tensor.default if quantizes else ops.dequantize_per_tensor.default
        qparams: tuple[Any, ...] = (evaluate(gm, scale).item(), int(evaluate(gm, zero_point)))
    else:
        op = ops.quantize_per_tensor.tensor if quantizes else ops.dequantize_per_tensor.tensor
        qparams = (scale, zero_point)
    _replace(gm, node, op, (x, *qparams, *limits), dtype)


def _choice(gm: fx.GraphModule, node: fx.Node, ops: Any) -> None:
    """Scale and zero point per tensor at run time; those that choose per token are refused before."""
    x, _, _, symmetric, low, high = node.args
    assert isinstance(x, fx.Node)
    if symmetric:
        raise _refusal(node, "symmetric scales chosen at run time", "they choose another scale, max / 127")
    dtype = torch.int8 if low < 0 else torch.uint8  # type: ignore[operator]
    with gm.graph.inserting_before(node):
        new = insert_call(gm, ops.choose_qparams.tensor, x, low, high, MIN_SCALE, dtype, like=node)
    replace_all(node, new)
    erase_dead(gm, node)


def _limits(dtype: torch.dtype) -> tuple[Any, ...]:
    known = torch.iinfo(dtype)
    return known.min, known.max, dtype


def _replace(gm: fx.GraphModule, old: fx.Node, op: Any, args: tuple[Any, ...], dtype: Any) -> None:
    """``op`` in place of ``old``; ``dtype`` of its result, where that is to be said."""
    kwargs = {} if dtype in (None, torch.float32) else {"out_dtype": dtype}
    with gm.graph.inserting_before(old):
        new = gm.graph.create_node("call_function", op, args, kwargs, name=f"{old.name}_{DIALECT}")
    new.meta.update(describe(old))
    replace_all(old, new)
    erase_dead(gm, old)


def _refusal(node: fx.Node, what: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"torch's quantize and dequantize operators have no words for {what}: {why}",
        where=reading_layer(node),
        hint="leave the layer float with Recipe.skip, quantize it otherwise, or call torch.export.export(qmodel, ...)",
    )
