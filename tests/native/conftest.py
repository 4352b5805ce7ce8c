"""``QFX_TEST_SANITIZE=1`` compiles native programs with the sanitizers, whose runtimes must be loaded beforehand."""

from __future__ import annotations

import functools
import os

import pytest

from qfx.targets.native import making

FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all")


@pytest.fixture(autouse=True, scope="session")
def _sanitized() -> None:
    if os.environ.get("QFX_TEST_SANITIZE") == "1":
        making.build = functools.partial(making.build, flags=FLAGS)  # type: ignore[attr-defined]
