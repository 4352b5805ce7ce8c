"""What a program that only loads a model does not import: the half of the time that it would take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qfx
from qfx.models import MODELS_SMALL

PROGRAM = """
import sys
import torch
before = set(sys.modules)
import qfx
model = qfx.load(sys.argv[1])
with torch.no_grad():
    model(torch.zeros(1, 3, 64, 64))
print(*sorted(set(sys.modules) - before))
"""
LEFT_OUT = {"jinja2", "matplotlib", "networkx", "onnx", "scipy", "sympy", "torch._dynamo", "torch._inductor"}
OWN = {"qfx.doctor", "qfx.dumping", "qfx.dynamo", "qfx.onnx_export"}


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_loading_a_convolutional_network_imports_little(name: str, tmp_path: Path) -> None:
    model, example = MODELS_SMALL[name]()
    with pytest.warns(qfx.QfxWarning):
        qfx.save(qfx.quantize(model, example, verbose=False), tmp_path / "model.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "qfx.artifact" in imported
    assert not imported & (LEFT_OUT | OWN)


def test_what_is_imported_later_is_there_all_the_same() -> None:
    assert {name for names in qfx._LATER.values() for name in names} < set(qfx.__all__)
    assert set(qfx.__all__) <= set(dir(qfx))
    for module, names in qfx._LATER.items():
        for name in names:
            assert getattr(qfx, name).__module__ == f"qfx.{module}"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qfx.quantise
