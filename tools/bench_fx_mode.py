"""The peer: torch's own FX graph mode quantization, deprecated, and still torch's fastest int8 in eager mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qfx.tools.bench_calls import call, tensors
from qfx.tools.bench_figures import Skip


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run with torch's quantized engine ``name`` (``onednn``, ``x86``); it is global state and comes back afterwards.

    Raises:
        Skip: this torch has no such engine.
    """
    known = torch.backends.quantized.supported_engines
    if name not in known:
        raise Skip(f"this torch has no quantized engine {name!r}, only {', '.join(known)}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def quantize_fx(model: nn.Module, batches: Iterable[Any], engine_name: str) -> nn.Module:
    """A W8A8 copy of ``model`` by FX mode, with the engine's default configuration.

    ``batches`` calibrate it, each a tensor, a tuple, or a dict of keywords in the order of the arguments. It is to be
    run inside :func:`engine` of the same name.

    Raises:
        Skip: this torch has no FX mode any more, or lacks the engine.
    """
    try:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    except ImportError as error:
        raise Skip(f"this torch has no FX mode: {error}") from error

    data = list(batches)
    with engine(engine_name), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it announces its removal with every call
        mapping = get_default_qconfig_mapping(engine_name)
        prepared = prepare_fx(copy.deepcopy(model).eval(), mapping, tensors(data[0]))
        for batch in data:
            call(prepared, batch)
        quantized: nn.Module = convert_fx(prepared)
    return quantized
