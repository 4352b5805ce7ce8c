"""A native program while it is made: its buffers, constants and steps, and the C++ text of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from qfx.targets.native.choice import Choice
from qfx.targets.native.isa import Isa
from qfx.targets.native.memory_plan import ALIGNMENT, aligned, place
from qfx.targets.native.views import Border, Buffer, Element, Place, View, natural_strides, numel

SLACK = 128
"""Bytes that kernels may read behind a buffer's end: they load whole vectors."""

ELEMENTS: dict[torch.dtype, Element] = {
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.bool: "bool",
    torch.float32: "float",
    torch.int64: "int64_t",
}


@dataclass(frozen=True)
class Step:
    """One call that all threads make, between two barriers.

    ``code``: C++ statements; ``reads`` and ``writes`` the buffers that it touches; ``scratch``: a C++ expression of the
    bytes that each thread needs; ``source``: the node that it computes; ``macs`` per sample. ``layer``: what a choice
    of kernels depends on, where there is one; ``choice``: what was chosen.
    """

    code: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    source: str
    kernel: str
    scratch: str = "0"
    macs: int = 0
    layer: str = ""
    choice: Choice | None = None


@dataclass
class Program:
    """What the operators of a region write themselves into."""

    isa: Isa
    threads: int
    inputs: list[Buffer] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    arena: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    declarations: list[str] = field(default_factory=list)
    headers: set[str] = field(default_factory=set)
    tables: list[Tensor] = field(default_factory=list)
    _constants: list[Tensor] = field(default_factory=list)
    _constant_buffers: list[Buffer] = field(default_factory=list)
    _constant_bytes: int = 0
    _names: int = 0

    # --- memory -------------------------------------------------------------------------------------------------------

    def buffer(self, place: Place, element: Element, size: int) -> Buffer:
        held = {"input": self.inputs, "output": self.outputs, "arena": self.arena}[place]
        made = Buffer(place, len(held), element, size)
        held.append(made)
        return made

    def tensor(self, element: Element, sizes: tuple[int, ...], place: Place = "arena") -> View:
        """A new tensor in the natural order of its dimensions."""
        buffer = self.buffer(place, element, numel(sizes))
        return View(buffer, sizes, natural_strides(sizes, buffer.size))

    def image(self, element: Element, sizes: tuple[int, ...], border: Border) -> View:
        """A new image ``[BATCH, C, H, W]``, channels last, with a border."""
        batch, channels, height, width = sizes
        row = (border.left + width + border.right) * channels
        size = (border.top + height + border.bottom) * row
        buffer = self.buffer("arena", element, size)
        offset = border.top * row + border.left * channels
        return View(buffer, (batch, channels, height, width), (size, 1, row, channels), offset, border)

    def constant(self, tensor: Tensor) -> str:
        """Put ``tensor`` among the constants; a C++ expression that points to it."""
        data = tensor.detach().contiguous()
        element = "int16_t" if data.dtype == torch.int16 else _CONSTANT[data.dtype]
        offset = self._constant_bytes
        self._constants.append(data)
        self._constant_bytes += aligned(data.numel() * data.element_size() + SLACK)
        return f"reinterpret_cast<const {element}*>(constants + {offset})"

    def constant_view(self, tensor: Tensor) -> View:
        """The same as a tensor that steps read."""
        data = tensor.detach().contiguous()
        buffer = Buffer("constant", self._constant_bytes, ELEMENTS[data.dtype], data.numel())
        self.constant(data)
        self._constant_buffers.append(buffer)
        return View(buffer, tuple(data.shape), data.stride())

    def table(self, tensor: Tensor) -> Buffer:
        """A tensor that stays where it is, since it is large and read at a few places; it is handed in with the inputs.

        All inputs proper must have been made before.
        """
        self.tables.append(tensor.detach().contiguous())
        return self.buffer("input", ELEMENTS[tensor.dtype], tensor.numel())

    def constants(self) -> Tensor:
        """All constants, uint8, in the places that :meth:`constant` told."""
        blob = torch.zeros(self._constant_bytes + SLACK, dtype=torch.uint8)
        at = 0
        for data in self._constants:
            size = data.numel() * data.element_size()
            blob[at : at + size] = data.flatten().view(torch.uint8)
            at += aligned(size + SLACK)
        return blob

    # --- text ---------------------------------------------------------------------------------------------------------

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}_{self._names}"

    def declare(self, type_: str, prefix: str, value: str) -> str:
        """A C++ constant; returns its name."""
        name = self.name(prefix)
        self.declarations.append(f"constexpr {type_} {name}{value};")
        return name

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def source(self) -> str:
        """The translation unit."""
        pointers = {buffer: f"arena + n * offsets[{buffer.index}]" for buffer in self.arena}
        for kind, buffers in (("inputs", self.inputs), ("outputs", self.outputs)):
            pointers |= {buffer: f"{kind}[{buffer.index}]" for buffer in buffers}
        pointers |= {buffer: f"constants + {buffer.index}" for buffer in self._constant_buffers}
        scratch = ", ".join(dict.fromkeys(["int64_t{0}", *(f"int64_t({step.scratch})" for step in self.steps)]))
        headers = sorted({self.isa.header, "../parallel.h", "team.h", *self.headers})
        return _UNIT.format(
            headers="\n".join(f'#include "{header}"' for header in headers),
            dot=self.isa.dot,
            declarations="\n".join(self.declarations),
            functions="\n".join(_function(i, step, pointers) for i, step in enumerate(self.steps)),
            alignment=ALIGNMENT,
            scratch=scratch,
            count=len(self.steps),
            calls="\n".join(f"    QFX_STEP({i})" for i in range(len(self.steps))),
        )

    def plan(self) -> tuple[list[int], int]:
        """Offsets in the arena of its buffers, and its bytes, both per sample."""
        offsets, size = place(self._lives())
        return [offsets.get(buffer, 0) for buffer in self.arena], size

    def apart(self) -> tuple[list[int], int]:
        """The same with no memory shared, so that every value can be looked at after a run."""
        ends = list(accumulate((aligned(buffer.bytes) for buffer in self.arena), initial=0))
        return ends[:-1], ends[-1]

    def _lives(self) -> dict[Buffer, tuple[int, int]]:
        lives: dict[Buffer, tuple[int, int]] = {}
        for i, step in enumerate(self.steps):
            for buffer in _arena((*step.reads, *step.writes)):
                lives[buffer] = (lives.get(buffer, (i, i))[0], i)
        return lives


