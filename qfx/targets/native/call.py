"""``torch.ops.qfx.native_call``: a region as one operator, so that a compiler sees one call and not what is inside."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qfx.attributes import tensors

if TYPE_CHECKING:
    from qfx.targets.native.region import NativeRegion

_LIBRARY = torch.library.Library("qfx", "FRAGMENT")
_LIBRARY.define("native_call(Tensor[] inputs, int region) -> Tensor[]")

_regions: weakref.WeakValueDictionary[int, NativeRegion] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number_of(region: NativeRegion) -> int:
    """A new number by which :data:`torch.ops.qfx.native_call` finds the region, as long as it lives."""
    number = next(_numbers)
    _regions[number] = region
    return number


def _run(inputs: Sequence[Tensor], region: int) -> list[Tensor]:
    outputs = _regions[region](*inputs)
    given = {x.data_ptr() for x in inputs}
    results = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [y.clone() if y.data_ptr() in given else y for y in results]  # an operator's results share no memory


def _shapes(inputs: Sequence[Tensor], region: int) -> list[Tensor]:
    graph = _regions[region].graph
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    held: dict[str, Tensor] = {name: mode.from_tensor(t, static_shapes=True) for name, t in tensors(graph)}
    outputs = torch.func.functional_call(graph, held, tuple(inputs))
    results = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [torch.empty_like(y, memory_format=torch.contiguous_format) for y in results]


_LIBRARY.impl("native_call", _run, "CPU")
torch.library.register_fake("qfx::native_call", _shapes, lib=_LIBRARY)
