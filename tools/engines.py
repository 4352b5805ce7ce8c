"""ONNX Runtime and OpenVINO on the CPU, set to compute what the file says: how they run by default, and what differs.

ONNX Runtime: ``session.x64quantprecision`` = 1 keeps sums of uint8 times int8 from saturating on x86 CPUs without VNNI
(int8 weights become uint8, for which it has another kernel). ``session.qdq_matmulnbits_accuracy_level`` = 1 multiplies
4-bit weights with float data; the default, 4, rounds the data to int8. OpenVINO's integer kernels saturate as well;
``LP_TRANSFORMS_MODE`` = NO, a property for its own tests, computes in float what stands between QuantizeLinear and
DequantizeLinear. The recipe ``openvino`` gives weights with which neither saturates, so that both need no setting.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ORT_EXACT = {"session.x64quantprecision": "1", "session.qdq_matmulnbits_accuracy_level": "1"}
OPENVINO_EXACT = {"LP_TRANSFORMS_MODE": "NO"}
OPENVINO_OWN_PRECISION = {"INFERENCE_PRECISION_HINT": None}
DEFAULT: dict[str, str] = {}


class OnnxRuntime:
    """A session with the default optimizations; ``settings`` are entries of its configuration."""

    name = "ONNX Runtime"

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, str] = ORT_EXACT) -> None:
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        self._session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        names = [i.name for i in self._session.get_inputs()]
        results = self._session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(result) for result in results]


class OpenVino:
    """A model compiled for the CPU: that of a file, given by its path, or one of OpenVINO's own class.

    It computes in float32 where it does not in integers, also where there is bfloat16, unless ``settings`` have
    ``OPENVINO_OWN_PRECISION``: a setting of None is left to OpenVINO.
    """

    name = "OpenVINO"

    def __init__(self, model: Any, settings: Mapping[str, str | None] = OPENVINO_EXACT) -> None:
        openvino: Any = importlib.import_module("openvino")
        source = os.fspath(model) if isinstance(model, str | os.PathLike) else model
        given = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), **settings}
        chosen = {name: value for name, value in given.items() if value is not None}
        self._model = openvino.Core().compile_model(source, "CPU", chosen)

    @property
    def precision(self) -> str:
        """What floats are computed in: ``"f32"``, ``"bf16"`` or ``"f16"``."""
        return str(self._model.get_property("INFERENCE_PRECISION_HINT").to_string())

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        results = self._model([x.numpy() for x in inputs], share_outputs=True)
        return [torch.from_numpy(results[i].copy()) for i in range(len(self._model.outputs))]
