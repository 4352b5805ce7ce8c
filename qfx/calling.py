"""How a captured graph is called: exactly like the user's model.

A captured graph takes its tensors flat and returns them flat. :class:`CallBinder` turns a call by the user's signature
into that. :class:`CallCodeGen` puts it at the head of the graph's generated ``forward``, and at its end what gives the
results the user's structure. Not forward hooks: ``torch.export`` runs a GraphModule by ``fx.Interpreter``, which skips
hooks but asks the code generator. All is ordinary Python over sizes and dtypes, which ``torch.compile(fullgraph=True)``
traces through, and values of top-level classes, which copy and pickle.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, PythonCode, _format_target

from qfx.errors import CaptureError
from qfx.structure import Constant, Container, Leaf, Structure, flatten, kind_of, parts, rebuild, step


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's ``forward``; ``kind`` is the name of one of ``inspect``'s kinds."""

    name: str
    kind: str
    has_default: bool = False
    default: Any = None


_POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
_BY_NAME = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")


def parameters_of(model: nn.Module) -> tuple[Parameter, ...]:
    """The parameters of ``model.forward``.

    Raises:
        CaptureError: Python knows no signature.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError) as error:
        raise CaptureError(f"the forward of {type(model).__name__} has no signature: {error}") from error
    return tuple(
        Parameter(p.name, p.kind.name, p.default is not p.empty, None if p.default is p.empty else p.default)
        for p in signature.parameters.values()
    )


def signature_text(name: str, parameters: Sequence[Parameter]) -> str:
    """The signature as the user wrote it, without annotations."""
    return f"{name}{signature_of(parameters)}"


def signature_of(parameters: Sequence[Parameter]) -> inspect.Signature:
    """The parameters as Python's own signature."""
    kinds = {k.name: k for k in inspect._ParameterKind}
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [inspect.Parameter(p.name, kinds[p.kind], default=p.default if p.has_default else empty) for p in parameters]
    )


