"""The backend of ``torch.compile``: ``torch.compile(model, backend="qfx")``, or ``backend=qfx.backend(...)``.

Each region that dynamo compiles runs in float for its first calls, which calibrate it, and quantized from then on.
Dynamo is not imported here: it is there when somebody compiles.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from qfx.api import report
from qfx.auto_recipe import AutoRecipe
from qfx.capture import original
from qfx.dynamo_graph import Received
from qfx.dynamo_regions import Region, Runner, Store
from qfx.dynamo_settings import Settings
from qfx.errors import ConfigError
from qfx.node_table import Report
from qfx.pipeline import PassLike
from qfx.recipe import Recipe
from qfx.targets import Target

log = logging.getLogger(__name__)

def backend(
    *,
    recipe: str | Recipe | AutoRecipe = "int8",
    calibration_steps: int = 8,
    target: str | Target = "auto",
    passes: Iterable[PassLike] = (),
) -> Backend:
    """A backend for ``torch.compile(model, backend=...)`` that quantizes what it compiles.

    Args:
        recipe: as for :func:`qfx.quantize`; a rule may match in one region and not in others.
        calibration_steps: how many calls of a region are observed, in float, before it is quantized. A recipe that
            observes nothing (``int8_dynamic``, ``w8a16``, ``w4a16``) quantizes from the first call on.
        target: as for :func:`qfx.quantize`.
        passes: further passes, as edits of a :class:`qfx.Pipeline` take them. They run in their order behind the
            fusion of batch norms and before other groups are fused, at stage CANONICAL.

    Raises:
        ConfigError: an option cannot be meant.
    """
    return Backend(Settings(recipe, calibration_steps, target, passes))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Backend:
    """What :func:`backend` returns: dynamo calls it with every graph that it compiles.

    One object may serve several models. Two objects share nothing, even where their settings are equal.
    """

    settings: Settings
    _store: Store = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_store", Store(self.settings))
        _BACKENDS.add(self)

    @property
    def __name__(self) -> str:
        return "qfx"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Runner | fx.GraphModule:
        try:
            received = Received.of(gm, example_inputs)
        except Exception as error:  # a graph that is not dynamo's own, as what other tools make of it
            log.warning("a graph stays float, it cannot be read: %s: %s", type(error).__name__, error)
            return gm
        return self._store.new_runner(received, example_inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """Itself: a copy of a compiled model is compiled alike."""
        return self

    def reset(self) -> None:
        """Forget all ranges; ``torch._dynamo.reset()`` calls it."""
        self._store.reset()


_BACKENDS: weakref.WeakSet[Backend] = weakref.WeakSet()
_OPTIONS = tuple(f.name for f in dataclasses.fields(Settings))


class _ByOptions:
    """What ``backend="qfx"`` is: the backends made of ``torch.compile(..., options={...})``, one for equal options."""

    def __init__(self) -> None:
        self.made: list[tuple[dict[str, Any], Backend]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Any:
        """As :class:`Backend`.

        Raises:
            ConfigError: an unknown option, or a mode. (Dynamo wraps it in a ``BackendCompilerFailed``.)
        """
        options = dict(given.pop("options", None) or {})
        hint = "its options are " + ", ".join(_OPTIONS)
        if given:
            raise ConfigError(f"backend 'qfx' has no {next(iter(given))}", hint=hint)
        if unknown := [name for name in options if name not in _OPTIONS]:
            near = difflib.get_close_matches(unknown[0], _OPTIONS, n=1)
            raise ConfigError(
                f"backend 'qfx' has no option {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=hint,
            )
        found = next((made for known, made in self.made if known == options), None)
        if found is None:
            found = backend(**options)
            self.made.append((options, found))
        return found(gm, example_inputs)

    def reset(self) -> None:
        """Forget all ranges; ``torch._dynamo.reset()`` calls it."""
        self.made.clear()


by_options = _ByOptions()
"""The entry point that ``torch.compile`` finds by the name ``qfx``."""


@dataclass(frozen=True)
class RegionReport:
    """What became of a region.

    ``where``: the user's line at which it begins. ``state``: ``calibrating``; ``calibrated``, where another size of it
    was called last, and the next call quantizes; ``quantized``; or ``float``, and ``reason`` says why. ``calls``: how
    many have been observed; ``report``: the node table of a quantized one.
    """

    where: str
    state: str
    reason: str = ""
    calls: int = 0
    report: Report | None = None

    def __str__(self) -> str:
        head = f"{self.where}: {self.state}, {self.reason or f'{self.calls} calls observed'}"
        return head if self.report is None else f"{head}\n{self.report.summary()}"


def reports(of: nn.Module | Backend) -> tuple[RegionReport, ...]:
    """What became of each region that dynamo has compiled, in the order of compilation.

    Args:
        of: a model, compiled or not: the regions that hold weights of it. Or a backend: all of its regions.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(of, Backend):
        return tuple(_told(part) for part in of._store.parts())
    if not isinstance(of, nn.Module):
        raise ConfigError(f"reports of a {type(of).__name__}", hint="give a model, or what qfx.backend returned")
    model = original(of)
    weights = {id(t) for t in (*model.parameters(), *model.buffers())}
    parts = [part for known in _BACKENDS for part in known._store.parts()]
    return tuple(_told(part) for part in parts if any(id(ref()) in weights for ref in part.weights))


def _told(part: Runner | Region) -> RegionReport:
    where = part.received.where
    if part.reason or isinstance(part, Runner):
        return RegionReport(where, "float" if part.reason else "calibrating", part.reason)
    if part.quantized is None:
        return RegionReport(where, "calibrated" if part.ranges.done else "calibrating", calls=part.ranges.seen)
    return RegionReport(where, "quantized", calls=part.ranges.seen, report=report(part.quantized))
