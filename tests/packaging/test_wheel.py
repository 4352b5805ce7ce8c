"""What the wheel holds: everything of the tree that runs, and nothing else.

``QFX_WHEEL`` names a wheel that is built already (``make wheel`` sets it); otherwise one is built from a copy of the
tree, through a source distribution, as a release would be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qfx", "passes", "models", "tools")

pytestmark = pytest.mark.xdist_group("wheel")  # one worker builds it, once


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if given := os.environ.get("QFX_WHEEL"):
        return zipfile.ZipFile(given)
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def expected_files() -> set[str]:
    """The runtime files of the tree, by their place in the wheel; a link's files come from the folder it leads to."""
    expected = set()
    for folder, place in (("qfx", "qfx"), ("passes", "qfx/passes"), ("models", "qfx/models"), ("tools", "qfx/tools")):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            data = path.name == "py.typed" or path.parent.name == "vendor"
            if data or path.suffix in {".py", ".cpp", ".h", ".html", ".css", ".js"}:
                expected.add(f"{place}/{relative.as_posix()}")
    return expected


def test_wheel_holds_the_tree(wheel: zipfile.ZipFile) -> None:
    held = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(held) == len(set(held))
    assert set(held) == expected_files()
    assert "qfx/py.typed" in held
    assert any(name.startswith("qfx/csrc/") and name.endswith(".cpp") for name in held)


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = Parser().parsestr(wheel.read(name).decode())
    assert (fields["Name"], fields["Requires-Python"]) == ("qfx", ">=3.11")
    assert fields["License-Expression"] == "Apache-2.0 AND MIT"
    assert set(fields.get_all("Provides-Extra", [])) == {"bench", "browser", "demo", "onnx", "plot", "test"}
    assert any(entry.endswith("/LICENSE") for entry in wheel.namelist())


def test_wheel_is_pure(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl"), "the C++ is compiled on first use, not in the wheel"
