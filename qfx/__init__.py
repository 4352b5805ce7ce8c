"""qfx: a torch.fx quantization compiler.

``qfx.quantize(model, example_inputs)`` takes a float model and returns one that runs integer kernels; ``print`` of
``qfx.report(qmodel)`` says of every node what became of it, and why.
"""

from qfx.api import calibrate, convert, default_pipeline, prepare, quantize, report
from qfx.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    ConfigError,
    NativeError,
    PassError,
    QfxError,
    QfxWarning,
    UnsupportedError,
    VerifyError,
)
from qfx.node_table import Report
from qfx.pipeline import Pipeline
from qfx.recipe import QuantRule, Recipe
from qfx.spec import IntType, PerAxis, PerGroup, PerTensor, PerToken, QConfig, QuantSpec, Scheme
from qfx.stage import Stage

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "IntType",
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
    "Scheme",
    "Stage",
    "UnsupportedError",
    "VerifyError",
    "calibrate",
    "convert",
    "default_pipeline",
    "prepare",
    "quantize",
    "report",
]
