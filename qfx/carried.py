"""Plain attributes of the user's model that callers read: ``config``, ``num_labels``, ``dtype`` and their like."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

log = logging.getLogger(__name__)

_PLAIN = (str, int, float, bool, tuple, frozenset, torch.dtype, torch.device)


def carry_over(model: nn.Module, gm: fx.GraphModule) -> None:
    """Set on ``gm`` a copy of every public attribute of ``model`` that is plain data.

    These are the instance's attributes, simple values of its classes, and what its properties ``dtype`` and ``device``
    say. Left behind is what holds tensors or modules, what can be called, and what cannot be copied or pickled.
    """
    for name in _names(model):
        if name.startswith("_") or hasattr(gm, name):
            continue
        try:
            value = getattr(model, name)
            if not callable(value):
                _check_plain(value)
                setattr(gm, name, copy.deepcopy(value))
        except Exception as error:  # whatever the user's own property, __reduce__ or __deepcopy__ raises
            log.debug("attribute %r of %s is not carried over: %s", name, type(model).__name__, error)


def _names(model: nn.Module) -> Iterator[str]:
    classes = type(model).__mro__
    yield from vars(model)
    for cls in classes[: classes.index(nn.Module)]:
        yield from (name for name, value in vars(cls).items() if isinstance(value, _PLAIN))
    yield from (name for name in ("dtype", "device") if isinstance(getattr(type(model), name, None), property))


class _PlainPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, (Tensor, nn.Module)):
            raise pickle.PicklingError(f"it holds a {type(obj).__name__}")


def _check_plain(value: Any) -> None:
    sink = io.BytesIO()
    _PlainPickler(sink).dump(value)
    pickle.loads(sink.getvalue())
