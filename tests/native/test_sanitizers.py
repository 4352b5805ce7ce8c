"""The nets of the other tests, with sanitizers in what is compiled: no byte outside of a tensor is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qfx import jit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}"),
]

HERE = Path(__file__).parent
LIBRARIES = ("libasan.so", "libubsan.so")
CASES = {
    "layers": ("test_native_layers.py", "convolutions or few_bits or residuals or images or rows"),
    "signed": ("test_native_layers.py", "signed"),
    "points": ("test_native_points.py", ""),
    "floats": ("test_native_floats.py", ""),
    "products": ("test_products.py", ""),
    "elementwise": ("test_native_elementwise.py", ""),
    "models": ("test_native_models.py", "our_own"),
    "windows": ("test_windows.py", "operators or swin"),
}


def runtime(name: str) -> Path:
    """The sanitizer's library of the compiler in use."""
    found = jit.compiler()
    assert found is not None
    told = subprocess.run((*found.command, f"-print-file-name={name}"), capture_output=True, text=True, check=True)
    return Path(told.stdout.strip())


@pytest.mark.parametrize("case", CASES)
def test_no_byte_outside_is_touched(case: str, tmp_path: Path) -> None:
    libraries = [runtime(name) for name in LIBRARIES]
    if not all(library.is_absolute() and library.exists() for library in libraries):
        pytest.skip("this compiler comes without sanitizers")
    file, which = CASES[case]
    environment = {
        **os.environ,
        "QFX_TEST_SANITIZE": "1",
        "QFX_CACHE_DIR": str(tmp_path),
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    }
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, str(HERE / file))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-8000:])
