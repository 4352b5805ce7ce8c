"""Example inputs and calibration items."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from qfx.errors import CalibrationError, CaptureError
from qfx.examples import Example, as_example, calibration_call

X, Y = torch.randn(2, 3), torch.ones(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "args", "names"),
    [
        (X, 1, []),
        ((X, Y), 2, []),
        ([X, Y], 2, []),
        ({"x": X, "y": Y}, 0, ["x", "y"]),
        (UserDict(x=X), 0, ["x"]),
        (Example((X,), {"y": Y}), 1, ["y"]),
    ],
)
def test_an_example_is_a_call(given: Any, args: int, names: list[str]) -> None:
    example = as_example(given)
    assert len(example.args) == args and list(example.kwargs) == names


@pytest.mark.parametrize("given", [3, None, "x", {1: X}])
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(CaptureError, match="example_inputs is a"):
        as_example(given)


@pytest.mark.parametrize(
    ("item", "example"),
    [
        (X, X),
        ((X, Y), X),  # the label behind is ignored
        ([X, Y, Y], (X, Y)),
        (X, (X,)),
        ({"x": X, "y": Y, "labels": Y}, {"y": Y, "x": X}),
        ((torch.randn(7, 5),), X),  # sizes may differ
        (({"a": X}, Y), ({"a": X},)),
    ],
)
def test_calibration_items_keep_what_the_example_has(item: Any, example: Any) -> None:
    wanted = as_example(example)
    call = calibration_call(item, wanted, 3)
    assert call.tensors().keys() == wanted.tensors().keys()
    assert list(call.kwargs) == list(wanted.kwargs)


@pytest.mark.parametrize(
    ("item", "example", "text"),
    [
        ((X,), (X, Y), "calibration item 3 has 1 entries, the example has 2"),
        ({"x": X}, {"x": X, "y": Y}, r"has no \['y'\]; its keys are \['x'\]"),
        ({"x": X}, X, "is a mapping, the example is positional"),
        ((X, Y), {"x": X, "y": Y}, r"is positional, the example is a mapping with keys \['x', 'y'\]"),
        ("text", X, "is a str"),
        (X.double(), X, r"calibration item 3, \[0\] has dtype torch.float64, the example has torch.float32"),
        (X.to("meta"), X, "has device meta, the example has cpu"),
        (X[0], X, "has number of dimensions 1, the example has 2"),
        (({"b": X},), ({"a": X},), r"has tensors at \[0\]\['b'\], the example has them at \[0\]\['a'\]"),
        ((None,), X, r"has tensors at no place, the example has them at \[0\]"),
    ],
)
def test_calibration_items_that_do_not_fit_are_refused(item: Any, example: Any, text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        calibration_call(item, as_example(example), 3)
