"""``reference`` against a fast target, every kernel fed identical integers: the largest difference of each model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from qfx.calling import flat_inputs
from qfx.examples import as_example
from qfx.models import MODELS, ModelFactory
from qfx.parity import LeafDifference, converted, lockstep
from qfx.targets import choose
from qfx.tools.bench_calls import resized
from qfx.tools.bench_figures import Bar, Figure, Options, Skip, at_most, brief

LSB, RELATIVE = at_most(1), at_most(1e-5)
RECIPES = ("int8", "int8_dynamic")


def parity(
    options: Options, *, models: Mapping[str, ModelFactory] = MODELS, recipes: Sequence[str] = RECIPES
) -> Iterator[Figure]:
    """Integer outputs within 1 LSB, float outputs within 1e-5 (norm of the difference over norm), batch of 2."""
    target = choose(options.target).name
    if target == "reference":
        raise Skip("the target is reference itself")
    for recipe in recipes:
        for name, make in models.items():
            model, example = make()
            what = f"{name}, {recipe}"
            try:
                gm = converted(model, example, calibration=[resized(example, 4)], recipe=recipe, target=target)
                assert isinstance(gm, fx.GraphModule)
                inputs = as_example(resized(example, 2, seed=1))
                differences = lockstep(gm, flat_inputs(gm, inputs.args, dict(inputs.kwargs)), target)
            except Exception as error:  # a model that fails is a figure, and the others still count
                yield Figure.fail(what, brief(error), LSB)
                continue
            yield from _worst(what, differences)


def _worst(what: str, differences: Sequence[LeafDifference]) -> Iterator[Figure]:
    integers = [(d.lsb, d) for d in differences if d.lsb is not None]
    floats = [(d.relative, d) for d in differences if d.relative is not None]
    kinds: tuple[tuple[str, Sequence[tuple[float, LeafDifference]], str, Bar], ...] = (
        ("integers", integers, "LSB", LSB),
        ("floats", floats, "relative", RELATIVE),
    )
    for kind, found, unit, bar in kinds:
        if found:
            value, worst = max(found, key=lambda pair: pair[0])
            note = f"{len(found)} kernels; worst {worst.kernel} at {worst.layer or worst.node}" if value else ""
            yield Figure(f"{what}, {kind}", value, unit, bar, note or f"{len(found)} kernels")
