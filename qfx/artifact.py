"""Quantized models as files: :func:`save` and :func:`load`.

A file holds the CONVERTED graph (:func:`qfx.portable.portable`), which depends on no machine: its tensors, and as JSON
its nodes, how it is called, the recipe and the report. Loading lowers it for the machine at hand, needs neither the
model's class nor its data, and runs nothing that the file brings along: operators come from a closed list, names are
held to be names, and all of it is run without data before anything is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qfx import artifact_file, recipe_file
from qfx.artifact_tensors import read_tensors, write_tensors
from qfx.attributes import tensors as tensors_of
from qfx.calling import codegen_of
from qfx.dry_run import dry_run
from qfx.errors import ArtifactError, ConfigError, QfxError, VerifyError
from qfx.graph_json import check_result, identifier, read_call, read_nodes, write_call, write_nodes
from qfx.graph_module import CapturedModule
from qfx.json_values import Keys, decode, dumps, encode, fields, loads
from qfx.lowered import lower_beside
from qfx.meta import graph_info, set_value, update_graph
from qfx.node_table import Report, build_report, keep_report, kept_report, tensor_bytes
from qfx.passes import lowering
from qfx.pipeline import Pipeline
from qfx.portable import portable, twin_of
from qfx.recipe import Recipe
from qfx.report_json import read_report, write_report
from qfx.stage import Stage
from qfx.targets import Target, choose
from qfx.verify import verify


def save(qmodel: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to one safetensors file, which :func:`load` reads on any machine.

    The same model gives the same bytes. A file that is there is replaced whole, or stays as it was.

    Raises:
        ArtifactError: the model was not quantized as a whole, its integers were changed since, or it holds what no file
            can say, such as an operator of a plug-in; the text names the layer and the way out.
        OSError: the file cannot be written.
    """
    report = _report_of(qmodel)
    gm = _own_copy(portable(qmodel))
    document, tensors = _document(gm, report), write_tensors(gm)
    document["tensors"] = tensors.table
    again = _build(loads(dumps(document)), tensors.stored)
    _require_same(qmodel, report, again)
    artifact_file.write(path, document, tensors.stored)


def load(
    path: str | os.PathLike[str], *, target: str | Target = "auto", device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of a file that :func:`save` wrote, lowered for this machine; it is what ``quantize`` returned.

    On the same target it gives the same numbers, bit for bit. Tensors stay mapped from the file, which must not be
    changed in place as long as the model lives (to replace it is safe): what a kernel packs anew takes memory of its
    own. Results of a class come back as one where its module is imported already, else as a dict or tuple.

    Args:
        target: as for :func:`qfx.quantize`.
        device: where the model shall be.

    Raises:
        ArtifactError: the file is damaged, none of qfx's, of a newer version, or asks for what no saved model does.
        ConfigError: there is no such target or device here.
        OSError: the file cannot be read.
    """
    place = _device(device)
    chosen = choose(target, place.type)
    with _in_file(path), artifact_file.opened(path) as (document, file):
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        gm = _build(document, stored)
        if place.type != "cpu":
            gm.to(place)
        return _lower(gm, chosen)


# --- saving -----------------------------------------------------------------------------------------------------------


def _report_of(qmodel: nn.Module) -> Report:
    found = kept_report(qmodel)
    if found is None:
        raise ArtifactError(f"{type(qmodel).__name__} is no quantized model", hint="pass what qfx.quantize returned")
    if found.float_parts:
        raise ArtifactError(
            f"{found.model} is not one graph, and its own Python code cannot be saved: {found.float_parts[0]}",
            hint="change the line that stops capture, or save the children that were quantized one by one",
        )
    return found


def _own_copy(gm: CapturedModule) -> CapturedModule:
    """A copy on the CPU, which shares the tensors that are there already."""
    on_cpu = all(t.is_cpu for t in (*gm.parameters(), *gm.buffers()))
    return twin_of(gm) if on_cpu else copy.deepcopy(gm).cpu()


def _document(gm: CapturedModule, report: Report) -> dict[str, Any]:
    from qfx import __version__

    known = graph_info(gm)
    of_graph = kept_report(gm) or report
    return {
        "made_by": {"qfx": __version__, "torch": torch.__version__},
        "recipe": _write_recipe(known.asked),
        "call": write_call(codegen_of(gm)),
        "nodes": write_nodes(gm.graph),
        "attributes": _write_attributes(gm),
        "report": write_report(dataclasses.replace(of_graph, notes=known.notes)),
    }


def _write_recipe(recipe: Recipe | None) -> str | None:
    """The recipe as TOML; None where it holds what no text says, such as an observer of the user's."""
    try:
        return None if recipe is None else recipe_file.to_toml(recipe)
    except ConfigError:
        return None


def _write_attributes(gm: CapturedModule) -> dict[str, Any]:
    """Plain attributes of the user's model, such as ``num_labels``; what no file can say is left behind."""
    found: dict[str, Any] = {}
    for name, value in gm.__dict__.items():
        if not name.startswith("_") and name not in _OWN_ATTRIBUTES:
            try:
                found[identifier(name, "an attribute")] = encode(value)
            except ArtifactError:
                continue
    return dict(sorted(found.items()))


_OWN_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"meta", "shape_env"}


