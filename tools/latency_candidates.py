"""Who is measured: qfx on each of its targets, float eager, and the peers, each as one would use it at its best."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import qfx
from qfx import cpu
from qfx.targets import TARGETS
from qfx.tools.bench_calls import call, tensors
from qfx.tools.bench_figures import need
from qfx.tools.bench_fx_mode import quantize_fx
from qfx.tools.engines import DEFAULT, OPENVINO_OWN_PRECISION, OnnxRuntime, OpenVino
from qfx.tools.latency_onnx import float_file, int8_file
from qfx.tools.latency_subject import Subject

NOT_INSTALLED = "not installed: pip install 'qfx[bench]'"
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16"})

QFX, EAGER = "qfx", "eager"
PEERS = ("torch_fx", "inductor", "onnxruntime", "openvino")
"""The groups of candidates; those of ``PEERS`` can be chosen."""


@dataclass(frozen=True)
class Ready:
    """A candidate that can be called with inputs, and what it computes in: ``int8``, ``f32``, ``bf16``."""

    run: Callable[[Any], object]
    computes: str
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """``make`` prepares it, in the process in which it runs. ``lacks`` says why it cannot run here, or None."""

    group: str
    make: Callable[[Subject], Ready]
    lacks: Callable[[], str | None] = lambda: None


def packages(*names: str) -> Callable[[], str | None]:
    """For ``lacks``: all of them must be installed."""
    return lambda: NOT_INSTALLED if any(importlib.util.find_spec(name) is None for name in names) else None


def bfloat16() -> str | None:
    return None if BF16_FEATURES & cpu.cpu_features() else "this CPU has no bfloat16 instructions"


# --- qfx and eager ----------------------------------------------------------------------------------------------------


def quantized(of: Subject, target: str) -> Ready:
    qmodel = qfx.quantize(of.model, of.example, calibration=of.calibration, target=target, verbose=False)
    return Ready(partial(call, qmodel), "int8")


def eager(of: Subject) -> Ready:
    return Ready(partial(call, of.model), "f32")


# --- torch ------------------------------------------------------------------------------------------------------------


def fx_mode(of: Subject, name: str) -> Ready:
    model = quantize_fx(of.model, of.calibration, name)
    torch.backends.quantized.engine = name  # the process is its own
    return Ready(partial(call, model), "int8")


def compiled(model: nn.Module) -> nn.Module:
    """By Inductor, with weights as constants, which it wants for packing them. No process to compile stays behind."""
    settings: Any = importlib.import_module("torch._inductor.config")
    settings.freezing = True
    settings.compile_threads = 1
    return torch.compile(model)  # type: ignore[return-value]


def inductor(of: Subject) -> Ready:
    return Ready(partial(call, compiled(of.model)), "f32")


def inductor_bf16(of: Subject) -> Ready:
    model = compiled(of.model)

    def run(inputs: Any) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, inputs)

    return Ready(run, "bf16")


def inductor_int8(of: Subject) -> Ready:
    """PT2E of torchao, with the quantizer for x86; without VNNI activations have 7 bits, so that no sum saturates."""
    pt2e = need("torchao.quantization.pt2e.quantize_pt2e")
    x86 = need("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    first = of.held_out[0]
    args, kwargs = ((), first) if isinstance(first, dict) else (first, None)
    captured = torch.export.export(of.model, args, kwargs, strict=True).module()  # it looks for modules: strict
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=not cpu.onednn_has_vnni())
    prepared = pt2e.prepare_pt2e(captured, x86.X86InductorQuantizer().set_global(config))
    for item in of.calibration:
        call(prepared, item)
    return Ready(partial(call, compiled(pt2e.convert_pt2e(prepared))), "int8", "PT2E")


# --- other engines ----------------------------------------------------------------------------------------------------


def onnx_runtime(of: Subject) -> Ready:
    session = OnnxRuntime(int8_file(of), DEFAULT)
    return Ready(lambda inputs: session(tensors(inputs)), "int8")


def openvino(of: Subject) -> Ready:
    model = OpenVino(float_file(of), OPENVINO_OWN_PRECISION)
    return Ready(lambda inputs: model(tensors(inputs)), model.precision)


def openvino_int8(of: Subject) -> Ready:
    """Quantized by NNCF, as OpenVINO's documentation does; without it, what ONNX Runtime's quantizer made."""
    if importlib.util.find_spec("nncf") is None:
        model = OpenVino(int8_file(of), OPENVINO_OWN_PRECISION)
        note = f"quantized by ONNX Runtime; nncf is {NOT_INSTALLED}"
    else:
        nncf, core = need("nncf"), need("openvino").Core()
        data = nncf.Dataset([[x.numpy() for x in tensors(item)] for item in of.calibration])
        kind = nncf.ModelType.TRANSFORMER if _is_transformer(of.model) else None
        made = nncf.quantize(core.read_model(float_file(of)), data, model_type=kind, subset_size=len(of.calibration))
        model = OpenVino(made, OPENVINO_OWN_PRECISION)
        note = "quantized by NNCF"
    return Ready(lambda inputs: model(tensors(inputs)), "int8", note)


def _is_transformer(model: nn.Module) -> bool:
    """NNCF wants to know: normalisation over features, or tokens."""
    return any(isinstance(module, nn.LayerNorm | nn.Embedding) for module in model.modules())


ONNX = ("onnx", "onnxscript")


def qfx_on(target: str) -> str:
    """The name of the candidate."""
    return f"qfx {target}"


CANDIDATES: dict[str, Candidate] = {
    **{
        qfx_on(name): Candidate(QFX, partial(quantized, target=name), target.unavailable)
        for name, target in TARGETS.items()
    },
    "fp32 eager": Candidate(EAGER, eager),
    "torch_fx onednn": Candidate("torch_fx", partial(fx_mode, name="onednn")),
    "torch_fx x86": Candidate("torch_fx", partial(fx_mode, name="x86")),
    "inductor f32": Candidate("inductor", inductor),
    "inductor bf16": Candidate("inductor", inductor_bf16, bfloat16),
    "inductor int8": Candidate("inductor", inductor_int8, packages("torchao")),
    "onnxruntime int8": Candidate("onnxruntime", onnx_runtime, packages(*ONNX, "onnxruntime")),
    "openvino float": Candidate("openvino", openvino, packages(*ONNX, "openvino")),
    "openvino int8": Candidate("openvino", openvino_int8, packages(*ONNX, "onnxruntime", "openvino")),
}
"""By name. The command line chooses among qfx's by target, and among the peers by group."""
