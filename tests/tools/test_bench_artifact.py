"""The benchmark of saved models, on a shallow one."""

from __future__ import annotations

import pytest

from qfx.tools.bench_artifact import artifact
from qfx.tools.bench_figures import Options


@pytest.mark.slow
def test_sizes_seconds_and_memory_are_told() -> None:
    sizes = list(artifact(Options(), depth=18, rounds=1, image_size=32))
    assert [f.verdict for f in sizes if f.unit == "x float"] == ["met", "", "met"]
    seconds, resident = sizes[-2:]
    assert seconds.unit == "s" and seconds.value is not None and seconds.value > 0
    assert resident.unit == "MiB" and "stay mapped" in resident.note
