"""Generated C++, compiled together with the headers of the native engine."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from qfx import jit
from qfx.errors import NativeError

HEADERS = Path(jit.__file__).parent / "csrc" / "native"


def headers() -> list[Path]:
    """All that generated code includes of qfx."""
    return sorted([*HEADERS.glob("*.h"), *HEADERS.parent.glob("*.h")])


@functools.cache
def digest() -> str:
    """Of the headers' text: what was measured with other kernels is not to be believed."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in headers())).hexdigest()[:12]


def load(text: str, flags: tuple[str, ...] = ()) -> Any:
    """The library of one translation unit; ``flags`` are further ones for the compiler.

    Raises:
        NativeError: there is no compiler, or it failed.
    """
    with tempfile.TemporaryDirectory(prefix="qfx-") as folder:
        unit = Path(folder) / "native.cpp"
        unit.write_text(text, encoding="utf-8")
        library = jit.load((unit, *headers()), flags=(f"-I{HEADERS}", *flags), prelude=HEADERS / "prelude.h")
    if library is None:
        raise NativeError(f"there is no compiler: {jit.unavailable()}", hint="install g++, or use target='x86'")
    return library
