"""Options of torch's FX mode: those that qfx honours, and for each of the others an error that says the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qfx.errors import ConfigError
from qfx.recipe import QuantRule


@dataclass(frozen=True)
class Option:
    """A part of a custom config. ``name``: its attribute; ``key``: its key in a dict; ``hint``: where it is refused."""

    name: str
    key: str
    hint: str = ""


_SKIP_NAMES = Option("non_traceable_module_names", "non_traceable_module_name")
_SKIP_CLASSES = Option("non_traceable_module_classes", "non_traceable_module_class")
_STANDALONE = "quantize the child on its own with qfx.quantize, or give it a qconfig with set_module_name"
_OWN_PASS = "write a pass (qfx.register_pass), or leave the module float with set_object_type(cls, None)"
_EDGES = "inputs and results are float: quantize what comes before and behind together with the model"

PREPARE = (
    _SKIP_NAMES,
    _SKIP_CLASSES,
    Option("preserved_attributes", "preserved_attributes"),
    Option("standalone_module_names", "standalone_module_name", _STANDALONE),
    Option("standalone_module_classes", "standalone_module_class", _STANDALONE),
    Option("float_to_observed_mapping", "float_to_observed_custom_module_class", _OWN_PASS),
    Option("input_quantized_indexes", "input_quantized_idxs", _EDGES),
    Option("output_quantized_indexes", "output_quantized_idxs", _EDGES),
)
CONVERT = (
    Option("preserved_attributes", "preserved_attributes"),
    Option("observed_to_quantized_mapping", "observed_to_quantized_custom_module_class", _OWN_PASS),
)

HINTS = {
    "_equalization_config": "leave it out: a scale for every channel of a weight evens out its channels",
    "backend_config": "leave torch's own out: target= says what runs; patterns of your own are passes and targets "
    "(qfx.register_pass, qfx.register_target)",
    "qconfig_mapping": "give the whole mapping to prepare_fx: what shall stay float has the qconfig None there",
    "keep_original_weights": "keep the float model: prepare_fx and convert_fx leave it as it is",
    "_remove_qconfig": "leave it out: qfx puts no qconfig on modules; qfx.report(qmodel) tells what each layer got",
    "mapping": "leave it out: which kernels run is what target= says",
    "inplace": "take the model that is returned; qfx.quantize(..., inplace=True) gives up float weights layer by layer",
}


def refuse_given(**given: Any) -> None:
    """Refuse options that are not as usual.

    Raises:
        ConfigError: the first one that is neither None nor False; the text says the way out.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ConfigError(f"qfx has no counterpart of {name}", hint=HINTS[name])


def read_custom(config: Any, known: Iterable[Option], what: str) -> dict[str, Any]:
    """What a custom config, an object of torch's or a dict, asks for that qfx honours; by attribute.

    Raises:
        ConfigError: it asks for something else; the text names the option and says the way out.
    """
    options = {option.key if isinstance(config, Mapping) else option.name: option for option in known}
    asked = dict(config) if isinstance(config, Mapping) else vars(config) if config is not None else {}
    for name, value in asked.items():
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            more = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{what} has no option {name!r}{more}", hint=f"known are {', '.join(options)}")
        if value and options[name].hint:
            raise ConfigError(f"qfx has no counterpart of {what}.{name}", hint=options[name].hint)
    return {options[name].name: value for name, value in asked.items() if value}


def custom_skips(config: Any, model: nn.Module) -> tuple[QuantRule, ...]:
    """The rules of a prepare_custom_config: what torch could not trace stays float.

    Raises:
        ConfigError: as :func:`read_custom`, or a module that it names is not there.
    """
    what = "prepare_custom_config"
    asked = read_custom(config, PREPARE, what)
    why = f"{what} calls it non-traceable"
    names = asked.get(_SKIP_NAMES.name, ())
    require_modules(names, model, f"{what}.{_SKIP_NAMES.name}")
    return (
        *(QuantRule(None, layer=name, why=why, own=True) for name in names),
        *(QuantRule(None, module=kind.__name__, why=why, own=True) for kind in asked.get(_SKIP_CLASSES.name, ())),
    )


def require_modules(names: Iterable[str], model: nn.Module, what: str) -> None:
    """Refuse names of modules that the model does not have.

    Raises:
        ConfigError: the text lists the nearest names.
    """
    known = [path for path, _ in model.named_modules()] if isinstance(model, nn.Module) else []
    for name in names:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.3) or known[1:5]
            raise ConfigError(
                f"{what} names {name!r}, and the model has no such module",
                hint="the nearest names are " + ", ".join(map(repr, near)),
            )
