"""What every test gets: the stage verifier on, few threads, the same seeds, and hypothesis without a clock.

The variables are set before qfx or torch is imported, and subprocesses inherit them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable

os.environ.setdefault("QFX_CHECK", "1")
# One thread for each of several test processes, else two: results must not depend on how many cores there are.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(THREADS)

collect_ignore = ["plugin"]  # somebody else's package with tests of its own; test_plugin.py installs it and runs them

# Derandomized: a failure is the commit's, not the day's. `make nightly` looks further.
settings.register_profile("fast", deadline=None, max_examples=25, derandomize=True, database=None)
settings.register_profile("nightly", deadline=None, max_examples=500, database=None)
settings.load_profile("fast")


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def no_jit() -> Callable[[str], str]:
    """Runs a program where qfx compiles nothing, as on a machine without a compiler, and returns what it prints.

    A new interpreter, because a library that is loaded stays loaded.
    """

    def run(program: str) -> str:
        environment = {**os.environ, "QFX_NO_JIT": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
