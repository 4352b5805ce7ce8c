"""The tree on disk against what pyproject.toml says of it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import qfx

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
SIBLINGS = ("passes", "models", "tools")


def packages_on_disk() -> set[str]:
    """Every folder with an ``__init__.py``, by the name that it is installed under (rglob does not enter links)."""
    found = set()
    for folder, package in (("qfx", "qfx"), *((name, f"qfx.{name}") for name in SIBLINGS)):
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT / folder)
            found.add(".".join((package, *relative.parts)))
    return found


def test_package_list_equals_the_disk() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk(), "a package missing here is absent from the wheel"


def test_every_python_file_is_in_a_package() -> None:
    folders = [ROOT / name for name in ("qfx", *SIBLINGS)]
    stray = [path for folder in folders for path in folder.rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert not stray, "these folders have no __init__.py"


@pytest.mark.parametrize("name", SIBLINGS)
def test_sibling_is_linked_and_mapped(name: str) -> None:
    link = ROOT / "qfx" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert SETUPTOOLS["package-dir"][f"qfx.{name}"] == name


@pytest.mark.parametrize("name", SIBLINGS)
def test_sibling_ends_with_its_guard(name: str) -> None:
    last = ast.parse((ROOT / name / "__init__.py").read_text()).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == f"__name__ != 'qfx.{name}'"
    assert isinstance(last.body[0], ast.Raise) and "ImportError" in ast.unparse(last.body[0])


def test_siblings_refuse_their_bare_names() -> None:
    program = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert f"qfx.{name}" in str(error), error
    else:
        raise SystemExit(f"{name} could be imported without qfx")
"""
    # PYTHONPATH and not the working folder, because PYTHONSAFEPATH may be set.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *SIBLINGS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_tool_bears_a_standard_name() -> None:
    """``python tools/x.py`` puts tools/ first on sys.path, where such a file would shadow the library's module."""
    assert not {path.stem for path in (ROOT / "tools").glob("*.py")} & set(sys.stdlib_module_names)


def test_version_is_one() -> None:
    version = PYPROJECT["project"]["version"]
    assert metadata.version("qfx") == version == qfx.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert set(headings[1:2]) <= {version}, "the newest release of the changelog is not the package's version"


def test_constraints_pin_everything_that_is_asked_for() -> None:
    project = PYPROJECT["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    asked = [*project["dependencies"], *(item for item in extras if not item.startswith("qfx["))]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    assert {re.split("[<>=!~]", item)[0] for item in asked} == {name for name, _ in pinned}
    assert {version for name, version in pinned if name == "torch"} == {"2.13.0+cpu", "2.13.0"}