def _require_same(qmodel: nn.Module, report: Report, again: CapturedModule) -> None:
    """Raise where the file would not give ``qmodel`` back: its tensors are not those that lowering makes."""
    if report.target and portable(qmodel) is not qmodel:
        try:
            target = choose(report.target)
        except ConfigError as error:
            raise ArtifactError(
                f"the model was lowered for {report.target!r}, and cannot be compared here: {error.what}",
                hint="register the target (qfx.register_target) before you save",
            ) from None
        again = _lower(again, target)
    want, found = dict(tensors_of(qmodel)), dict(tensors_of(again))
    changed = [p for p in sorted({*want, *found}) if p not in want or p not in found or not _equal(want[p], found[p])]
    if changed:
        raise ArtifactError(
            f"{changed[0]} is not what the quantized graph gives: it was changed since, by load_state_dict or a pass",
            where=changed[0].rpartition(".")[0],
            hint="quantize the model whose weights you want, and save what that returns",
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return x.data_ptr() == y.data_ptr() or torch.equal(x, y)


# --- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _in_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of what a file says name the file."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(error.what, where=error.where, source=os.fspath(path), hint=error.hint) from error


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {device!r} here: {error}", hint="choose 'cpu'") from error


_DOCUMENT: Keys = {
    "made_by": (dict,),
    "recipe": (str, type(None)),
    "call": (dict,),
    "nodes": (list,),
    "attributes": (dict,),
    "report": (dict,),
    "tensors": (dict,),
}


def _build(document: Any, stored: Mapping[str, Tensor]) -> CapturedModule:
    """The CONVERTED graph of a document, checked.

    Raises:
        ArtifactError: it is not one that :func:`save` writes.
    """
    table = fields(document, "the document", _DOCUMENT)
    root = read_tensors(table["tensors"], stored)
    graph = read_nodes(table["nodes"])
    graph.set_codegen(read_call(table["call"]))
    report = read_report(table["report"])
    name = identifier(report.model, "a model")
    if {str(n.target) for n in graph.nodes if n.op == "get_attr"} != set(table["tensors"]):
        raise ArtifactError("the graph reads other tensors than there are")
    try:
        gm = CapturedModule.of(root, graph, name)
    except (RuntimeError, AttributeError, TypeError, SyntaxError, ValueError) as error:
        raise ArtifactError(f"the graph is none: {error}") from error
    check_result(codegen_of(gm).result, dry_run(gm))
    recipe = _read_recipe(table["recipe"])
    update_graph(gm, recipe=report.recipe, asked=recipe, stage=Stage.CONVERTED.name, notes=report.notes)
    try:
        verify(gm, Stage.CONVERTED)
    except (VerifyError, RuntimeError) as error:
        raise ArtifactError(f"the graph is not what a saved one is: {error}") from error
    _set_attributes(gm, table["attributes"])
    keep_report(gm, report)
    return gm.eval()


def _read_recipe(text: str | None) -> Recipe | None:
    try:
        return None if text is None else recipe_file.from_toml(text)
    except (ConfigError, RecursionError) as error:
        raise ArtifactError(f"its recipe cannot be read: {error}") from error


def _set_attributes(gm: CapturedModule, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if hasattr(gm, identifier(name, "an attribute")):
            raise ArtifactError(f"an attribute cannot be called {name!r}")
        setattr(gm, name, decode(value, name))


def _notes_here(notes: tuple[tuple[str, str], ...], target: Target) -> tuple[tuple[str, str], ...]:
    """The notes with what is to be said of ``target`` on this machine in place of what was said of another."""
    slow = target.slow()
    here = [("target", slow)] if slow else []
    place = next((i for i, (topic, _) in enumerate(notes) if topic == "target"), len(notes))
    return (*notes[:place], *here, *(note for note in notes[place:] if note[0] != "target"))


def _lower(gm: CapturedModule, target: Target) -> CapturedModule:
    """Lower a graph that :func:`_build` made, in place, with its report.

    Raises:
        ArtifactError: it cannot be lowered.
    """
    known = kept_report(gm)
    assert known is not None
    update_graph(gm, target=target.name, notes=_notes_here(known.notes, target))
    try:
        lower_beside(gm, Pipeline(lowering(target)), known.model)
    except (QfxError, RecursionError) as error:
        raise ArtifactError(f"the graph cannot be lowered for {target.name}: {error}") from error
    made = build_report(
        known.model,
        known.rows,
        gm,
        {row.name: row.sqnr_db for row in known.rows if row.sqnr_db is not None},
        nodes_before=known.nodes_before,
        share_groups=known.share_groups,
        weight_bytes_before=known.weight_bytes_before,
    )
    kept = {name: getattr(known, name) for name in ("output_sqnr_db", "agreement", "calibration")}
    made = dataclasses.replace(made, **kept)
    keep_report(gm, dataclasses.replace(made, weight_bytes_after=tensor_bytes(gm)))
    for node in (*gm.graph.nodes, *portable(gm).graph.nodes):
        set_value(node, None)
    return gm