def bind(model: str, parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every parameter of the call, defaults included, in the order of the signature.

    Positional extras come as a tuple under the name of ``*args``, unknown keywords as a dict under that of
    ``**kwargs``.

    Raises:
        CaptureError: an argument is missing, unknown, given twice, or one too many.
    """
    bound: dict[str, Any] = {}
    rest = list(args)
    keywords = dict(kwargs)
    for p in parameters:
        if p.kind == "VAR_POSITIONAL":
            bound[p.name], rest = tuple(rest), []
        elif p.kind == "VAR_KEYWORD":
            bound[p.name], keywords = keywords, {}
        elif p.kind in _POSITIONAL and rest:
            if p.kind in _BY_NAME and p.name in keywords:
                raise _call_error(model, parameters, f"argument {p.name!r} is given twice")
            bound[p.name] = rest.pop(0)
        elif p.kind in _BY_NAME and p.name in keywords:
            bound[p.name] = keywords.pop(p.name)
        elif p.has_default:
            bound[p.name] = p.default
        else:
            raise _call_error(model, parameters, f"argument {p.name!r} is missing")
    if rest:
        raise _call_error(model, parameters, f"{len(args)} positional arguments are too many")
    if keywords:
        unknown = next(iter(keywords))
        near = difflib.get_close_matches(unknown, [p.name for p in parameters], n=1)
        raise _call_error(
            model, parameters, f"there is no argument {unknown!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return bound


def _call_error(model: str, parameters: Sequence[Parameter], what: str) -> CaptureError:
    return CaptureError(f"{model}: {what}", hint=f"call it as {signature_text(model, parameters)}")


@dataclass(frozen=True)
class CallForm:
    """Which parameters a call gave by position and which by name; the others keep the model's own defaults."""

    positional: int
    names: frozenset[str]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallForm:
        return cls(len(args), frozenset(kwargs))

    def call(self, parameters: Sequence[Parameter], bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments that call the model again as it was called, with the values of ``bound``."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for p in parameters:
            if p.kind == "VAR_POSITIONAL":
                args.extend(bound[p.name])
            elif p.kind == "VAR_KEYWORD":
                kwargs.update(bound[p.name])
            elif p.kind in _POSITIONAL and len(args) < self.positional:
                args.append(bound[p.name])
            elif p.name in self.names:
                kwargs[p.name] = bound[p.name]
        return args, kwargs


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor argument must be. ``sizes``: a number where capture fixed it, a symbol's name where it is free."""

    path: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        sizes = ", ".join("any" if isinstance(s, str) else str(s) for s in self.sizes)
        return f"{_dtype(self.dtype)}[{sizes}]"


@dataclass(frozen=True)
class CallBinder:
    """A call by the user's signature → flat tensors in the order of the graph's placeholders.

    ``structure`` is that of all bound parameters, a dict by name; ``tensors`` says what each leaf must be, ``limits``
    the greatest size of a symbol that has one, ``where`` the place of a child in the user's model, ``examples`` the
    size of every symbol in the example.
    """

    model: str
    parameters: tuple[Parameter, ...]
    structure: Container
    tensors: tuple[TensorSpec, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    where: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of the call in the order of the graph's placeholders.

        Raises:
            CaptureError: the call is not one that the graph was captured for.
        """
        bound = bind(self.model, self.parameters, args, kwargs)
        leaves: list[Tensor] = []
        for name, structure in zip(self.structure.keys, self.structure.children, strict=True):
            self._match(structure, bound[name], name, leaves)
        return self.checked(leaves)

    def checked(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The flat tensors themselves, where each is what the graph was captured for.

        Raises:
            CaptureError: one is not.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for spec, tensor in zip(self.tensors, leaves, strict=True):
            self._check(spec, tensor, sizes)
        return tuple(leaves)

    def with_dtypes(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> CallBinder:
        """The binder for a module that was converted to another dtype."""
        return replace(self, tensors=tuple(replace(t, dtype=dtypes.get(t.dtype, t.dtype)) for t in self.tensors))

    def _match(self, structure: Structure, given: Any, at: str, leaves: list[Tensor]) -> None:
        if isinstance(structure, Leaf):
            if not isinstance(given, Tensor):
                raise self._refuse(at, str(self.tensors[structure.index]), _shown(given))
            leaves.append(given)
        elif isinstance(structure, Constant):
            if not _same(structure.value, given):
                raise self._refuse(at, f"{_shown(structure.value)}, which is part of the captured graph", _shown(given))
        else:
            kind = kind_of(given)
            if kind is None or FAMILY[kind] != FAMILY[structure.kind]:
                raise self._refuse(at, f"a {structure.kind} of {len(structure.keys)}", _shown(given))
            keys, values, _ = parts(given, kind)
            if len(keys) != len(structure.keys) or any(k not in keys for k in structure.keys):
                raise self._refuse(at, f"a {structure.kind} with keys {list(structure.keys)}", f"keys {list(keys)}")
            for key, child in zip(structure.keys, structure.children, strict=True):
                self._match(child, values[keys.index(key)], step(structure.kind, at, key), leaves)

    def _check(self, spec: TensorSpec, tensor: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
        if tensor.dtype != spec.dtype:
            raise self._refuse(spec.path, str(spec), _shown(tensor), hint=f"convert it: .to({spec.dtype})")
        if tensor.dim() != len(spec.sizes):
            raise self._refuse(spec.path, str(spec), _shown(tensor), hint="capture again with an example of that rank")
        for dim, want in enumerate(spec.sizes):
            size = tensor.shape[dim]
            if not isinstance(want, str):
                if size != want:
                    raise self._refuse(spec.path, str(spec), _shown(tensor), hint=_free(spec.path, dim))
                continue
            if want in self.limits and size > self.limits[want]:
                most = f"at most {self.limits[want]} in dimension {dim}"
                raise self._refuse(spec.path, most, _shown(tensor), hint="the model itself takes no more")
            if want not in sizes:
                sizes[want] = (size, f"{spec.path}.shape[{dim}]")
            elif size != sizes[want][0]:
                other, where = sizes[want]
                raise self._refuse(spec.path, f"{other} in dimension {dim}, as {where}", _shown(tensor))

    def _refuse(self, at: str, want: str, got: str, hint: str = "") -> CaptureError:
        return CaptureError(
            f"{self.model}: argument {at} should be {want}; it is {got}",
            where=self.where,
            hint=hint or "call it as in example_inputs, or capture again with example_inputs like this call",
        )


FAMILY = {
    "tuple": "sequence",
    "list": "sequence",
    "namedtuple": "sequence",
    "dict": "mapping",
    "mapping": "mapping",
    "record": "mapping",
    "dataclass": "dataclass",
    "registered": "registered",
}


def _free(path: str, dim: int) -> str:
    name = path.partition("[")[0].partition(".")[0]
    return f"to allow other sizes, give dynamic_shapes={{{name!r}: {{{dim}: torch.export.Dim.AUTO}}}}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _same(captured: Any, given: Any) -> bool:
    if captured is given:
        return True
    if type(captured) is not type(given):
        return False
    return bool(captured == given)


class CallCodeGen(CodeGen):
    """Generates a ``forward`` with the user's signature around a graph of flat tensors.

    ``fx.Interpreter`` may be given the tensors alone, in the order of the placeholders.
    """

    def __init__(self, binder: CallBinder, result: Structure) -> None:
        super().__init__()
        self.binder, self.result = binder, result

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [re.split("[:#]", variable)[0].strip() for variable in free_vars]
        return f"def {self._func_name}(self, *args, **kwargs):\n    {', '.join(names)}, = _bind_call(args, kwargs)"

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> PythonCode:
        """The code with modules looked up in their parents' tables: ``nn.Module.__getattr__`` costs 0.6 us a step."""
        code = super()._gen_python_code(nodes, *args, **kwargs)
        src = code.src
        for path in {str(n.target) for n in nodes if n.op == "call_module"}:
            steps = "".join(f'._modules["{name}"]' for name in path.split("."))
            src = src.replace(f" = {_format_target('self', path)}(", f" = self{steps}(")
        return replace(code, src=src)

    def generate_output(self, output_args: Any, **options: Any) -> str:
        return f"return _build_result({options.get('repr_fn', repr)(output_args)})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [
            *super().additional_globals(),
            ("_bind_call", self.binder.flat),
            ("_build_result", self.process_outputs),
        ]

    def process_inputs(self, *args: Any) -> Any:
        leaves, _ = flatten(args)
        if len(leaves) != len(self.binder.tensors):
            raise CaptureError(
                f"{self.binder.model} takes {len(self.binder.tensors)} tensors; it is given {len(leaves)}"
            )
        return self.binder.checked(leaves)

    def process_outputs(self, outputs: Any) -> Any:
        return rebuild(self.result, outputs)


def codegen_of(gm: nn.Module) -> CallCodeGen:
    """The code generator of a captured graph: it holds how the graph is called and what it returns.

    Raises:
        CaptureError: ``gm`` was not captured by qfx.
    """
    codegen = gm.graph._codegen if isinstance(gm, fx.GraphModule) else None
    if not isinstance(codegen, CallCodeGen):
        raise CaptureError(f"{type(gm).__name__} is no captured graph")
    return codegen


def flat_inputs(gm: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that a call means, in the order of the graph's placeholders."""
    return codegen_of(gm).binder.flat(args, kwargs)
