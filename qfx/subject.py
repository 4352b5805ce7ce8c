"""What is captured: the user's model, its stand-in, and one call of it, bound to the model's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfx.calling import CallForm, Parameter, bind, parameters_of
from qfx.errors import CaptureError
from qfx.examples import Example
from qfx.shapes import Freedom, batch_freedom, explicit, no_freedom, token_freedom
from qfx.structure import Constant, Container, Leaf, flatten, opaque, paths, rebuild


@dataclass(frozen=True)
class Subject:
    """What is captured: the user's model, its stand-in, and one call of it."""

    model: nn.Module
    shadow: nn.Module
    parameters: tuple[Parameter, ...]
    form: CallForm
    structure: Container
    tensors: tuple[Tensor, ...]
    path: str = ""
    flags: Mapping[nn.Module, bool] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        shadow: nn.Module,
        example: Example,
        path: str = "",
        flags: Mapping[nn.Module, bool] | None = None,
    ) -> Subject:
        """Bind the example to the model's signature; ``path`` is where a child stands in the user's whole model.

        ``flags`` says which modules of the stand-in train; None where the model is captured as it is in eval mode.

        Raises:
            CaptureError: wrong arity, or a tensor without values.
        """
        parameters = parameters_of(model)
        bound = bind(type(model).__name__, parameters, example.args, example.kwargs)
        leaves, structure = flatten(bound)
        assert isinstance(structure, Container)
        for at, part in arguments(structure):
            if isinstance(part, Leaf) and (not isinstance(leaves[part.index], Tensor) or _is_empty(leaves[part.index])):
                raise CaptureError(f"example input {at} has no values", hint="give an ordinary tensor")
        for name, child in zip(structure.keys, structure.children, strict=True):
            if found := opaque(child, str(name)):
                _refuse_default(parameters, *found)
        if not leaves:
            raise CaptureError("example_inputs holds no tensor", hint="give at least one tensor")
        form = CallForm.of(example.args, example.kwargs)
        return cls(model, shadow, parameters, form, structure, _distinct(leaves), path, flags)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def training(self) -> bool:
        return self.flags is not None

    def ladder(self, dynamic_shapes: Any = None) -> tuple[Freedom, ...]:
        """Which sizes to leave free, from the most to the least; only what the user asked for, where something is."""
        if dynamic_shapes is not None:
            return (explicit(self.parameters, self.structure, dynamic_shapes, self.tensors),)
        steps = (token_freedom(self.tensors), batch_freedom(self.tensors), no_freedom(self.tensors))
        return tuple(step for i, step in enumerate(steps) if step not in steps[:i])

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call the stand-in; it gets copies of the tensors, for it may write to them."""
        args, kwargs = self.form.call(self.parameters, rebuild(self.structure, [t.clone() for t in tensors]))
        state = torch.get_rng_state()
        try:
            return self.shadow(*args, **kwargs)
        finally:
            torch.set_rng_state(state)


def arguments(structure: Container) -> list[tuple[str, Leaf | Constant]]:
    """The leaves and constants of bound parameters with the path that the user knows: ``x``, ``batch['image']``."""
    return [
        found
        for name, child in zip(structure.keys, structure.children, strict=True)
        for found in paths(child, str(name))
    ]


def _refuse_default(parameters: Sequence[Parameter], at: str, value: Any) -> None:
    """An object as argument is refused, unless it is merely the parameter's default."""
    if not any(p.name == at and p.has_default and p.default is value for p in parameters):
        raise CaptureError(
            f"argument {at} is a {type(value).__name__}, which a graph cannot take",
            hint="give tensors, numbers, strings, None, or containers and dataclasses of them",
        )


def _distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of tensors that come twice, which ``torch.export`` would take for one, and of those of inference mode."""
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return tuple(t if first[id(t)] == i and not t.is_inference() else t.clone() for i, t in enumerate(tensors))


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"
