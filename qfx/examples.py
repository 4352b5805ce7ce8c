"""Example inputs and calibration items as calls: positional arguments and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qfx.errors import CalibrationError, CaptureError, QfxError
from qfx.structure import flatten, paths


@dataclass(frozen=True)
class Example:
    """One call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the call by their path, such as ``[0]`` or ``['mask']``."""
        named: dict[int | str, Any] = dict(enumerate(self.args))
        named.update(self.kwargs)
        leaves, structure = flatten(named)
        return {at: leaves[part.index] for at, part in paths(structure) if hasattr(part, "index")}


def as_example(inputs: Any) -> Example:
    """The call that ``inputs`` stands for: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        CaptureError: it is anything else.
    """
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Tensor):
        return Example((inputs,))
    if isinstance(inputs, Mapping):
        return Example((), _by_name(inputs, CaptureError))
    if isinstance(inputs, (tuple, list)):
        return Example(tuple(inputs))
    raise CaptureError(
        f"example_inputs is a {type(inputs).__name__}",
        hint="give a tensor, a tuple of positional arguments, or a dict of keyword arguments",
    )


def calibration_call(item: Any, example: Example, number: int = 0) -> Example:
    """The call that a calibration item stands for.

    A mapping keeps the example's keys, a tuple or list its first n entries (labels behind are ignored), a tensor
    stands alone. Sizes may differ from the example's.

    Args:
        number: the item's position in the data, for errors.

    Raises:
        CalibrationError: the item has another structure, dtype or device than the example.
    """
    where = f"calibration item {number}"
    call = _call(item, example, where)
    want, got = example.tensors(), call.tensors()
    if want.keys() != got.keys():
        raise CalibrationError(
            f"{where} has tensors at {_names(got)}, the example has them at {_names(want)}",
            hint="yield items of the example's structure",
        )
    for at, tensor in got.items():
        _check_tensor(f"{where}, {at}", tensor, want[at])
    return call


def _call(item: Any, example: Example, where: str) -> Example:
    if isinstance(item, Mapping):
        if example.args:
            raise CalibrationError(
                f"{where} is a mapping, the example is positional",
                hint="give example_inputs as a dict too, or yield tuples",
            )
        missing = [k for k in example.kwargs if k not in item]
        if missing:
            raise CalibrationError(
                f"{where} has no {missing}; its keys are {list(item)}", hint="yield the example's keys"
            )
        return Example((), {k: item[k] for k in example.kwargs})
    if not isinstance(item, (Tensor, tuple, list)):
        raise CalibrationError(f"{where} is a {type(item).__name__}", hint="yield tensors, tuples or dicts")
    if example.kwargs:
        raise CalibrationError(
            f"{where} is positional, the example is a mapping with keys {list(example.kwargs)}",
            hint="yield dicts with these keys, or give example_inputs as a tuple",
        )
    args = (item,) if isinstance(item, Tensor) else tuple(item)
    if len(args) < len(example.args):
        raise CalibrationError(f"{where} has {len(args)} entries, the example has {len(example.args)}")
    return Example(args[: len(example.args)])


def _check_tensor(at: str, got: Tensor, want: Tensor) -> None:
    checks = (
        ("dtype", got.dtype, want.dtype),
        ("device", got.device.type, want.device.type),
        ("number of dimensions", got.dim(), want.dim()),
    )
    for what, is_, should in checks:
        if is_ != should:
            raise CalibrationError(
                f"{at} has {what} {is_}, the example has {should}",
                hint="convert the calibration data to the example's dtype, device and rank",
            )


def _by_name(inputs: Mapping[Any, Any], kind: type[QfxError]) -> dict[str, Any]:
    if wrong := [k for k in inputs if not isinstance(k, str)]:
        raise kind(f"example_inputs is a mapping with keys {wrong}", hint="a dict stands for keyword arguments")
    return dict(inputs)


def _names(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(tensors) or "no place"
