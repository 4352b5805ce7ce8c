"""Whether this forward pass repeats one: gradient checkpointing runs a segment again during the backward pass."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """True inside a backward pass: ranges and statistics have seen this batch already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
