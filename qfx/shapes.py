"""Which sizes of a model's inputs shall stay free: one dict ``{dimension: torch.export.Dim.AUTO | …}`` per tensor."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim

from qfx.calling import Parameter
from qfx.errors import ConfigError
from qfx.structure import Constant, Container, Leaf, Structure

Freedom = tuple[dict[int, Any], ...]


def batch_freedom(tensors: Sequence[Tensor]) -> Freedom:
    """Dimension 0 of every tensor."""
    return tuple({0: Dim.AUTO} if t.dim() else {} for t in tensors)


def token_freedom(tensors: Sequence[Tensor]) -> Freedom:
    """Dimension 0 of every tensor, all dimensions of integer and boolean tensors."""
    return tuple(
        dict.fromkeys(range(t.dim()), Dim.AUTO) if _is_discrete(t) else batch
        for t, batch in zip(tensors, batch_freedom(tensors), strict=True)
    )


def no_freedom(tensors: Sequence[Tensor]) -> Freedom:
    return tuple({} for _ in tensors)


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def explicit(parameters: Sequence[Parameter], structure: Container, spec: Any, tensors: Sequence[Tensor]) -> Freedom:
    """``dynamic_shapes`` as ``torch.export.export`` takes it, per tensor.

    A mapping goes by parameter name, a tuple or list by the order of the parameters. Parameters that it does not
    mention keep the default (:func:`token_freedom`).

    Raises:
        ConfigError: an unknown name, or a specification of another structure than the example.
    """
    names = [p.name for p in parameters]
    if not isinstance(spec, Mapping):
        spec = dict(zip(names, _sequence(spec, "dynamic_shapes"), strict=False))
    spec = _gathered(spec, structure, parameters)
    for name in spec:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            raise ConfigError(
                f"dynamic_shapes names {name!r}, which is no argument of the model",
                hint=f"did you mean {near[0]!r}?" if near else "its arguments are " + ", ".join(names),
            )
    found = list(token_freedom(tensors))
    for name, child in zip(structure.keys, structure.children, strict=True):
        if name in spec:
            _spread(child, spec[name], str(name), found)
    return tuple(found)


def _gathered(spec: Mapping[str, Any], structure: Container, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """Names that ``**kwargs`` took, under its own name."""
    gathered = dict(spec)
    for p in parameters:
        if p.kind == "VAR_KEYWORD" and p.name not in gathered:
            held = structure.children[structure.keys.index(p.name)]
            keys = [k for k in held.keys if k in gathered] if isinstance(held, Container) else []
            if keys:
                gathered[p.name] = {k: gathered.pop(k) for k in keys}
    return gathered


def _spread(structure: Structure, spec: Any, at: str, found: list[dict[int, Any]]) -> None:
    if isinstance(structure, Leaf):
        found[structure.index] = _dimensions(spec, at)
    elif isinstance(structure, Container):
        if spec is None:
            specs: Mapping[Any, Any] = {}
        elif isinstance(spec, Mapping):
            specs = spec
        else:
            specs = dict(zip(structure.keys, _sequence(spec, at), strict=False))
        for key, child in zip(structure.keys, structure.children, strict=True):
            _spread(child, specs.get(key), f"{at}[{key!r}]", found)
    elif isinstance(structure, Constant) and spec is not None:
        raise ConfigError(f"dynamic_shapes gives sizes for {at}, which is no tensor but {structure.value!r}")


def _dimensions(spec: Any, at: str) -> dict[int, Any]:
    if spec is None:
        return {}
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(_sequence(spec, at))
    return {int(dim): size for dim, size in pairs if size is not None and size is not Dim.STATIC}


def _sequence(spec: Any, at: str) -> Sequence[Any]:
    if not isinstance(spec, (tuple, list)):
        raise ConfigError(f"dynamic_shapes for {at} is a {type(spec).__name__}", hint="give a dict, a tuple or None")
    return spec
