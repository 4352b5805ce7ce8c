"""The ONNX files that other engines read: the float model, and what ONNX Runtime's own quantizer makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qfx import cpu
from qfx.tools.bench_calls import tensors
from qfx.tools.bench_figures import need
from qfx.tools.latency_subject import Subject


def float_file(of: Subject) -> Path:
    """The float model at the batch size of the subject, written once a folder."""
    path = of.folder / "float.onnx"
    if not path.exists():
        first = of.held_out[0]
        args, kwargs = ((), first) if isinstance(first, dict) else (first, None)
        torch.onnx.export(of.model, args, path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)
    return path


def int8_file(of: Subject) -> Path:
    """The model with QuantizeLinear and DequantizeLinear, by ``onnxruntime.quantization.quantize_static``.

    As ONNX Runtime's documentation of the function asks for on x86: uint8 activations, int8 weights (here per channel,
    for accuracy, as the other peers), which have 7 bits where the CPU has no VNNI. It is written once a folder.
    """
    quantization = need("onnxruntime.quantization")
    path = of.folder / "int8.onnx"
    if path.exists():
        return path
    plain = of.folder / "preprocessed.onnx"
    need("onnxruntime.quantization.shape_inference").quant_pre_process(float_file(of), plain, skip_symbolic_shape=True)
    names = [i.name for i in need("onnx").load(plain, load_external_data=False).graph.input]
    feeds = [dict(zip(names, (x.numpy() for x in tensors(item)), strict=True)) for item in of.calibration]
    quantization.quantize_static(
        plain,
        path,
        _Reader(feeds),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=not cpu.onednn_has_vnni(),
    )
    return path


class _Reader:
    """What ``quantize_static`` takes for a ``CalibrationDataReader``."""

    def __init__(self, feeds: Iterable[Mapping[str, Any]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._left, None)
