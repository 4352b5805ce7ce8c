"""``show(gm)``: a graph as text, the same on every run and machine; used by golden tests, dumps and errors.

One node a line::

    %relu: f32[*, 64, 56, 56] = relu(%conv1)  {layer relu; out uint8 affine per tensor; group conv1}

Sizes that vary from call to call print as ``*``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.meta import NodeInfo, info, value

DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
"""The words of the text format for dtypes; others print as torch calls them."""


def show(gm: fx.GraphModule, *, with_info: bool = True) -> str:
    """The whole graph as text, a line per node, ending with a newline."""
    return "".join(show_node(n, with_info=with_info) + "\n" for n in gm.graph.nodes)


def show_node(node: fx.Node, *, with_info: bool = True) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    call = _call(node)
    kind = show_value(value(node))
    line = f"%{node.name}{': ' + kind if kind else ''} = {call}"
    facts = _facts(info(node)) if with_info else ""
    return f"{line}  {{{facts}}}" if facts else line


def show_value(val: Any) -> str:
    """``f32[*, 3, 224, 224]`` of an example value; empty where there is none."""
    if isinstance(val, torch.Tensor):
        sizes = ", ".join("*" if isinstance(s, torch.SymInt) else str(s) for s in val.shape)
        return f"{DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{sizes}]"
    if isinstance(val, tuple | list):
        return f"({', '.join(show_value(v) for v in val)})"
    return "" if val is None else "int" if isinstance(val, torch.SymInt | int) else type(val).__name__


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"@{node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    if node.op == "call_module":
        module: Any = node.graph.owning_module
        name = type(module.get_submodule(str(node.target))).__name__ if module is not None else "module"
        return f"{name}<{node.target}>({', '.join(arguments)})"
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target.name().split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def _argument(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, list | tuple):
        inside = ", ".join(_argument(a) for a in arg)
        return f"[{inside}]" if isinstance(arg, list) else f"({inside})"
    if isinstance(arg, torch.dtype):
        return DTYPES.get(arg, str(arg))
    return repr(arg)


def _facts(known: NodeInfo) -> str:
    facts = [f"layer {known.origin}"] if known.origin else []
    if known.fused:
        facts.append("fused " + "+".join(known.fused))
    if any(known.inputs):
        facts.append("in " + ", ".join(str(s) if s else "float" for s in known.inputs))
    if known.output:
        facts.append(f"out {known.output}")
    facts += [f"group {known.group}"] if known.group else []
    facts += [known.reason] if known.reason else []
    return "; ".join(facts)
