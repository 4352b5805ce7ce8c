"""The first calls of calibration, kept for what is measured on data behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from qfx.calling import flat_inputs
from qfx.meta import Call


@dataclass
class KeptCalls:
    """Up to ``rows`` rows of the calls of each graph, by the graph's path; ``item`` is the one being run."""

    rows: int
    item: Any = None
    calls: dict[str, list[Call]] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, inputs: tuple[Tensor, ...]) -> None:
        if self._seen.get(path, 0) >= self.rows:
            return
        sizes = [int(t.shape[0]) for t in inputs if t.dim()]
        self._seen[path] = self._seen.get(path, 0) + (sizes[0] if sizes else 1)
        self.calls.setdefault(path, []).append(tree_map_only(Tensor, Tensor.clone, (inputs, self.item)))


@contextmanager
def keeping(graphs: Mapping[str, fx.GraphModule], rows: int) -> Iterator[KeptCalls]:
    """Keep the calls that the graphs get within; ``rows`` 0: none."""
    kept = KeptCalls(rows)

    def note(path: str, gm: fx.GraphModule) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.add(path, flat_inputs(gm, args, kwargs))

        return gm.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    hooks = [note(path, gm) for path, gm in graphs.items()] if rows else []
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
