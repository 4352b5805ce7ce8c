"""``qfx.export_onnx``: the CONVERTED graph as an ONNX file with QuantizeLinear and DequantizeLinear (QDQ)."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from qfx.attempt import short
from qfx.consumers import check, consumer_named
from qfx.errors import ConfigError, UnsupportedError
from qfx.interchange import export_flat, input_names, output_names, own_copy
from qfx.onnx_graph import to_onnx_form
from qfx.onnx_table import translations
from qfx.optional import need
from qfx.whole_file import write_whole

OPSET = 21
"""The first opset with scales per block and 4-bit integers."""

LARGEST_FILE = 2**31 - 1
"""Bytes that one protocol buffer may have."""

BATCH = "batch"


def export_onnx(
    qmodel: nn.Module, path: str | os.PathLike[str], *, consumer: str | None = None, opset: int = OPSET
) -> None:
    """Write a quantized model as QDQ ONNX: integer weights, and the scales that qfx computes with.

    Whatever target the model was lowered to, its CONVERTED graph is written. Inputs and outputs bear the user's names;
    sizes are free where they are free in the graph, the leading one under the name ``batch``. Weights of 2 to 4 bits
    are 4-bit initializers, those of 5 to 8 bits are int8; activations of fewer than 8 bits are 8-bit integers and
    clipped. ``consumer`` (``onnxruntime``, ``openvino``, ``tensorrt``, ``xnnpack``) says who shall read the file: what
    that engine rejects is refused here, and what it wants otherwise is written so.

    The file is written whole or not at all. Beyond 2 GB the weights go to ``path.data`` beside it.

    Args:
        qmodel: what ``qfx.quantize`` or ``qfx.convert`` returned.
        path: the file, as ``model.onnx``.
        consumer: the engine to write for; None: whoever reads QDQ of that opset.
        opset: of ONNX, 21 or newer.

    Raises:
        ConfigError: an unknown consumer, an opset below 21, a missing package, or no quantized model.
        UnsupportedError: the consumer rejects a layer, or ONNX has no word for an operator.
        OSError: the file cannot be written.
    """
    need("onnx", "onnxscript", extra="onnx", what="ONNX export")
    if opset < OPSET:
        raise ConfigError(
            f"opset {opset} has no scales per block and no 4-bit integers", hint=f"give opset={OPSET} or a newer one"
        )
    chosen = consumer_named(consumer)
    gm = own_copy(qmodel)
    check(gm, chosen)
    names = input_names(gm), output_names(gm)
    narrow = to_onnx_form(gm, chosen.form)
    model = _translated(export_flat(gm), *names, opset)
    _finish_constants(model, narrow)
    _tidy(model)
    _write(model, Path(os.path.realpath(path)))


def _translated(program: ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int) -> Any:
    """The ``onnx_ir.Model`` that torch's exporter makes.

    Raises:
        UnsupportedError: it has no translation for an operator.
    """
    try:
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=translations(),
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        raise UnsupportedError(
            f"torch's ONNX exporter cannot write the quantized graph: {short(error)}",
            hint="replace the operator in the model, or write a .pt2 with qfx.export_pt2",
        ) from error
    assert made is not None
    return made.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's account of packages that are missing and of its own steps."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- the model, finished ----------------------------------------------------------------------------------------------


def _finish_constants(model: Any, signed: Mapping[str, bool]) -> None:
    """Give the initializers named in ``signed`` the 4-bit type that holds them, and every weight its own zero point.

    The exporter's optimizer merges equal constants. ONNX Runtime 1.31, where it turns int8 weights into uint8, does not
    expect two of them to share a zero point.
    """
    import ml_dtypes
    import onnx_ir as ir

    types = {True: (ml_dtypes.int4, ir.DataType.INT4), False: (ml_dtypes.uint4, ir.DataType.UINT4)}
    constants = model.graph.initializers
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0].name not in constants or len(node.inputs) < 3:
            continue
        weight, shared = node.inputs[0], node.inputs[2]
        is_signed = signed.get(weight.name)
        constant = ir.convenience.get_const_tensor(shared)
        assert constant is not None
        array = constant.numpy()
        if is_signed is not None:
            kind, dtype = types[is_signed]
            array = array.astype(kind)
            if weight.dtype != dtype:
                weight.const_value = ir.Tensor(weight.const_value.numpy().astype(kind), dtype=dtype, name=weight.name)
                weight.dtype = dtype
        own = ir.Value(name=f"{node.outputs[0].name}_zero_point")
        own.const_value = ir.Tensor(array, dtype=weight.dtype, name=own.name)
        own.shape, own.dtype = own.const_value.shape, weight.dtype
        model.graph.register_initializer(own)
        node.replace_input_with(2, own)
        if constants.get(shared.name) is shared and not shared.uses():
            del constants[shared.name]


def _tidy(model: Any) -> None:
    """Readable names of free sizes, and nothing of the machine that the file was made on."""
    import onnx_ir as ir

    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for i, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and isinstance(size.value, str):
                leading = i == 0 and BATCH not in symbols.values()
                symbols.setdefault(size.value, BATCH if leading else f"{value.name}_{i}")
    pattern = re.compile("|".join(rf"\b{re.escape(s)}\b" for s in symbols) or "$^")
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(o for n in nodes for o in n.outputs)):
        value.metadata_props.clear()
        if value.shape is not None:
            sizes = [s.value if isinstance(s, ir.SymbolicDim) else s for s in value.shape]
            value.shape = ir.Shape(
                [pattern.sub(lambda m: symbols[m[0]], s) if isinstance(s, str) else s for s in sizes]
            )
    for node in nodes:
        node.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "qfx"


def _write(model: Any, path: Path) -> None:
    """Write ``path`` whole; beyond :data:`LARGEST_FILE` with the weights in ``path.data``, which is in place first."""
    import onnx
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if weights < LARGEST_FILE * 0.9:  # the graph itself takes some of it
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        write_whole(path, proto.SerializeToString())
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        part = Path(folder) / path.name
        data = f"{path.name}.data"
        ir.save(model, part, external_data=data)
        onnx.checker.check_model(os.fspath(part))
        os.replace(part.with_name(data), path.with_name(data))
        os.replace(part, path)
