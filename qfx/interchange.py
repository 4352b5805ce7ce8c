"""A CONVERTED graph as other programs take it: a copy of its own, with example inputs, free sizes and the user's names.

What is exported is always the portable form, whatever target the model was lowered to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from qfx.attempt import short
from qfx.calling import TensorSpec, codegen_of
from qfx.errors import UnsupportedError
from qfx.example_values import restore_values
from qfx.graph_module import CapturedModule
from qfx.meta import value
from qfx.portable import portable, twin_of
from qfx.structure import Constant, Leaf, paths, rebuild

BATCH, SIZE = 2, 64
"""Example sizes of the first and of every other free dimension, where capture's own are lost: 0 and 1 are special."""


def own_copy(qmodel: nn.Module) -> CapturedModule:
    """A copy of the model's CONVERTED graph, to be changed: on the CPU, where it shares the model's tensors.

    Raises:
        ConfigError: it is no graph that qfx converted.
    """
    gm = portable(qmodel)
    on_cpu = all(t.is_cpu for t in (*gm.parameters(), *gm.buffers()))
    twin = twin_of(gm) if on_cpu else copy.deepcopy(gm).cpu()
    restore_values(twin, example_tensors(twin))
    return twin


# --- what it is called with -------------------------------------------------------------------------------------------


def example_tensors(gm: CapturedModule) -> tuple[Tensor, ...]:
    """Zeros of a size that the graph takes, in the order of its placeholders."""
    specs = codegen_of(gm).binder.tensors
    values = [value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    known: dict[int | str, int] = {
        text: int(size.node.hint)
        for spec, val in zip(specs, values, strict=True)
        for text, size in zip(spec.sizes, cast(Any, val).shape if isinstance(val, Tensor) else (), strict=False)
        if isinstance(size, torch.SymInt)
    }
    sizes = known or _invented(specs, codegen_of(gm).binder.limits)
    return tuple(torch.zeros([sizes[s] if isinstance(s, str) else s for s in t.sizes], dtype=t.dtype) for t in specs)


def _invented(specs: Sequence[TensorSpec], limits: Mapping[str, int]) -> dict[int | str, int]:
    """A size for every free dimension; one may be an expression of another, as ``2*s0``."""
    import sympy  # type: ignore[import-untyped]

    leading = {spec.sizes[0] for spec in specs if spec.sizes}
    texts = dict.fromkeys(s for spec in specs for s in spec.sizes if isinstance(s, str))
    symbols = {str(s): s for text in texts for s in sympy.sympify(text).free_symbols}
    chosen = {s: min(BATCH if name in leading else SIZE, limits.get(name, SIZE)) for name, s in symbols.items()}
    return {text: int(sympy.sympify(text).subs(chosen)) for text in texts}


def free_dimensions(gm: CapturedModule) -> tuple[dict[int, Any], ...]:
    """For every placeholder its free dimensions, as ``torch.export`` takes them: an error where one became fixed."""
    return tuple(
        {dim: Dim.DYNAMIC for dim, size in enumerate(spec.sizes) if isinstance(size, str)}
        for spec in codegen_of(gm).binder.tensors
    )


def input_names(gm: CapturedModule) -> tuple[str, ...]:
    """The user's names of the inputs: ``x``, ``input_ids``, ``batch_image`` for ``batch['image']``."""
    return tuple(_identifier(spec.path) for spec in codegen_of(gm).binder.tensors)


def output_names(gm: CapturedModule) -> tuple[str, ...]:
    """A name for every tensor of the result, by its keys: ``logits``; ``output`` or ``output_0`` where it has none."""
    taken = set(input_names(gm))
    found: dict[int, str] = {}
    for path, part in paths(codegen_of(gm).result):
        if not isinstance(part, Leaf) or part.index in found:
            continue
        name = _identifier(path)
        name = f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name
        while name in taken:
            name += "_output"
        taken.add(name)
        found[part.index] = name
    return tuple(found[i] for i in sorted(found))


def _identifier(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_")


# --- exporting --------------------------------------------------------------------------------------------------------


def export_flat(gm: CapturedModule) -> ExportedProgram:
    """``torch.export`` of the graph with flat tensors in and out; ``gm`` is used up.

    Raises:
        UnsupportedError: torch cannot, or would fix a size that is free in the graph.
    """
    inputs, free = example_tensors(gm), free_dimensions(gm)
    gm.graph.set_codegen(fx.graph.CodeGen())
    return _export(fx.GraphModule(gm, gm.graph, type(gm).__name__), inputs, {}, inputs, free)


def export_called(gm: CapturedModule) -> ExportedProgram:
    """``torch.export`` of the graph as it is called: like the user's model.

    Raises:
        UnsupportedError: torch cannot, or would fix a size that is free in the graph.
    """
    tensors, binder = example_tensors(gm), codegen_of(gm).binder
    bound = rebuild(binder.structure, tensors)
    by_default = {
        name: isinstance(part, Constant)
        for name, part in zip(binder.structure.keys, binder.structure.children, strict=True)
    }
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    skipped = False
    for p in binder.parameters:
        if p.kind == "VAR_POSITIONAL":
            args += bound[p.name]
        elif p.kind == "VAR_KEYWORD":
            kwargs |= bound[p.name]
        elif p.has_default and by_default[p.name]:
            skipped = True
        elif p.kind == "KEYWORD_ONLY" or skipped:
            kwargs[p.name] = bound[p.name]
        else:
            args.append(bound[p.name])
    gm.recompile()
    return _export(gm, tuple(args), kwargs, tensors, free_dimensions(gm))


def _export(
    gm: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: Sequence[Tensor],
    free: Sequence[dict[int, Any]],
) -> ExportedProgram:
    shapes = ShapesCollection()
    for tensor, dimensions in zip(tensors, free, strict=True):
        if dimensions:
            shapes[tensor] = dimensions
    try:
        with torch.no_grad():
            return torch.export.export(gm, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(gm, args, kwargs))
    except Exception as error:
        raise UnsupportedError(
            f"torch.export cannot take the quantized graph: {short(error)}",
            hint="torch.export.export(qmodel, ...) with fixed sizes shows torch's own account",
        ) from error
