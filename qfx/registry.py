"""Plug-ins by name: passes, recipes and targets, those of qfx and those of other packages.

One :class:`Registry` a kind, next to what it names: ``qfx.pipeline.PASSES_BY_NAME``, ``qfx.recipe.RECIPES_BY_NAME``,
``qfx.targets.TARGETS_BY_NAME``. A name is qfx's own, or registered by running code (``@qfx.register_pass``), or an
entry point of an installed package (``[project.entry-points."qfx.passes"]``). Packages are looked at only when a name
is asked for that is not qfx's own, and imported only for the name that they offer: a broken one harms nobody else.
"""

from __future__ import annotations

import difflib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from qfx.errors import ConfigError, QfxWarning
from qfx.origin import stack_line


class PluginWarning(QfxWarning):
    """An installed package offers a plug-in that cannot be reached."""


class Named(Protocol):
    """What has a name; of a pass, a recipe or a target, the one that it is looked up by."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class _Offer:
    """A plug-in that someone offers under a name. ``load`` gets it, which may import a package."""

    owner: str
    load: Callable[[], Any]


class Registry(Generic[T]):
    """The plug-ins of one kind.

    Args:
        kind: what errors call one, such as ``pass``.
        group: the group of entry points in which packages offer them.
        make: gives the thing itself of what is registered (of a class, an instance), or raises ConfigError.
        reserved: words that callers understand before they look up a name.
    """

    def __init__(self, kind: str, group: str, make: Callable[[Any], T], *, reserved: tuple[str, ...] = ()) -> None:
        self.kind, self.group, self.make, self.reserved = kind, group, make, reserved
        self._own: dict[str, Any] = {}
        self._registered: dict[str, _Offer] = {}

    def add_own(self, plugins: Iterable[Any]) -> None:
        """Add plug-ins of qfx itself, instances or classes that have a name; nobody else can take these names."""
        self._own |= {plugin.name: plugin for plugin in plugins}

    def register(self, plugin: Any) -> None:
        """Add a plug-in under its own name; the same one may be registered again, as when its module is reloaded.

        Raises:
            ConfigError: it is of another kind, or its name is taken; the text names both owners.
        """
        name = self.make(plugin).name
        offer = _Offer(_owner(plugin), lambda: plugin)
        if name in (*self.reserved, *self._own):
            raise self._taken_twice(name, "qfx", offer.owner)
        old = self._registered.get(name)
        if old is not None and not _same(old.load(), plugin):
            raise self._taken_twice(name, old.owner, offer.owner)
        self._registered[name] = offer

    def find(self, name: str) -> T:
        """The plug-in of that name.

        Raises:
            ConfigError: there is none, and the text gives the nearest; two packages offer one under that name; or it
                cannot be loaded, and the text names the package, the entry point and the error.
        """
        if name in self._own:
            return self.make(self._own[name])
        if name in self.reserved:
            raise self._unknown(name)
        offers = [self._registered[name]] if name in self._registered else []
        offers += [_Offer(_distribution(e), e.load) for e in self._entry_points() if e.name == name]
        if not offers:
            raise self._unknown(name)
        plugins = [self._loaded(name, offer) for offer in offers]
        for offer, plugin in zip(offers[1:], plugins[1:], strict=True):
            if not _same(plugins[0], plugin):
                raise self._taken_twice(name, offers[0].owner, offer.owner)
        try:
            made = self.make(plugins[0])
        except Exception as error:
            raise self._unusable(name, offers[0], error) from error
        if made.name != name:
            raise ConfigError(
                f"the {self.kind} {name!r} calls itself {made.name!r}",
                hint=f"it must have one name; it comes from {offers[0].owner}",
            )
        return made

    def names(self) -> tuple[str, ...]:
        """All names: qfx's own, the registered ones, and those that installed packages offer; none is loaded.

        Warns:
            PluginWarning: a package offers one under a name of qfx's own, where it is never looked for.
        """
        offered = self._entry_points()
        for e in offered:
            if e.name in (*self.reserved, *self._own):
                what = f"the {self.kind} {e.name!r} is qfx's own; that of {_distribution(e)} is never used"
                warnings.warn(PluginWarning(what), stacklevel=2)
        return tuple(dict.fromkeys([*self._own, *self._registered, *(e.name for e in offered)]))

    def _entry_points(self) -> list[EntryPoint]:
        return sorted(entry_points(group=self.group), key=lambda e: e.name)

    def _loaded(self, name: str, offer: _Offer) -> Any:
        try:
            return offer.load()
        except Exception as error:  # whatever a stranger's module raises when it is imported
            raise self._unusable(name, offer, error) from error

    def _unusable(self, name: str, offer: _Offer, error: Exception) -> ConfigError:
        why = error.what if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        return ConfigError(
            f"the {self.kind} {name!r} of {offer.owner} cannot be used: {why}",
            hint="repair that package or uninstall it; nothing else depends on it",
        )

    def _unknown(self, name: str) -> ConfigError:
        names = self.names()
        near = difflib.get_close_matches(str(name), names, n=1)
        return ConfigError(
            f"there is no {self.kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            hint="choose one of " + ", ".join((*self.reserved, *names)),
        )

    def _taken_twice(self, name: str, first: str, second: str) -> ConfigError:
        return ConfigError(
            f"the {self.kind} name {name!r} is taken twice: by {first}, and by {second}",
            hint="give one of them another name, or uninstall its package",
        )


def instance_of(plugin: Any) -> Any:
    """An instance of a class, made without arguments; anything else as it is.

    Raises:
        ConfigError: it cannot be made without arguments.
    """
    if not isinstance(plugin, type):
        return plugin
    try:
        inspect.signature(plugin).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{plugin.__name__} cannot be made without arguments: {error}",
            hint="give an instance, or its fields default values",
        ) from None
    return plugin()


def _owner(plugin: Any) -> str:
    """Whose plug-in it is: a class or function by its full name, a value by the line that registers it."""
    line = "" if hasattr(plugin, "__qualname__") else stack_line(traceback.extract_stack())
    return line or _full_name(plugin)


def _distribution(e: EntryPoint) -> str:
    package = f"{e.dist.name} {e.dist.version}" if e.dist is not None else "an unknown package"
    return f"{package} (entry point {e.group}: {e.name} = {e.value})"


def _same(a: Any, b: Any) -> bool:
    """One thing: the same value, or a class or function of a module that was loaded anew."""
    named = hasattr(a, "__qualname__") and hasattr(b, "__qualname__")
    return a is b or (_full_name(a) == _full_name(b) if named else bool(a == b))


def _full_name(plugin: Any) -> str:
    kind = plugin if hasattr(plugin, "__qualname__") else type(plugin)
    return f"{kind.__module__}.{kind.__qualname__}"
