"""The names and signatures of ``torch.ao.quantization``'s FX mode, over qfx: ``import qfx.compat``.

Code that calls ``prepare_fx``, its own calibration loop and ``convert_fx`` runs with its imports changed. Mappings,
qconfigs and observers of torch are taken as they are; nothing of ``torch.ao`` is imported here. An option that qfx
cannot honour is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from qfx import api
from qfx.calibration import observe_weights, seeing_batches, settle
from qfx.capture import original
from qfx.compat_options import CONVERT, custom_skips, read_custom, refuse_given, require_modules
from qfx.errors import ConfigError
from qfx.fake_quant import FakeQuantize
from qfx.meta import add_notes
from qfx.qconfig_mapping import MappedRule, QConfigMapping, translate
from qfx.recipe import QuantRule, Recipe
from qfx.roundings import fake_quants
from qfx.shadow import undisturbed
from qfx.spec import PerTensor, QConfig
from qfx.stage import Stage, stage_of
from qfx.targets import Target
from qfx.trained_fake_quant import TrainedFakeQuantize

__all__ = [
    "QConfig",
    "QConfigMapping",
    "convert_fx",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "get_default_qat_qconfig",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "prepare_fx",
    "prepare_qat_fx",
    "quantize_dynamic",
    "quantize_qat",
]

# --- defaults ---------------------------------------------------------------------------------------------------------

_PER_CHANNEL = Recipe.int8().default
assert _PER_CHANNEL.weight is not None
_PER_TENSOR = QConfig(_PER_CHANNEL.activation, replace(_PER_CHANNEL.weight, granularity=PerTensor()))
_BACKENDS = {"x86": _PER_CHANNEL, "fbgemm": _PER_CHANNEL, "qnnpack": _PER_TENSOR, "onednn": _PER_CHANNEL}


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """Unsigned affine activations with histogram ranges, signed symmetric weights: per tensor for ``qnnpack``, else per
    channel. The backend decides nothing else: what runs is what ``target=`` says.

    Raises:
        ConfigError: there is no such backend or version.
    """
    return _default(backend, version, (0,))


def get_default_qat_qconfig(backend: str = "x86", version: int = 1) -> QConfig:
    """As :func:`get_default_qconfig`: in training, ranges of activations move by averages, weights have their extremes.

    Raises:
        ConfigError: there is no such backend or version.
    """
    return _default(backend, version, (0, 1))


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """A mapping with the global qconfig of :func:`get_default_qconfig`, which needs no exceptions."""
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """A mapping with the global qconfig of :func:`get_default_qat_qconfig`, which needs no exceptions."""
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def _default(backend: str, version: int, versions: tuple[int, ...]) -> QConfig:
    if backend not in _BACKENDS:
        raise ConfigError(f"there is no backend {backend!r}", hint="choose one of " + ", ".join(_BACKENDS))
    if version not in versions:
        raise ConfigError(f"there is no version {version!r} of it", hint=f"choose {' or '.join(map(str, versions))}")
    return _BACKENDS[backend]


# --- prepare and convert ----------------------------------------------------------------------------------------------


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: Any = None,
    _equalization_config: Any = None,
    backend_config: Any = None,
    *,
    target: str | Target = "auto",
    dynamic_shapes: Any = None,
) -> nn.Module:
    """Capture ``model``; the result computes what it computes, and observes every batch that it is called with.

    Args:
        model: a float model, which stays as it is.
        qconfig_mapping: a :class:`QConfigMapping`, torch's, or a dict; a name in it that the model does not have is an
            error.
        example_inputs: a tuple of positional arguments, a tensor, or a dict of keyword arguments.
        prepare_custom_config: torch's object or a dict. What is non-traceable stays float; attributes are preserved
            anyhow; other entries are errors.
        target, dynamic_shapes: as for :func:`qfx.quantize`.

    Raises:
        CaptureError, ConfigError, UnsupportedError: see :mod:`qfx.errors`; the model is unharmed.
    """
    refuse_given(_equalization_config=_equalization_config, backend_config=backend_config)
    recipe, notes = _recipe(model, qconfig_mapping, prepare_custom_config, training=False)
    prepared = api.prepare(model, example_inputs, recipe=recipe, target=target, dynamic_shapes=dynamic_shapes)
    for gm in api.graphs(prepared).values():
        add_notes(gm, "mapping", notes)
        observe_weights(gm)
    for module in seeing_batches(api.graphs(prepared).values()):
        module.collect(True)
    return prepared


def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: Any = None,
    backend_config: Any = None,
    *,
    target: str | Target = "auto",
    dynamic_shapes: Any = None,
) -> nn.Module:
    """As ``qfx.prepare(mode="qat")``: the result is in training mode and rounds from its first batch on.

    Arguments are those of :func:`prepare_fx`. Observers of torch's that do not round are an error here.

    Raises:
        CaptureError, ConfigError, UnsupportedError: see :mod:`qfx.errors`; the model is unharmed.
    """
    refuse_given(backend_config=backend_config)
    recipe, notes = _recipe(model, qconfig_mapping, prepare_custom_config, training=True)
    prepared = api.prepare(
        model, example_inputs, recipe=recipe, target=target, dynamic_shapes=dynamic_shapes, mode="qat"
    )
    for gm in api.graphs(prepared).values():
        add_notes(gm, "mapping", notes)
    return prepared


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: Any = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: Any = None,
    backend_config: Any = None,
    keep_original_weights: bool = False,
) -> nn.Module:
    """The integer model of a prepared one, which stays as it is and goes on observing.

    Raises:
        CalibrationError: no batch has reached one of its layers; the text names it.
        ConfigError: it was not prepared, is in training mode after ``prepare_qat_fx``, or an option has no counterpart.
    """
    refuse_given(
        _remove_qconfig=None if _remove_qconfig else "kept",
        qconfig_mapping=qconfig_mapping,
        backend_config=backend_config,
        keep_original_weights=keep_original_weights,
    )
    read_custom(convert_custom_config, CONVERT, "convert_custom_config")
    parts = list(api.graphs(original(graph_module)).values())
    with _paused(parts):
        for gm in parts:
            if stage_of(gm) in (Stage.PREPARED, Stage.CALIBRATED):
                _set_ranges(gm)
        return api.convert(graph_module)


def _set_ranges(gm: fx.GraphModule) -> None:
    """End a calibration that was a loop of the user's; a model in training needs nothing of the kind."""
    modules = seeing_batches([gm])
    if any(isinstance(m, TrainedFakeQuantize) for m in modules):
        return
    with undisturbed():
        observe_weights(gm)
        for module in modules:
            module.calculate()
        settle(gm)


