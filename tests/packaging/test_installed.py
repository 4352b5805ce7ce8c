"""qfx as a stranger has it: installed, away from the checkout, with nothing but its declared dependencies."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from torch import nn

import qfx

ROOT = Path(__file__).parents[2]


def test_the_installed_one_is_tested() -> None:
    """In the wheel's environment the checkout must not be what is imported."""
    from_checkout = Path(qfx.__file__).resolve().is_relative_to(ROOT / "qfx")
    assert from_checkout == ("QFX_WHEEL" not in os.environ)


def test_every_module_can_be_imported() -> None:
    names = [item.name for item in pkgutil.walk_packages(qfx.__path__, "qfx.")]
    assert {"qfx.passes", "qfx.models", "qfx.tools", "qfx.targets", "qfx.tools.env"} <= set(names)
    for name in names:
        if not name.endswith(".__main__"):
            importlib.import_module(name)


def test_data_files_are_there() -> None:
    package = resources.files("qfx")
    assert package.joinpath("py.typed").is_file()
    assert any(item.name.endswith(".cpp") for item in package.joinpath("csrc").iterdir())


def test_a_model_goes_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(4, 3, 8, 8)
    quantized = qfx.quantize(model, x, calibration=[x], verbose=False)
    expected = model(x)
    assert (quantized(x) - expected).norm() < 0.1 * expected.norm()


def test_no_compiler_is_needed(no_jit: Callable[[str], str]) -> None:
    program = "import qfx.jit; print(qfx.jit.unavailable())"
    assert "QFX_NO_JIT" in no_jit(program)


def test_env_tool_runs_anywhere(tmp_path: Path) -> None:
    """A fresh folder as the working one: nothing of the checkout is needed."""
    command = [sys.executable, "-m", "qfx.tools.env"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
    assert facts["qfx"].split()[0] == qfx.__version__
    assert facts["torch"].split()[0] == torch.__version__
    assert {"python", "os", "cpu", "threads", "compiler", "kernels", "onednn"} <= set(facts)
