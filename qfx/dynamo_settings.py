"""How the regions of a compiled program are quantized: the options of the backend, and the pipeline that they make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qfx.auto_recipe import AutoRecipe, as_recipe
from qfx.errors import ConfigError
from qfx.meta import add_notes
from qfx.passes.annotate import Annotate, subject
from qfx.pipeline import PassLike, Pipeline
from qfx.recipe import Recipe
from qfx.targets import Target


@dataclass(frozen=True)
class Settings:
    """The options of :func:`qfx.dynamo.backend`, and what follows from them.

    Raises:
        ConfigError: one of them cannot be meant.
    """

    recipe: str | Recipe | AutoRecipe = "int8"
    calibration_steps: int = 8
    target: str | Target = "auto"
    passes: tuple[PassLike, ...] = ()

    def __post_init__(self) -> None:
        steps = self.calibration_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"calibration_steps is {steps!r}", hint="give the number of calls to observe: 1 or more")
        if isinstance(self.passes, str) or not hasattr(self.passes, "__iter__"):
            raise ConfigError(f"passes is a {type(self.passes).__name__}", hint="give a list of passes")
        object.__setattr__(self, "passes", tuple(self.passes))
        recipe = as_recipe(self.recipe)
        if isinstance(recipe, AutoRecipe) and recipe.metric is not None:
            raise ConfigError(
                "a metric takes the whole model, and the backend quantizes what torch.compile makes of it",
                hint="leave out max_drop and metric, or call qfx.quantize and compile what it returns",
            )
        self.pipeline()

    def pipeline(self) -> Pipeline:
        """The default passes, with ``passes`` in their order behind the fusion of batch norms, at stage CANONICAL.

        Raises:
            ConfigError: there is no such recipe, target or pass, or a pass does not fit there.
        """
        pipeline = Pipeline.default(self.recipe, self.target)
        for p in self.passes:
            pipeline = pipeline.before("fuse-epilogues", p)
        annotate = next(p for p in pipeline if isinstance(p, Annotate))
        return pipeline.replace("annotate", _AnnotateRegion(annotate.recipe, annotate.target))

    @property
    def kept_rows(self) -> int:
        """How many rows of the observed calls the recipe measures on."""
        recipe = as_recipe(self.recipe)
        return recipe.rows if isinstance(recipe, AutoRecipe) else 0


@dataclass(frozen=True)
class _AnnotateRegion(Annotate):
    """Annotates a part of the user's model: a rule that matches nothing in it may be meant for another part."""

    name: ClassVar[str] = "annotate"

    def run(self, gm: fx.GraphModule) -> int:
        elsewhere = self.recipe.unmatched({subject(n) for n in gm.graph.nodes if n.op == "call_function"})
        add_notes(gm, "recipe", [f"the rule for {rule} matches nothing in this region" for rule in elsewhere])
        rules = tuple(rule for rule in self.recipe.rules if rule not in elsewhere)
        return Annotate(dataclasses.replace(self.recipe, rules=rules), self.target).run(gm)
