"""Parameters, buffers and modules of a GraphModule by their dotted path."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from qfx.part import Part


def get_tensor(gm: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or plain tensor attribute at ``path``."""
    owner, _, name = path.rpartition(".")
    found = getattr(gm.get_submodule(owner), name)
    assert isinstance(found, Tensor), f"{path} is no tensor"
    return found


def _owner(gm: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that shall hold ``path``'s last name; containers on the way are made."""
    owner: nn.Module = gm
    *parents, name = path.split(".")
    for part in parents:
        child = owner._modules.get(part)
        if child is None:
            child = Part()
            owner.add_module(part, child)
        owner = child
    return owner, name


def set_buffer(gm: nn.Module, path: str, tensor: Tensor) -> None:
    """Register ``tensor`` as a buffer at ``path``, in place of what is there."""
    owner, name = _owner(gm, path)
    for table in (owner._parameters, owner._buffers):
        table.pop(name, None)
    owner.register_buffer(name, tensor.detach())


def set_tensor(gm: nn.Module, path: str, tensor: Tensor) -> None:
    """Put ``tensor`` at ``path``, in place of what is there: a parameter as such, any other tensor as a buffer."""
    if not isinstance(tensor, nn.Parameter):
        set_buffer(gm, path, tensor)
        return
    owner, name = _owner(gm, path)
    owner._buffers.pop(name, None)
    owner.register_parameter(name, tensor)


def set_module(gm: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``; a container there hands on what it holds under other names."""
    owner, name = _owner(gm, path)
    owner._modules.pop(name, None)
    owner.add_module(name, module)


def exists(gm: nn.Module, path: str) -> bool:
    owner: object = gm
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def free_path(gm: nn.Module, path: str) -> str:
    """``path``, or the first of ``path_1``, ``path_2``, … that nothing bears."""
    number, candidate = 0, path
    while exists(gm, candidate):
        number += 1
        candidate = f"{path}_{number}"
    return candidate


def drop_unused(gm: fx.GraphModule) -> int:
    """Delete tensors and modules that no node refers to, and containers left empty; returns how many."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    leaves = {n.target for n in gm.graph.nodes if n.op == "call_module"}
    return _drop(gm, "", used, leaves)


def _drop(module: nn.Module, prefix: str, used: set[str], leaves: set[object]) -> int:
    count = 0
    for table in (module._parameters, module._buffers):
        for name in [n for n in table if prefix + n not in used]:
            del table[name]
            count += 1
    for name in list(module._modules):
        child, path = module._modules[name], prefix + name
        if child is None or path in leaves:
            continue
        count += _drop(child, path + ".", used, leaves)
        if not (child._parameters or child._buffers or child._modules):
            del module._modules[name]
            count += 1
    return count


def tensors(gm: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers with their paths, tied ones once per name."""
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def nbytes(values: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each storage once."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for t in values:
        storage = t.untyped_storage()
        sizes[(t.device, storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())
