"""A snapshot of the public API: a change here is a change for every user, and belongs into CHANGELOG.md."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import qfx

NAMES = [
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

SIGNATURES = {
    "check": "(qmodel: 'nn.Module', data: 'Iterable[Any]', *, limit: 'int | None' = None) -> "
    "'Diagnosis'",
    "compare": "(first: 'nn.Module', second: 'nn.Module', inputs: 'Any') -> 'Comparison'",
    "export_onnx": "(qmodel: 'nn.Module', path: 'str | os.PathLike[str]', *, consumer: 'str | None' = None, "
    "opset: 'int' = 21) -> 'None'",
    "export_pt2": "(qmodel: 'nn.Module', path: 'str | os.PathLike[str] | None' = None) -> 'ExportedProgram'",
    "quantize": "(model: 'nn.Module', example_inputs: 'Any', *, calibration: 'Iterable[Any] | None' = "
    "None, recipe: 'str | Recipe | AutoRecipe' = 'int8', target: 'str | Target' = 'auto', "
    "pipeline: 'Pipeline | None' = None, dynamic_shapes: 'Any' = None, inplace: 'bool' = "
    "False, verbose: 'bool' = True) -> 'nn.Module'",
    "prepare": "(model: 'nn.Module', example_inputs: 'Any', *, recipe: 'str | Recipe | AutoRecipe' = "
    "'int8', target: 'str | Target' = 'auto', pipeline: 'Pipeline | None' = None, "
    "dynamic_shapes: 'Any' = None, mode: 'str' = 'ptq') -> 'nn.Module'",
    "calibrate": "(prepared: 'nn.Module', data: 'Iterable[Any]') -> 'nn.Module'",
    "reestimate_batch_norm": "(prepared: 'nn.Module', data: 'Iterable[Any]') -> 'nn.Module'",
    "quantize_qat": "(model: 'nn.Module', example_inputs: 'Any', *, train: 'Callable[[nn.Module], object]', "
    "calibration: 'Iterable[Any] | None' = None, recipe: 'str | Recipe' = 'int8', target: "
    "'str | Target' = 'auto', pipeline: 'Pipeline | None' = None, dynamic_shapes: 'Any' = "
    "None, verbose: 'bool' = True) -> 'nn.Module'",
    "distillation_loss": "(student: 'Tensor', teacher: 'Tensor', *, temperature: 'float' = 1.0) -> 'Tensor'",
    "clipped_weights": "(prepared: 'nn.Module') -> 'dict[str, float]'",
    "convert": "(prepared: 'nn.Module', *, check: 'bool | None' = None, verbose: 'bool' = False) -> "
    "'nn.Module'",
    "report": "(qmodel: 'nn.Module') -> 'Report'",
    "Pipeline.default": "(recipe: 'str | Recipe | AutoRecipe' = 'int8', target: 'str | Target' = 'auto', *, mode:"
    " 'str' = 'ptq') -> 'Pipeline'",
    "Recipe.preset": "(name: 'str') -> 'Recipe'",
    "Recipe.int8": "() -> 'Recipe'",
    "Recipe.int8_dynamic": "() -> 'Recipe'",
    "Recipe.w8a16": "() -> 'Recipe'",
    "Recipe.w4a16": "(group_size: 'int' = 128, *, ranges: 'Ranges' = Moving(averaging_constant=0.01), scale_dtype:"
    " 'torch.dtype' = torch.float32) -> 'Recipe'",
    "Recipe.skip": "(self, layer: 'str | type[nn.Module] | None' = None, *, op: 'str | None' = None, module:"
    " 'str | None' = None, why: 'str' = '') -> 'Recipe'",
    "Recipe.set": "(self, layer: 'str | type[nn.Module] | None' = None, *, op: 'str | None' = None, module:"
    " 'str | None' = None, weight: 'Part' = KEEP, activation: 'Part' = KEEP, why: 'str' = '')"
    " -> 'Recipe'",
    "Pipeline.before": "(self, name: 'str', new: 'PassLike') -> 'Pipeline'",
    "Pipeline.after": "(self, name: 'str', new: 'PassLike') -> 'Pipeline'",
    "Pipeline.replace": "(self, name: 'str', new: 'PassLike') -> 'Pipeline'",
    "Pipeline.without": "(self, name: 'str') -> 'Pipeline'",
    "Report.table": "(self) -> 'str'",
    "Report.summary": "(self) -> 'str'",
    "Report.to_dict": "(self) -> 'dict[str, object]'",
    "Recipe.w3a16": "(group_size: 'int' = 128, *, ranges: 'Ranges' = Moving(averaging_constant=0.01), scale_dtype:"
    " 'torch.dtype' = torch.float32) -> 'Recipe'",
    "Recipe.lsq": "(weight_bits: 'int', activation_bits: 'int') -> 'Recipe'",
    "Recipe.w4a4_lsq": "() -> 'Recipe'",
    "Recipe.with_embedding_storage": "(self, bits: 'int | None' = 8) -> 'Recipe'",
    "Schedule.__init__": "(self, prepared: 'nn.Module', *, float_steps: 'int' = 0, freeze_observers: 'int | None' "
    "= None, freeze_batch_norm: 'int | None' = None, bits: 'Mapping[int, Bits] | None' = "
    "None) -> 'None'",
    "Schedule.step": "(self) -> 'None'",
    "Schedule.check": "(self, loss: 'Tensor') -> 'None'",
    "Schedule.state_dict": "(self) -> 'dict[str, Any]'",
    "Schedule.load_state_dict": "(self, state: 'Mapping[str, Any]') -> 'None'",
    "allocate": "(sensitivity: 'Sensitivity', *, average_weight_bits: 'float | None' = None, "
    "weight_bytes: 'float | None' = None, bit_operations: 'float | None' = None, latency_ms: "
    "'float | None' = None, pin_first_last: 'Pin' = 8, allow_float: 'bool' = False) -> "
    "'Recipe'",
    "pareto": "(sensitivity: 'Sensitivity', resource: 'str' = 'weight_bytes', *, points: 'int' = 20, "
    "pin_first_last: 'Pin' = 8, allow_float: 'bool' = False) -> 'tuple[Allocation, ...]'",
    "sensitivity": "(model: 'nn.Module', example_inputs: 'Any', *, data: 'Iterable[Any] | None' = None, "
    "recipe: 'str | Recipe' = 'int8', target: 'str | Target' = 'auto', weight_bits: "
    "'tuple[int, ...]' = (2, 3, 4, 6, 8), activation_bits: 'tuple[int, ...]' = (4, 6, 8), "
    "score: 'str | Loss' = 'fisher', mode: 'Mode' = 'only', rows: 'int' = 32, check: 'int' = "
    "16, latency: 'bool' = False, dynamic_shapes: 'Any' = None) -> 'Sensitivity'",
    "Recipe.save": "(self, path: 'str | os.PathLike[str]') -> 'None'",
    "Recipe.load": "(path: 'str | os.PathLike[str]') -> 'Recipe'",
    "Report.plot": "(self, path: 'str | os.PathLike[str]') -> 'None'",
    "Report.html": "(self) -> 'str'",
    "Sensitivity.table": "(self) -> 'str'",
    "Sensitivity.worst": "(self, bits: 'int', part: 'str' = 'weight') -> 'tuple[tuple[str, float], ...]'",
    "Sensitivity.correlation": "(self, other: 'Sensitivity') -> 'float'",
    "Sensitivity.plot": "(self, path: 'str | os.PathLike[str]') -> 'None'",
    "Sensitivity.html": "(self) -> 'str'",
    "Allocation.recipe": "(self) -> 'Recipe'",
    "backend": "(*, recipe: 'str | Recipe | AutoRecipe' = 'int8', calibration_steps: 'int' = 8, target: "
    "'str | Target' = 'auto', passes: 'Iterable[PassLike]' = ()) -> 'Backend'",
    "dump": "(model: 'nn.Module | str | os.PathLike[str]', example_inputs: 'Any' = None, *, stages: "
    "'str | Sequence[str] | None' = None, diff: 'str | None' = None, layer: 'str | None' = "
    "None, why: 'str | None' = None, pass_by_pass: 'bool' = False, bisect: 'float | None' = "
    "None, format: 'str' = 'text', measure: 'bool | None' = None, recipe: 'str | Recipe | "
    "AutoRecipe' = 'int8', target: 'str | Target' = 'auto', calibration: 'Iterable[Any] | "
    "None' = None) -> 'str'",
    "register_pass": "(plugin: 'P') -> 'P'",
    "register_recipe": "(recipe: 'R') -> 'R'",
    "register_target": "(target: 'T') -> 'T'",
    "load": "(path: 'str | os.PathLike[str]', *, target: 'str | Target' = 'auto', device: 'str | "
    "torch.device' = 'cpu') -> 'nn.Module'",
    "save": "(qmodel: 'nn.Module', path: 'str | os.PathLike[str]') -> 'None'",
}

FIELDS = {
    "QConfig": ["activation", "weight"],
    "QuantRule": ["qconfig", "op", "layer", "module", "why", "own", "exact"],
    "QuantSpec": [
        "element",
        "scheme",
        "granularity",
        "observer",
        "dynamic",
        "narrow_range",
        "ranges",
        "estimator",
        "scale_dtype",
    ],
    "Recipe": ["name", "default", "rules", "reduce_range", "embedding_storage", "ends"],
    "Moving": ["averaging_constant"],
    "Learned": ["scaled"],
    "Fixed": [],
    "IntType": ["bits", "signed"],
    "PerAxis": ["axis"],
    "PerGroup": ["size", "axis"],
    "AutoRecipe": [
        "average_weight_bits",
        "weight_bytes",
        "bit_operations",
        "latency_ms",
        "weight_bits",
        "activation_bits",
        "base",
        "score",
        "rows",
        "pin_first_last",
        "allow_float",
        "max_drop",
        "metric",
        "time_budget",
        "state",
    ],
    "Allocation": ["sensitivity", "choices", "pin"],
}

STAGES = ["CAPTURED", "CANONICAL", "FUSED", "ANNOTATED", "PREPARED", "CALIBRATED", "CONVERTED", "LOWERED"]


def found(path: str) -> Any:
    value: Any = qfx
    for part in path.split("."):
        value = getattr(value, part)
    return value


def test_names() -> None:
    assert sorted(qfx.__all__) == NAMES
    assert all(hasattr(qfx, name) for name in NAMES)


def test_signatures() -> None:
    assert {path: str(inspect.signature(found(path))) for path in SIGNATURES} == SIGNATURES


def test_every_public_function_is_in_the_snapshot() -> None:
    functions = {name for name in qfx.__all__ if inspect.isfunction(getattr(qfx, name))}
    assert functions == {path for path in SIGNATURES if "." not in path}


def test_fields_of_values() -> None:
    assert {name: [f.name for f in dataclasses.fields(found(name))] for name in FIELDS} == FIELDS


def test_values_are_frozen() -> None:
    assert all(found(name).__dataclass_params__.frozen for name in (*FIELDS, "Pipeline", "Report"))


def test_stages_in_order() -> None:
    assert [stage.name for stage in qfx.Stage] == STAGES


def test_everything_public_is_documented() -> None:
    documented = [found(path).__doc__ for path in SIGNATURES if "." not in path]
    assert all(documented)
    for name in qfx.__all__:
        value = getattr(qfx, name)
        if inspect.isclass(value):
            assert value.__doc__ and value.__doc__ != dict.__doc__, name


def test_presets() -> None:
    from qfx.recipe import PRESETS

    learned = ["w8a8_lsq", "w4a8_lsq", "w4a4_lsq", "w3a3_lsq", "w2a2_lsq"]
    assert list(PRESETS) == ["int8", "int8_dynamic", "w8a16", "w4a16", *learned, "tensorrt", "openvino", "xnnpack"]
    assert all(qfx.Recipe.preset(name) is PRESETS[name] for name in PRESETS)


def test_every_submodule_says_what_it_is() -> None:
    import importlib
    import pkgutil

    for package in ("qfx", "qfx.passes", "qfx.models", "qfx.targets"):
        module = importlib.import_module(package)
        for entry in pkgutil.iter_modules(module.__path__):
            name = f"{package}.{entry.name}"
            if not entry.ispkg:
                assert importlib.import_module(name).__doc__, f"{name} has no docstring"
