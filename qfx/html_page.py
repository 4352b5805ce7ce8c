"""How the package's HTML pages are filled in: what is put into a template is escaped, what is missing is an error."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def packaged(folder: str, name: str) -> str:
    """The text of a file that comes with the package."""
    return files("qfx").joinpath(folder, name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """The page ``qfx/pages/<template>`` with ``values``; names of the user's go through its filter ``printable``."""
    from jinja2 import Environment, StrictUndefined  # here, since few who import qfx make a page

    from qfx.sensitivity_plot import printable

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = printable
    return environment.from_string(packaged("pages", template)).render(**values)
