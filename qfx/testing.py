"""Helpers to test passes: a graph against its text, two modules against each other, a few passes on a small model.

They are for the tests of qfx itself and for authors of passes elsewhere. A test of a pass is small text in, text out::

    gm = run_passes(model, x, "functionalize", "canonicalize", MyPass())
    assert_graph(gm, '''
        %x: f32[*, 4] = input
        %relu: f32[*, 4] = relu(%x)
        return (%relu)
    ''')
"""

from __future__ import annotations

import copy
import difflib
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.capture import capture
from qfx.examples import as_example
from qfx.pipeline import PassLike, as_pass, run_pass
from qfx.printer import show
from qfx.structure import flatten


def assert_graph(gm: fx.GraphModule, expected: str, *, with_info: bool = True) -> None:
    """Assert that ``qfx.printer.show(gm)`` is ``expected``, apart from indentation and empty lines around it.

    ``with_info`` False leaves out the facts in braces.

    Raises:
        AssertionError: with a diff, and the text as it is now, to be pasted into the test once it is judged right.
    """
    actual = show(gm, with_info=with_info).strip()
    wanted = textwrap.dedent(expected).strip()
    if actual == wanted:
        return
    diff = difflib.unified_diff(wanted.splitlines(), actual.splitlines(), "expected", "actual", lineterm="")
    raise AssertionError("the graph is not as expected\n" + "\n".join(diff) + f"\n\nthe graph is now\n{actual}\n")


def assert_same_numerics(a: Callable[..., Any], b: Callable[..., Any], args: Any, *, tolerance: float = 0.0) -> None:
    """Assert that ``a`` and ``b`` return the same structure, shapes, dtypes and values for ``args``.

    Args:
        args: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Both get copies.
        tolerance: largest ``max|a - b| / max|a|`` of each floating-point tensor; 0 asks for the same bits. NaN equals
            NaN. All other tensors must be equal.

    Raises:
        AssertionError: naming the output that differs, and by how much.
    """
    with torch.no_grad():
        (left, of_a), (right, of_b) = (flatten(_call(f, args)) for f in (a, b))
    assert of_a == of_b, f"the outputs are built differently: {of_a} and {of_b}"
    for i, (x, y) in enumerate(zip(left, right, strict=True)):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            assert x == y, f"output {i}: {x!r} and {y!r}"
            continue
        kinds = [(tuple(t.shape), t.dtype) for t in (x, y)]
        assert kinds[0] == kinds[1], f"output {i}: {kinds[0]} and {kinds[1]}"
        error = _relative_error(x, y)
        assert error <= tolerance, f"output {i}: relative error {error:.3g}, allowed are {tolerance:.3g}"


def run_passes(model: nn.Module, example_inputs: Any, *passes: PassLike) -> fx.GraphModule:
    """Capture ``model``, which is in eval mode, and run ``passes`` in order on the graph; returns it.

    Passes may be named, as ``"canonicalize"``, where they need no options; functions of torch.fx are taken too. With
    ``QFX_CHECK=1`` in the environment every pass is held to its contract.
    """
    gm = capture(model, example_inputs)
    for p in passes:
        run_pass(as_pass(p), gm)
    return gm


def _call(f: Callable[..., Any], args: Any) -> Any:
    example = as_example(copy.deepcopy(args))
    return f(*example.args, **example.kwargs)


def _relative_error(x: Tensor, y: Tensor) -> float:
    if not x.is_floating_point():
        return 0.0 if torch.equal(x, y) else float("inf")
    x, y = x.detach().double(), y.detach().double()
    if not torch.equal(x.isnan(), y.isnan()):
        return float("inf")
    difference = torch.where(x == y, 0.0, x - y).nan_to_num(nan=0.0, posinf=float("inf"), neginf=-float("inf"))
    if not difference.count_nonzero():
        return 0.0
    return float(difference.abs().max() / x.nan_to_num().abs().max().clamp(min=torch.finfo(torch.float64).tiny))
