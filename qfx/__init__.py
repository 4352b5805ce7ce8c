"""qfx: a torch.fx quantization compiler.

``qfx.quantize(model, example_inputs)`` takes a float model and returns one that runs integer kernels; ``print`` of
``qfx.report(qmodel)`` says of every node what became of it, and why.
"""

from qfx.api import (
    calibrate,
    clipped_weights,
    convert,
    default_pipeline,
    prepare,
    quantize,
    quantize_qat,
    reestimate_batch_norm,
    report,
)
from qfx.auto_recipe import AutoRecipe
from qfx.bit_allocation import Allocation
from qfx.bit_search import allocate, pareto, sensitivity
from qfx.distillation import distillation_loss
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
from qfx.pipeline import Pipeline
from qfx.recipe import QuantRule, Recipe
from qfx.schedule import Schedule
from qfx.sensitivity_table import Sensitivity
from qfx.spec import IntType, PerAxis, PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.stage import Stage
from qfx.training import Estimator, Fixed, Learned, Moving

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "ArtifactError",
    "AutoRecipe",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
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
    "calibrate",
    "clipped_weights",
    "convert",
    "default_pipeline",
    "distillation_loss",
    "pareto",
    "prepare",
    "quantize",
    "quantize_qat",
    "reestimate_batch_norm",
    "report",
    "sensitivity",
]
