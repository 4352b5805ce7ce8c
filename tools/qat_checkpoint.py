"""Checkpoints of a training run: written atomically, refused where the settings are others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qfx.errors import ConfigError

Setting = int | float | str | bool | None


@dataclass
class Checkpoint:
    """One file that holds the last saved point of one run.

    ``settings`` are the values on which the run depends: a checkpoint of other settings is not continued. ``every`` is
    the least time in seconds between two saves in the middle of an epoch.
    """

    path: Path
    settings: Mapping[str, Setting]
    every: float = 120.0
    _last: float = field(default_factory=time.monotonic, repr=False)

    def due(self) -> bool:
        return time.monotonic() - self._last >= self.every

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state with the settings and torch's CPU random state; a kill on the way leaves the last file."""
        held = {"settings": dict(self.settings), "random": torch.get_rng_state(), "state": dict(state)}
        write_atomically(self.path, lambda path: torch.save(held, path))
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last saved state, with the random state set to what it was; None where nothing was saved yet.

        Raises:
            ConfigError: the file is of a run with other settings; the text names them.
        """
        if not self.path.exists():
            return None
        held = torch.load(self.path, map_location="cpu", weights_only=True)
        then, now = held["settings"], dict(self.settings)
        if then != now:
            names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            others = ", ".join(f"{name} {then.get(name)} where this run has {now.get(name)}" for name in names)
            raise ConfigError(
                f"{self.path} is of a run with other settings: {others}",
                hint="repeat the settings to continue it, or give --checkpoint another folder",
            )
        torch.set_rng_state(held["random"])
        state: dict[str, Any] = held["state"]
        return state


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path`` that then takes its place: it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process in the name: two that write the same file must not write into one another.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
