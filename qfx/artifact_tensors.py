"""The tensors of a graph as safetensors keeps them, with a table of what it does not say of them.

Tied tensors are stored once. Integers that are all equal, as the zero points of symmetric weights are, stand in the
table alone. Tensors whose elements lie in another order than their dimensions (channels-last ones) are stored in that
order, so that they come back with the same strides, mapped from the file. Scales that are float16 values throughout,
as those of a spec with that ``scale_dtype`` are, are stored as float16 and come back as the float32 that they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.attributes import get_tensor, tensors
from qfx.errors import ArtifactError
from qfx.graph_json import dotted
from qfx.graph_module import CapturedModule
from qfx.json_values import DTYPES, Keys, encode, fields, listed, short, typed
from qfx.ops import dequantize, quantize
from qfx.part import Part

MOST_FILLED = 2**20
"""Elements of all tensors together that stand in the table, beyond those that are stored."""

HALF = "float16"
"""The only dtype that a tensor of another, float32, may be stored as."""


@dataclass(frozen=True)
class StoredTensors:
    """``table``: a line for each path; ``stored``: contiguous tensors on the CPU, each in memory of its own."""

    table: dict[str, Any]
    stored: dict[str, Tensor]


def write_tensors(gm: CapturedModule) -> StoredTensors:
    """All parameters and buffers of the graph, by path in alphabetical order.

    Raises:
        ArtifactError: a path or dtype is none that a file may have.
    """
    table: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    scales = _scales(gm)
    for path, tensor in sorted(tensors(gm)):
        dotted(path, "a tensor")
        if (tied := first.setdefault(id(tensor), path)) != path:
            table[path] = {"of": tied}
            continue
        table[path] = _kind(gm, path, tensor)
        if _is_filled(tensor):
            table[path] |= {"fill": int(tensor.reshape(-1)[0]), "shape": list(tensor.shape)}
            continue
        order = _order(tensor)
        held = tensor.detach().permute(order)
        if id(tensor) in scales and _is_half(tensor):
            table[path]["stored"] = HALF
            held = held.half()
        if order != list(range(tensor.ndim)):
            table[path]["order"] = order
        own = held.is_contiguous() and held.untyped_storage().nbytes() == held.numel() * held.element_size()
        stored[path] = held if own else held.clone(memory_format=torch.contiguous_format)
    return StoredTensors(table, stored)


def _kind(gm: CapturedModule, path: str, tensor: Tensor) -> dict[str, Any]:
    owner, _, name = path.rpartition(".")
    kind: dict[str, Any] = {"dtype": encode(tensor.dtype)["dtype"]}
    if isinstance(tensor, nn.Parameter):
        kind["parameter"] = True
    elif name in gm.get_submodule(owner)._non_persistent_buffers_set:
        kind["persistent"] = False
    return kind


def _is_filled(tensor: Tensor) -> bool:
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    return integers and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def _scales(gm: CapturedModule) -> frozenset[int]:
    """The identities of all tensors by which the graph quantizes or dequantizes."""
    read = [n.args[1] for n in gm.graph.nodes if n.target in (quantize, dequantize)]
    return frozenset(id(get_tensor(gm, str(n.target))) for n in read if isinstance(n, fx.Node) and n.op == "get_attr")


def _is_half(scale: Tensor) -> bool:
    """Whether float16 holds all values; one scale alone is shorter than the words that would say so."""
    return scale.dtype is torch.float32 and scale.ndim > 0 and torch.equal(scale.half().float(), scale)


def _order(tensor: Tensor) -> list[int]:
    """The dimensions, those with wider steps first, where that makes the tensor contiguous; else as they are."""
    as_they_are = list(range(tensor.ndim))
    steps = tensor.stride()
    order = sorted(as_they_are, key=lambda d: -steps[d])
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else as_they_are


_OPTIONAL: Keys = {
    "parameter": (bool,),
    "persistent": (bool,),
    "order": (list,),
    "stored": (str,),
    "fill": (int,),
    "shape": (list,),
}


def read_tensors(table: Mapping[str, Any], stored: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds every tensor of the table at its path; what is stored is used as it is.

    Raises:
        ArtifactError: table and stored tensors do not fit, or a path is none.
    """
    root = nn.Module()
    filled = MOST_FILLED + sum(t.numel() for t in stored.values())
    used: set[str] = set()
    for path, line in table.items():
        typed(line, f"the tensor {short(path)}", dict)
    for path in sorted(table, key=lambda p: ("of" in table[p], p)):
        dotted(path, "a tensor")
        line = table[path]
        if "of" in line:
            source = fields(line, f"the tensor {path}", {"of": (str,)})["of"]
            if source not in table or "of" in table[source]:
                raise ArtifactError(f"{path} is the same as {short(source)}, which is no tensor of the file")
            _register(root, path, get_tensor(root, source), persistent=_persistent(table[source]))
            continue
        fields(line, f"the tensor {path}", {"dtype": (str,)}, _OPTIONAL)
        if "fill" in line:
            tensor = _filled(path, line, filled)
            filled -= tensor.numel()
        else:
            tensor = _stored(path, line, stored)
            used.add(path)
        held = nn.Parameter(tensor, requires_grad=False) if line.get("parameter") else tensor
        _register(root, path, held, persistent=_persistent(line))
    if unknown := sorted(stored.keys() - used):
        raise ArtifactError(f"the file holds a tensor {short(unknown[0])} that its table does not name")
    return root


