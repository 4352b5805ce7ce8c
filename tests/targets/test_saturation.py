"""CPUs without VNNI, simulated: the plain kernels saturate there, and the leaves of x86 do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.cpu import cpu_features
from qfx.targets.reference import Reference
from qfx.targets.saturation import INT16_MAX, INT16_MIN, halves, may_saturate
from qfx.targets.x86 import X86

from . import regions as r

needs_x86 = pytest.mark.skipif(X86().unavailable() is not None, reason=str(X86().unavailable()))
needs_avx2 = pytest.mark.skipif("avx2" not in cpu_features(), reason="without AVX2 oneDNN has no kernel that saturates")

# Each layer with weights of one sign and large activations, by the leaf of x86, by the reference, and by the leaf of a
# machine that believes to have VNNI: (worst difference of the leaf, of the plain kernel, name of the leaf's kernel).
SCRIPT = """
import json, sys
import torch
import regions as r
from qfx.targets import DynamicQParams, TARGETS
from qfx.targets import x86_per_token, x86_static

x86, reference = TARGETS["x86"], TARGETS["reference"]
token = DynamicQParams(-1, -1, True, -128, 127, torch.int8)
LAYERS = {
    "conv1d": ((8, 16, 3), ([1], [1], [1], 1), (2, 16, 9)),
    "conv2d": ((8, 16, 3, 3), ([1, 1], [1, 1], [1, 1], 1), (2, 16, 6, 5)),
    "conv2d by groups": ((8, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 2), (2, 8, 6, 5)),
    "conv2d 1x1": ((8, 16, 1, 1), ([1, 1], [0, 0], [1, 1], 1), (2, 16, 6, 5)),
    "conv3d": ((8, 16, 2, 2, 2), ([1] * 3, [0] * 3, [1] * 3, 1), (2, 16, 4, 3, 5)),
    "conv_transpose2d": ((16, 8, 4, 4), ([2, 2], [1, 1], [0, 0], 1, [1, 1]), (2, 16, 6, 5)),
    "linear": ((24, 64), (), (5, 64)),
    "linear of one row": ((24, 64), (), (1, 64)),
    "linear per token": ((24, 64), (), (5, 64)),
    "linear of many tokens": ((24, 64), (), (50, 64)),
}
generator = torch.Generator().manual_seed(0)
found = {}
for name, (shape, args, inputs) in LAYERS.items():
    data = token if "token" in name else r.qparams(0.02, 3)
    weight = torch.randint(90, 128, shape, generator=generator).to(torch.int8)
    weight[:: 2] *= -1
    region = r.anchor(name.split()[0], shape, args, data=data, weight=weight)
    x = torch.randint(200, 256, inputs, generator=generator).to(torch.uint8)
    x = x.float() if "token" in name else x
    leaf, expected = x86.lower_anchor(region), reference.lower_anchor(region)(x)
    error = r.relative(leaf(x), expected)
    believed = x86_static.onednn_has_vnni
    x86_static.onednn_has_vnni = lambda: True
    plain = r.relative(x86.lower_anchor(region)(x), expected)
    x86_static.onednn_has_vnni = believed
    found[name] = (error, plain, leaf.kernel)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["AVX512_CORE", "AVX2"])
def limited(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the script prints in a process whose oneDNN is limited to an instruction set without VNNI."""
    paths = [str(Path(r.__file__).parent), *(path for path in sys.path if path), os.getcwd()]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": request.param, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run((sys.executable, "-c", SCRIPT), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs_x86
@needs_avx2
def test_plain_kernels_saturate_without_vnni(limited: dict[str, Any]) -> None:
    assert limited["conv2d"][1] > 0.01
    assert limited["linear"][1] > 0.01
    assert limited["linear of many tokens"][1] > 0.01


@needs_x86
def test_layers_that_could_saturate_are_computed_in_two_halves(limited: dict[str, Any]) -> None:
    for name, (error, _, kernel) in limited.items():
        assert error <= 1e-5, name
        assert "in two halves" in kernel, name


@needs_x86
@pytest.mark.parametrize(
    ("quant_max", "largest", "split"), [(255, 127, True), (255, 64, False), (127, 127, False), (15, 127, False)]
)
def test_only_layers_that_could_saturate_are_split(
    monkeypatch: pytest.MonkeyPatch, quant_max: int, largest: int, split: bool
) -> None:
    monkeypatch.setattr("qfx.targets.x86_static.onednn_has_vnni", lambda: False)
    data = r.qparams(0.02, 3, torch.uint8, 0, quant_max)
    weight = torch.full((6, 4, 3, 3), largest, dtype=torch.int8)
    args = ([1, 1], [1, 1], [1, 1], 1)
    leaf = X86().lower_anchor(r.anchor("conv2d", weight.shape, args, data=data, weight=weight, output=r.qparams(9, 3)))
    assert leaf.kernel == ("onednn conv2d in two halves" if split else "onednn conv2d")  # type: ignore[union-attr]


@needs_x86
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_two_halves_are_the_whole(monkeypatch: pytest.MonkeyPatch, layer: str, dtype: torch.dtype) -> None:
    shape, args, inputs = {
        "conv2d": ((6, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1), (2, 4, 5, 5)),
        "linear": ((6, 31), (), (3, 31)),
    }[layer]
    data = r.qparams(0.02, 3, dtype)
    region = r.anchor(layer, shape, args, data=data, output=r.qparams(0.05, 90))
    named = []
    for vnni in (True, False):
        monkeypatch.setattr("qfx.targets.x86_static.onednn_has_vnni", lambda vnni=vnni: vnni)
        named.append(X86().lower_anchor(region))
    whole, split = named
    assert "in two halves" in split.kernel and "in two halves" not in whole.kernel  # type: ignore[union-attr]
    x = r.integers(inputs, data, torch.Generator().manual_seed(0))
    expected = Reference().lower_anchor(region)(x)  # type: ignore[operator]
    assert r.worst_lsb(split(x), expected) <= 1  # type: ignore[operator]


WEIGHTS = st.lists(st.integers(-128, 127), min_size=1, max_size=6)


@given(rows=st.lists(WEIGHTS, min_size=1, max_size=3), quant_max=st.sampled_from([1, 15, 127, 255]))
def test_bound_is_that_of_the_worst_pair(rows: list[list[int]], quant_max: int) -> None:
    length = max(map(len, rows))
    padded = [row + [0] * (length - len(row)) for row in rows]
    worst = False
    for row in padded:
        pairs = [(a, b) for i, a in enumerate(row) for b in (*row[:i], *row[i + 1 :])] or [(row[0], 0)]
        for a, b in pairs:
            sums = [x * a + y * b for x in (0, quant_max) for y in (0, quant_max)]
            worst |= max(sums) > INT16_MAX or min(sums) < INT16_MIN
    assert may_saturate(torch.tensor(padded, dtype=torch.int8), quant_max) == worst


@given(WEIGHTS)
def test_halves_are_small_and_add_up(weights: list[int]) -> None:
    weight = torch.tensor([weights], dtype=torch.int8)
    one, two = halves(weight)
    assert torch.equal(one.int() + two.int(), weight.int())
    assert int(torch.stack([one, two]).abs().max()) <= 64
    assert not may_saturate(one, 255) and not may_saturate(two, 255)


def test_a_layer_without_weights_saturates_never() -> None:
    assert not may_saturate(torch.empty(3, 0, dtype=torch.int8), 255)
