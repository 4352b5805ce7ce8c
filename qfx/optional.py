"""Packages that only some functions need: where one is missing, the error says what to install."""

from __future__ import annotations

import importlib.util

from qfx.errors import ConfigError


def need(*packages: str, extra: str, what: str) -> None:
    """Raise where one of ``packages`` is not installed; ``extra`` is the extra of qfx that brings it.

    Raises:
        ConfigError: the text has the pip command.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which is not installed", hint=f"pip install 'qfx[{extra}]'"
        )