@contextmanager
def _paused(parts: Iterable[fx.GraphModule]) -> Iterator[None]:
    """Post-training observers look away, and nothing is rounded, meanwhile."""
    modules = [m for gm in parts for _, m in fake_quants(gm) if not isinstance(m, TrainedFakeQuantize)]
    before = [(m, m.observing, m.quantizing) for m in dict.fromkeys(modules)]
    try:
        for module, *_ in before:
            module.observing = module.quantizing = False
        yield
    finally:
        for module, observing, quantizing in before:
            module.observing, module.quantizing = observing, quantizing


def _recipe(model: nn.Module, mapping: Any, custom: Any, *, training: bool) -> tuple[Recipe, list[str]]:
    """The recipe of a mapping for a model, all of whose names are the model's; and what its user should know."""
    skips = custom_skips(custom, model)
    found = translate(mapping, training=training)
    rules = tuple(_named(rule, model) for rule in found.recipe.rules)
    return replace(found.recipe, rules=(*skips, *rules)), list(found.notes)


def _named(rule: QuantRule, model: nn.Module) -> QuantRule:
    """The rule, which may match nothing where the module that it names is there: its operators may have been folded."""
    if rule.own or not isinstance(model, nn.Module):
        return rule
    if rule.layer is not None:
        require_modules([rule.layer], model, "module_name")
    if isinstance(rule, MappedRule):
        if rule.parent is not None:
            require_modules([rule.parent], model, "module_name_object_type_order")
            return rule
        if rule.regex is not None and not any(re.match(rule.regex, path) for path, _ in model.named_modules()):
            raise ConfigError(
                f"module_name_regex {rule.regex!r} matches no module of the model",
                hint="it has to match from the beginning of a path such as those of model.named_modules()",
            )
    return replace(rule, own=True)


# --- the eager functions ----------------------------------------------------------------------------------------------

