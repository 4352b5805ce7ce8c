"""Where a node comes from: the user's module path and the user's own line of Python."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from traceback import StackSummary, walk_tb
from types import TracebackType

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)
_QFX = str(Path(__file__).resolve().parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_SECOND_CALL = re.compile(r"@\d+")
_SELF = re.compile(r"^L\[['\"]self['\"]\]\.?|^L__self__(\.|$)")


def layer_path(node: fx.Node) -> str:
    """The path of the user's innermost module that ran the node, such as ``"layer1.0.conv1"``; ``""`` is the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return clean_path(paths[-1]) if paths else ""


def module_classes(node: fx.Node) -> tuple[str, ...]:
    """The class names of the user's modules that ran the node, outermost first, such as ``("BertModel", "Linear")``."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(_class_name(entry[1]) for entry in stack.values())


def calls_before(node: fx.Node) -> int:
    """How many calls like the node's, in the module around, come before it in the graph.

    In a module of ``torch.nn`` the call is that of the module, and like it are those of its class; else like it is what
    has the same target.
    """
    own, before = _call(node), dict[object, None]()
    for other in node.graph.nodes:
        if other is node:
            break
        if other.op == "call_function" and _call(other)[0] == own[0]:
            before[_call(other)[1]] = None
    return len(before.keys() - {own[1]})


def _call(node: fx.Node) -> tuple[tuple[str, object], object]:
    """What calls are counted together, and what tells one from another."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    if not stack:
        return ("", node.target), node
    key, (path, kind) = stack[-1]
    if f"{kind}".startswith("torch.nn.") or getattr(kind, "__module__", "").startswith("torch.nn."):
        return (clean_path(path).rpartition(".")[0], _class_name(kind)), key
    return (clean_path(path), node.target), node


def clean_path(path: str) -> str:
    """A module path as the user writes it: without ``L['self'].``, and without the mark of a second call (``@1``)."""
    return _SECOND_CALL.sub("", _SELF.sub("", path))


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's innermost own frame that made the node; ``""`` where none is known."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return _innermost_own(frames)


def error_line(error: BaseException) -> str:
    """``file:line`` of the user's innermost own frame in which ``error``, or what caused it, was raised."""
    seen: BaseException | None = error
    while seen is not None:
        if line := _innermost_own(_frames(seen.__traceback__)):
            return line
        seen = seen.__cause__ or seen.__context__
    return ""


def stack_line(stack: StackSummary) -> str:
    """``file:line`` of the user's innermost own frame of a recorded stack."""
    return _innermost_own([(frame.filename, str(frame.lineno)) for frame in stack])


def _frames(trace: TracebackType | None) -> list[tuple[str, str]]:
    return [(frame.f_code.co_filename, str(line)) for frame, line in walk_tb(trace)]


def _innermost_own(frames: Iterable[tuple[str, str]]) -> str:
    own = [f"{file}:{line}" for file, line in frames if _is_own(file)]
    return own[-1] if own else ""


def _is_own(file: str) -> bool:
    """Whether the file is the user's: neither torch's, nor the compiler's, nor generated."""
    return not file.startswith(("<", "torch/", _TORCH)) and str(Path(file).resolve().parent) != _QFX


def _class_name(kind: object) -> str:
    return (kind if isinstance(kind, str) else getattr(kind, "__qualname__", str(kind))).rpartition(".")[2]