def _persistent(line: Mapping[str, Any]) -> bool:
    return bool(line.get("persistent", True))


def _filled(path: str, line: Mapping[str, Any], most: int) -> Tensor:
    shape = listed(line.get("shape"), f"the shape of {path}", int, most=64)
    dtype = DTYPES.get(line["dtype"])
    if dtype is None or dtype.is_floating_point or dtype.is_complex or any(size < 0 for size in shape):
        raise ArtifactError(f"{path} cannot be filled with {short(line['dtype'])} of shape {short(shape)}")
    if math.prod(shape) > most:
        raise ArtifactError(f"{path} has {math.prod(shape)} elements, far more than the file")
    if not torch.iinfo(dtype).min <= line["fill"] <= torch.iinfo(dtype).max:
        raise ArtifactError(f"{path} cannot be filled with {line['fill']}, which is no {line['dtype']}")
    return torch.full(shape, line["fill"], dtype=dtype)


def _stored(path: str, line: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    if path not in stored:
        raise ArtifactError(f"the tensor {path} is missing from the file")
    tensor = stored[path]
    if (held := line.get("stored", line["dtype"])) != line["dtype"] and (held, line["dtype"]) != (HALF, "float32"):
        raise ArtifactError(f"{path} cannot be {short(line['dtype'])} that is stored as {short(held)}")
    if DTYPES.get(held) is not tensor.dtype:
        raise ArtifactError(f"{path} is {tensor.dtype}, not {held}")
    tensor = tensor.to(DTYPES[line["dtype"]])
    order = listed(line.get("order", list(range(tensor.ndim))), f"the order of {path}", int, most=64)
    if sorted(order) != list(range(tensor.ndim)):
        raise ArtifactError(f"{path} has an order that is none: {short(order)}")
    return tensor.permute([order.index(d) for d in range(tensor.ndim)])


def _register(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool) -> None:
    owner: Any = root
    *parents, name = path.split(".")
    try:
        if hasattr(CapturedModule, path.partition(".")[0]):
            raise KeyError("it is an attribute of every graph")
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, Part())
            owner = owner._modules[part]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(name, tensor)
        else:
            owner.register_buffer(name, tensor, persistent=persistent)
    except KeyError as error:
        raise ArtifactError(f"there cannot be a tensor at {path}: {error}") from None
