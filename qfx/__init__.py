"""qfx: a torch.fx quantization compiler.

``qfx.quantize(model, example_inputs)`` takes a float model and returns one that runs integer kernels; ``print`` of
``qfx.report(qmodel)`` says of every node what became of it, and why.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qfx import passes  # noqa: F401  what Pipeline.default gives
from qfx.api import (
    calibrate,
    clipped_weights,
    convert,
    prepare,
    quantize,
    quantize_qat,
    reestimate_batch_norm,
    report,
)
from qfx.artifact import load, save
from qfx.auto_recipe import AutoRecipe
from qfx.bit_allocation import Allocation
from qfx.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    NativeError,
    PassError,
    QfxError,
    QfxWarning,
    TrainingError,
    UnsupportedError,
    VerifyError,
)
from qfx.node_table import Report
from qfx.pipeline import Pipeline, register_pass
from qfx.recipe import QuantRule, Recipe, register_recipe
from qfx.sensitivity_table import Sensitivity
from qfx.spec import IntType, PerAxis, PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.stage import Stage
from qfx.targets import register_target
from qfx.training import Estimator, Fixed, Learned, Moving

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "ArtifactError",
    "AutoRecipe",
    "CalibrationError",
    "CaptureError",
    "Comparison",
    "ConfigError",
    "Diagnosis",
    "Estimator",
    "Fixed",
    "IntType",
    "Learned",
    "Moving",
    "NativeError",
    "PassError",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Pipeline",
    "QConfig",
    "QfxError",
    "QfxWarning",
    "QuantRule",
    "QuantSpec",
    "Recipe",
    "Report",
    "Schedule",
    "Scheme",
    "Sensitivity",
    "Stage",
    "TrainingError",
    "UnsupportedError",
    "VerifyError",
    "allocate",
    "backend",
    "calibrate",
    "check",
    "clipped_weights",
    "compare",
    "convert",
    "distillation_loss",
    "dump",
    "export_onnx",
    "export_pt2",
    "load",
    "pareto",
    "prepare",
    "quantize",
    "quantize_qat",
    "reestimate_batch_norm",
    "register_pass",
    "register_recipe",
    "register_target",
    "report",
    "save",
    "sensitivity",
]

_LATER = {
    "bit_search": ("allocate", "pareto", "sensitivity"),
    "comparison": ("Comparison", "compare"),
    "distillation": ("distillation_loss",),
    "doctor": ("Diagnosis", "check"),
    "dumping": ("dump",),
    "dynamo": ("backend",),
    "onnx_export": ("export_onnx",),
    "pt2_export": ("export_pt2",),
    "schedule": ("Schedule",),
}
"""Modules that are imported when a name of theirs is first asked for: few who quantize or load a model need them."""

if TYPE_CHECKING:
    from qfx.bit_search import allocate, pareto, sensitivity
    from qfx.comparison import Comparison, compare
    from qfx.distillation import distillation_loss
    from qfx.doctor import Diagnosis, check
    from qfx.dumping import dump
    from qfx.dynamo import backend
    from qfx.onnx_export import export_onnx
    from qfx.pt2_export import export_pt2
    from qfx.schedule import Schedule
else:

    def __getattr__(name: str) -> Any:
        home = next((module for module, names in _LATER.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(f"{__name__}.{home}"), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
