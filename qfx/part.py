"""Modules inside a graph, which reads their tensors without calling them: they cannot be sharded alone."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from qfx.errors import ConfigError


class Part(nn.Module):
    """A module inside a graph. FSDP2 refuses it: parameters would be gathered when it is called, and read elsewhere."""

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As any module's.

        Raises:
            ConfigError: ``fully_shard`` registers it; all that it has done by then is undone.
        """
        if _is_being_sharded(self):
            raise ConfigError(
                f"fully_shard of a {type(self).__name__} inside a captured graph: the graph reads its parameters "
                "without calling it, so that FSDP would never gather them",
                hint="shard the model as a whole: fully_shard(prepared)",
            )
        return super().register_forward_pre_hook(*args, **kwargs)


def _is_being_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has begun with the module; if so, let torch forget it, and those it has begun with."""
    composable = sys.modules.get("torch.distributed._composable_state")
    if composable is None:  # nothing of that kind was ever imported
        return False
    states = composable._module_state_mapping
    state = states[module]() if module in states else None
    if type(state).__name__ != "FSDPState":
        return False
    for begun in [m for m, reference in states.items() if reference() is state]:
        del states[begun]
        for name, entries in vars(begun).items():
            if "composable" in str(name) and isinstance(entries, dict):
                entries.clear()
    return True
