"""Layers of the native engine in every instruction set, exactly; what this machine lacks is emulated in plain C++."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from qfx import jit
from qfx.cpu import cpu_features
from qfx.targets.native.agreement import compare
from qfx.targets.native.choice import Choice
from qfx.targets.native.compiled import Compiled, build, emitted
from qfx.targets.native.isa import ISAS, Isa
from qfx.targets.native.library import HEADERS
from qfx.targets.native.region import NativeRegion

from . import many_products as p
from .many_layers import INT8, Case, graph_of, inputs_of

EMULATION = Path(__file__).parent / "emulation"
_AVX2 = ("-DQFX_EMULATED", "-D__AVX2__", "-D__FMA__")
_AVX512 = (*_AVX2, "-D__AVX512F__", "-D__AVX512BW__", "-D__AVX512VL__", "-D__AVX512DQ__", "-D__AVX512VNNI__")
FEATURES = {
    "avx2": _AVX2,
    "avx_vnni": (*_AVX2, "-D__AVXVNNI__"),
    "avx512_vnni": _AVX512,
    "amx": (*_AVX512, "-D__AMX_TILE__", "-D__AMX_INT8__"),
}

CASES = (
    Case(64, 64, (9, 9), (3, 3), padding=(1, 1)),
    Case(64, 40, (7, 7), (1, 1)),
    Case(3, 24, (20, 20), (7, 7), stride=2, padding=(3, 3)),
    Case(96, 33, (5, 5), (3, 3), padding=(1, 1), addend=True),
    Case(64, 32, (35, 33), (3, 3), stride=2, padding=(1, 1)),
    Case(128, 32, (8, 8), (1, 1), stride=2),
    Case(64, 48, (6, 20), (3, 3), padding=(1, 1), dilation=2),
    Case(64, 16, (3, 3), (5, 5), padding=(3, 3)),
    Case(16, 48, (1, 1), (1, 1), floats=True),
    Case(5, 7, (6, 5), (3, 3), padding=(1, 1), addend=True),
    Case(32, 64, (6, 6), (3, 3), padding=(1, 1), groups=4),
    Case(24, 24, (7, 7), (3, 3), padding=(1, 1), groups=24),
    Case(64, 20, (4, 17), (1, 3), padding=(0, 1)),
    Case(70, 35, (9, 40), (3, 1), padding=(1, 0)),
    Case(64, 37),
    Case(100, 10, floats=True),
    Case(128, 65, (17,), addend=True),
    Case(64, 33, (5, 18), (3, 3), padding=(1, 1), data=INT8),
    Case(3, 20, (6, 7), (3, 3), padding=(1, 1), addend=True, data=INT8),
    Case(18, 18, (5, 5), (3, 3), padding=(1, 1), groups=18, data=INT8),
    Case(65, 34, (3,), data=INT8),
)
# One for each way of data to the tiles: along an image, along rows, gathered, over all samples.
WAYS = (
    Case(64, 64, (9, 9), (3, 3), padding=(1, 1)),
    Case(64, 64, (9, 32), (3, 3), stride=2, padding=(1, 1)),
    Case(64, 64, (9, 9), (3, 3), stride=2, padding=(1, 1)),
    Case(80, 33, (40,), floats=True),
)

PRODUCTS = (
    p.Case(13, 21, 35, (2,), output=INT8),
    p.Case(9, 130, 17, left=p.ODD, right=p.INT8, right_order=(0, 2, 1)),
    p.Case(5, 7, 33, (3,), right=p.HIGH, steps=(p.ADD, p.RELU), left_order=(0, 2, 1, 3), right_order=(0, 3, 2, 1)),
    p.Case(70, 1, 1, left=p.INT8, right=p.ODD, output=INT8, steps=(p.RELU,)),
)

pytestmark = [
    pytest.mark.skipif(jit.unavailable() is not None, reason="C++ cannot be compiled here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation stands on SSE2"),
    pytest.mark.xdist_group("emulated"),
]


class Given(NativeRegion):
    """A region that runs a program which was made for it."""

    def __init__(self, graph: fx.GraphModule, given: Compiled) -> None:
        super().__init__(graph)
        self.given = given

    def outcome(self, *inputs: Tensor) -> Compiled:
        return self.given


@dataclass(frozen=True)
class Made:
    cases: tuple[Case, ...]
    region: Given

    @property
    def text(self) -> str:
        return self.region.given.text

    def worst(self, samples: int) -> tuple[int, float]:
        """The greatest difference from the reference over all integers, and over all floats."""
        inputs = inputs_of(self.cases, samples)
        found = compare(self.region, inputs, exact=True)
        assert len(found) == len(self.cases) + len(inputs)
        return max(d.lsb or 0 for d in found), max(d.relative or 0.0 for d in found)

    def tile_products(self, samples: int) -> int:
        """Of one run."""
        count = self.region.given._library.emulated_tile_products
        count.restype = ctypes.c_long
        before = count()
        self.region.given(*inputs_of(self.cases, samples))
        return int(count() - before)


class Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("size", ctypes.c_long))


def emulation(name: str) -> tuple[str, ...]:
    """Flags that bring the stand-in for the instructions; what it is counts in the compiler cache's key."""
    known = hashlib.sha256((EMULATION / "immintrin.h").read_bytes()).hexdigest()
    return ("-march=x86-64", f"-I{EMULATION}", "-Wno-psabi", f"-DEMULATION_{known[:16]}", *FEATURES[name])


