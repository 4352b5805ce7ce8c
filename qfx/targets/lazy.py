"""Values that a leaf makes of its buffers when it first runs: packed weights, tables, scales as Python numbers.

They are neither pickled nor copied, and are made again after ``load_state_dict``, ``.to()`` and their like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def runs_here(x: Tensor) -> bool:
    """True for an ordinary CPU tensor in an eager call: only there can oneDNN's ops and C++ loops take part.

    Else (another device, a fake tensor, a compiler or exporter that traces) a leaf does what ``reference`` does.
    """
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


class Lazy(nn.Module):
    """A leaf with a callable that :meth:`prepare` makes when first needed."""

    _run: Callable[..., Tensor] | None = None

    def prepare(self, x: Tensor) -> Callable[..., Tensor]:
        """The leaf's computation on inputs like ``x``, with everything bound that does not depend on their values."""
        raise NotImplementedError

    def prepared(self, x: Tensor) -> Callable[..., Tensor]:
        """What ``prepare`` made, kept until the buffers change. Usable in and out of inference mode."""
        if self._run is None:
            with torch.inference_mode(False), torch.no_grad():
                self._run = self.prepare(x)
        return self._run

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._run = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._run = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_run"}