_CONSTANT = {**ELEMENTS, torch.int32: "int32_t", torch.bfloat16: "uint16_t", torch.float16: "uint16_t"}


def _arena(buffers: Iterable[Buffer]) -> list[Buffer]:
    return [buffer for buffer in buffers if buffer.place == "arena"]


def pointer(buffer: Buffer, offset: int = 0) -> str:
    """The C++ pointer, within a step, to an element of a buffer."""
    name = f"{buffer.place}_{buffer.index}"
    return f"{name} + {offset}" if offset else name


def _function(number: int, step: Step, pointers: dict[Buffer, str]) -> str:
    lines = [f"// {step.source}: {step.kernel}", f"static void step_{number}(const Run& run, const Team& team) {{"]
    fields = "inputs, outputs, constants, arena, offsets, scratches, scratch_size, n, wrong"
    lines.append(f"  [[maybe_unused]] const auto& [{fields}] = run;")
    lines.append("  [[maybe_unused]] char* const scratch = scratches + team.rank * scratch_size;")
    for buffer in dict.fromkeys((*step.reads, *step.writes)):
        kind = f"{buffer.element}*" if buffer in step.writes else f"const {buffer.element}*"
        lines.append(f"  auto* const {pointer(buffer)} = reinterpret_cast<{kind}>({pointers[buffer]});")
    return "\n".join([*lines, *(f"  {line}" for line in step.code.splitlines()), "}"])


_UNIT = """\
// Made by qfx from a lowered graph. One function a step; every thread calls all of them, with a barrier between two.

#include <omp.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cmath>

{headers}

namespace {{

using namespace qfx;
using Dot = {dot};

struct Run {{
  const char* const* inputs;
  char* const* outputs;
  const char* constants;
  char* arena;
  const int64_t* offsets;
  char* scratches;
  int64_t scratch_size;
  int64_t n;
  std::atomic<int>& wrong;
}};

{declarations}

{functions}

int64_t nanoseconds() {{
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{{1000000000}} + now.tv_nsec;
}}

}}  // namespace

QFX_API int64_t qfx_scratch() {{ return (std::max({{{scratch}}}) + {alignment} - 1) / {alignment} * {alignment}; }}

// `offsets`: of the buffers in the arena, in bytes per sample. `times`: null, or where the nanoseconds of each of the
// {count} steps are written. Not zero if an index led out of its table.
QFX_API int qfx_run(const char* const* inputs, char* const* outputs, const char* constants, char* arena,
                    const int64_t* offsets, char* scratches, int64_t n, int threads, int64_t* times) {{
  std::atomic<int> wrong{{0}};
  const Run run{{inputs, outputs, constants, arena, offsets, scratches, qfx_scratch(), n, wrong}};
#define QFX_STEP(i)                                       \\
  step_##i(run, team);                                    \\
  _Pragma("omp barrier")                                  \\
  if (times != nullptr && team.rank == 0) {{               \\
    const int64_t now = nanoseconds();                    \\
    times[i] = now - before;                              \\
    before = now;                                         \\
  }}
#pragma omp parallel num_threads(forked ? 1 : threads)
  {{
    const Team team{{omp_get_thread_num(), omp_get_num_threads()}};
    [[maybe_unused]] int64_t before = times != nullptr ? nanoseconds() : 0;
{calls}
  }}
  return wrong;
}}
"""