def isa_of(name: str) -> Isa:
    (isa,) = [isa for isa in ISAS if isa.name == name]
    return isa


@functools.cache
def made(cases: tuple[Case, ...], name: str, *more: str, scale: float | None = None) -> Made:
    """A program for the instruction set of that name; ``scale`` as of :class:`Choice`.

    It is emulated where this machine has not got it, and where there are more flags.
    """
    isa, graph = isa_of(name), graph_of(cases)
    here = not isa.feature or (isa.feature in cpu_features() and not more)
    flags = ("-O1", *(() if here else emulation(name)), *more)
    choices = {f"layer_{i}": Choice(scale=scale) for i in range(len(cases))}
    return Made(cases, Given(graph, build(graph, inputs_of(cases, 1), isa, choices=choices, flags=flags)))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("samples, threads", [(1, 1), (3, 2)])
@pytest.mark.parametrize("isa", [isa.name for isa in ISAS])
def test_every_layer_is_exact(isa: str, samples: int, threads: int) -> None:
    program = made(CASES, isa)
    torch.set_num_threads(threads)
    assert program.worst(samples) == (0, 0.0)


@pytest.mark.parametrize(
    "isa", ["avx512_vnni", "avx_vnni", *(pytest.param(n, marks=pytest.mark.slow) for n in ("amx", "avx2", "portable"))]
)
def test_every_product_of_activations_is_exact(isa: str) -> None:
    graph, here = p.graph_of(PRODUCTS), isa_of(isa)
    flags = ("-O1", *(() if not here.feature or here.feature in cpu_features() else emulation(isa)))
    region = Given(graph, build(graph, p.inputs_of(PRODUCTS, 1), here, flags=flags))
    for samples, threads in ((1, 1), (3, 2)):
        torch.set_num_threads(threads)
        found = compare(region, p.inputs_of(PRODUCTS, samples), exact=True)
        assert sum(d.node.op == "call_module" for d in found) == len(PRODUCTS)
        assert not any(d.lsb or d.relative for d in found)


def test_data_reach_the_tiles_in_every_way() -> None:
    text = made(CASES, "amx").text
    assert set(re.findall(r"Line::(\w+)", text)) == {"kNone", "kRow", "kImage", "kAll"}


@pytest.mark.parametrize("samples, threads", [(1, 1), (2, 2), (17, 3)])
def test_tiles_in_small_chunks(samples: int, threads: int) -> None:
    program = made(WAYS, "amx", "-DEMULATED_PERMISSION=0L", scale=1 / 32)
    assert len(re.findall(r"Line::\w+, \d+, \d+, 32}", program.text)) == len(WAYS)
    torch.set_num_threads(threads)
    assert program.worst(samples) == (0, 0.0)


def test_tiles_multiply_no_more_than_they_must() -> None:
    sixteens = [-(-(8 * 11 + 9) // 16), 5, -(-25 // 16), -(-40 // 16)]
    channels, depth = [4, 4, 4, 4], [9, 9, 9, 2]  # in sixteens, in 64s
    products = sum(a * b * c for a, b, c in zip(sixteens, channels, depth, strict=True))
    assert made(WAYS, "amx", "-DEMULATED_PERMISSION=0L", scale=1 / 32).tile_products(1) == products


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_tiles_are_loaded_from_the_memory_of_the_program(samples: int) -> None:
    """No sixteen of positions reaches behind its images: here they are all that the arena holds."""
    cases = WAYS[-1:]
    program = made(cases, "amx", "-DEMULATED_PERMISSION=0L").region.given
    memory = program._fresh(samples, 1, program._plan)
    known = [Range(m.data_ptr(), m.numel()) for m in (*memory, program._constants)]
    ranges, count = (Range * len(known))(*known), program._library.emulated_strays
    before = count(ranges, len(known))
    torch.set_num_threads(1)
    program._run(inputs_of(cases, samples), memory, program._plan, None)
    assert count(None, 0) == before


def test_without_permission_there_are_no_tiles() -> None:
    program = made(WAYS, "amx", "-DEMULATED_PERMISSION=-1L")
    assert program.tile_products(2) == 0
    assert program.worst(2) == (0, 0.0)


@pytest.mark.parametrize(
    "isa, arch", [("amx", "sapphirerapids"), ("avx512_vnni", "icelake-server"), ("avx_vnni", "alderlake")]
)
def test_the_real_instructions_compile(isa: str, arch: str, tmp_path: Path) -> None:
    compiler = jit.compiler()
    assert compiler is not None
    first = (*compiler.command, "-std=c++17", "-O3", "-fopenmp", f"-march={arch}", f"-I{HEADERS}")
    if subprocess.run((*first, "-E", "-x", "c++", "/dev/null"), capture_output=True).returncode != 0:
        pytest.skip(f"{compiler.version} does not know {arch}")
    unit = tmp_path / "unit.cpp"
    emitter, _ = emitted(graph_of(WAYS), inputs_of(WAYS, 1), isa_of(isa))
    unit.write_text(emitter.program.source())
    done = subprocess.run((*first, "-c", str(unit), "-o", str(tmp_path / "unit.o")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