_DYNAMIC = Recipe.int8_dynamic().default
_DYNAMIC_TYPES = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)
_EXAMPLE = "qfx captures the model by running it: add example_inputs=(x,)"


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Any = None,
    dtype: torch.dtype = torch.int8,
    mapping: Any = None,
    inplace: bool = False,
    *,
    example_inputs: Any = None,
    target: str | Target = "auto",
) -> nn.Module:
    """Linear layers with int8 weights per channel and activations quantized per token at run time; others stay float.

    Args:
        qconfig_spec: classes and names of modules, as a set or as a dict with their qconfigs; None: all linear layers.
        dtype: int8 or qint8, for those without a qconfig.
        example_inputs: as for :func:`prepare_fx`; needed.

    Raises:
        CaptureError, ConfigError, UnsupportedError: see :mod:`qfx.errors`; the model is unharmed.
    """
    refuse_given(mapping=mapping, inplace=inplace)
    if example_inputs is None:
        raise ConfigError("quantize_dynamic has no example_inputs", hint=_EXAMPLE)
    spec = qconfig_spec if qconfig_spec is not None else _DYNAMIC_TYPES
    if not isinstance(spec, Mapping) and str(dtype) not in ("torch.int8", "torch.qint8"):
        raise ConfigError(
            f"dtype={dtype} has no counterpart",
            hint="write torch.int8; for tables of embeddings Recipe.with_embedding_storage(8 or 4); for halves "
            "model.half() or model.bfloat16()",
        )
    asked = QConfigMapping()
    for what in spec:
        qconfig = spec[what] if isinstance(spec, Mapping) else _DYNAMIC
        if what == "":
            asked.set_global(qconfig)
        elif isinstance(what, str):
            asked.set_module_name(what, qconfig)
        else:
            asked.set_object_type(what, qconfig)
    recipe, _ = _recipe(model, asked, None, training=False)
    return api.quantize(model, example_inputs, recipe=recipe, target=target, verbose=False)


def quantize_qat(
    model: nn.Module,
    run_fn: Callable[..., object],
    run_args: Iterable[Any],
    inplace: bool = False,
    *,
    example_inputs: Any = None,
    qconfig_mapping: Any = None,
    target: str | Target = "auto",
) -> nn.Module:
    """Prepare ``model``, train it by ``run_fn(prepared, *run_args)``, and convert it.

    Args:
        example_inputs: as for :func:`prepare_fx`; needed.
        qconfig_mapping: None: the ``qconfig`` attributes of the model and of its modules; the default where there are
            none.

    Raises:
        CaptureError, ConfigError, CalibrationError, UnsupportedError, VerifyError: see :mod:`qfx.errors`.
    """
    refuse_given(inplace=inplace)
    if example_inputs is None:
        raise ConfigError("quantize_qat has no example_inputs", hint=_EXAMPLE)
    prepared = prepare_qat_fx(
        model, _of_attributes(model) if qconfig_mapping is None else qconfig_mapping, example_inputs, target=target
    )
    run_fn(prepared, *run_args)
    return convert_fx(prepared.eval())


def _of_attributes(model: nn.Module) -> QConfigMapping:
    found = {path: module.qconfig for path, module in model.named_modules() if hasattr(module, "qconfig")}
    if not found:
        return get_default_qat_qconfig_mapping()
    mapping = QConfigMapping().set_global(found.pop("", None))
    mapping.module_name_qconfigs.update(found)
    return mapping


# --- switches, for prepared.apply(...) --------------------------------------------------------------------------------


def disable_observer(mod: nn.Module) -> None:
    """Ranges stay as they are."""
    if isinstance(mod, FakeQuantize):
        mod.observing = False


def enable_observer(mod: nn.Module) -> None:
    """Ranges follow the data again."""
    if isinstance(mod, FakeQuantize):
        mod.observing = True


def disable_fake_quant(mod: nn.Module) -> None:
    """Nothing is rounded."""
    if isinstance(mod, FakeQuantize):
        mod.quantizing = False


def enable_fake_quant(mod: nn.Module) -> None:
    """Values are rounded again; after :func:`prepare_fx`, with the range of what was observed so far.

    Raises:
        CalibrationError: nothing was; the text names the layer.
    """
    if isinstance(mod, FakeQuantize):
        if not isinstance(mod, TrainedFakeQuantize):
            mod.calculate()
        mod.quantizing = True
