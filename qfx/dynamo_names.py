"""From dynamo's names to the user's: ``L['self']._modules['fc']._parameters['weight']`` is ``fc.weight`` of the model.

Dynamo names what a frame of Python finds. The frame may be that of a child, or of the rest of a function behind a graph
break; the tensors themselves tell where it stands in the model that was compiled.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from qfx.capture import original

_STEP = re.compile(r"\[['\"]?(?P<key>[^'\"\]]+)['\"]?\]|\.(?P<name>\w+)")
_TABLES = ("_modules", "_parameters", "_buffers")


def source_name(node: fx.Node) -> str:
    """How dynamo finds the input; to be asked while it compiles."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)  # a method in older releases


def in_a_module(node: fx.Node) -> bool:
    """Whether the tensor belongs to a module, as a parameter, buffer or plain attribute, and not to the call."""
    found = getattr(getattr(node.meta.get("grapharg"), "source", None), "guard_source", None)
    found = found() if callable(found) else found
    return "NN_MODULE" in getattr(found, "name", "")


def place_of(source: str) -> tuple[str, str]:
    """``L['self']._modules['fc']._parameters['weight']`` → ``L['self']``, ``fc.weight``."""
    steps = list(_STEP.finditer(source))
    root = source[: steps[0].end()] if steps else source
    names = [step["key"] or step["name"] for step in steps[1:]]
    return root, ".".join(name.replace(".", "_") for name in names if name not in _TABLES)


def compiled_model() -> nn.Module | None:
    """The module that ``torch.compile`` or ``Module.compile`` was given and that is running; None for a function."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            module = frame.f_locals["self"]
            if original(module) is not module or module._compiled_call_impl is not None:
                return original(module)
        frame = frame.f_back  # type: ignore[assignment]
    return None


@dataclass(frozen=True)
class Names:
    """The places of dynamo's roots in the user's model: what to put before the paths below each."""

    prefixes: dict[str, str]
    known: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, places: Sequence[tuple[str, str]], tensors: Sequence[Tensor], model: nn.Module | None) -> Names:
        """Found by the tensors at ``places``, where they are the model's; else several roots bear their own names."""
        known = _names(model)
        roots = list(dict.fromkeys(root for root, _ in places))
        prefixes = {root: _identifier(root) if len(roots) > 1 else "" for root in roots}
        for (root, path), tensor in reversed(list(zip(places, tensors, strict=True))):
            for full in known.get(id(tensor), ()):
                if f".{full}".endswith(f".{path}" if path else ""):
                    prefixes[root] = full.removesuffix(path).removesuffix(".")
        return cls(prefixes, known)

    def tensor(self, root: str, path: str) -> str:
        """The name of a tensor; of one that a variable of the user's holds, that of the variable."""
        return self._full(root, path) or _identifier(root)

    def layer(self, source: str) -> str:
        """The path of a module."""
        return self._full(*place_of(source))

    def _full(self, root: str, path: str) -> str:
        return ".".join(part for part in (self.prefixes.get(root, ""), path) if part)

    @property
    def home(self) -> str:
        """Where the graph stands as a whole."""
        return next(iter(self.prefixes.values())) if len(self.prefixes) == 1 else ""

    def tied(self, tensors: Sequence[Tensor], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Further names of tied parameters; dynamo knows one of each."""
        for tensor in tensors:
            yield from ((other, tensor) for other in self.known.get(id(tensor), ()) if other not in names)


def _names(model: nn.Module | None) -> dict[int, list[str]]:
    """All names of every parameter and buffer, by identity."""
    found: dict[int, list[str]] = {}
    if model is not None:
        named: Iterable[tuple[str, Any]] = (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            found.setdefault(id(tensor), []).append(name)
    return found


def _identifier(root: str) -> str:
    """``G['model']`` → ``model``."""
    return re.sub(r"\W+", "_", root.partition("[")[2]).strip("_")
