"""A native program, compiled and loaded: tensors in, tensors out."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx.targets.native.choice import Choice, Vary
from qfx.targets.native.emitter import Emitter
from qfx.targets.native.isa import Isa
from qfx.targets.native.library import load
from qfx.targets.native.memory_plan import ALIGNMENT
from qfx.targets.native.operators import operator_of
from qfx.targets.native.program import SLACK, Program, Step
from qfx.targets.native.shapes import sizes_of
from qfx.targets.native.views import BATCH, Element, View

_DTYPES: dict[Element, torch.dtype] = {
    "uint8_t": torch.uint8,
    "int8_t": torch.int8,
    "bool": torch.bool,
    "float": torch.float32,
    "int64_t": torch.int64,
}


Memory = tuple[Tensor, Tensor]
"""The arena, and the scratch of all threads."""

Offsets = tuple[Any, int]
"""Of the arena's buffers, as C's array, and the arena's bytes; both per sample."""


@dataclass
class Compiled:
    """A program for one set of sizes, with any number of samples. It may be called from several threads at once.

    ``steps``: what it does, in order. ``text``: its C++. ``values``: where the value of each node is.
    """

    steps: tuple[Step, ...]
    text: str
    values: Mapping[str, View]
    _library: Any
    _constants: Tensor
    _tables: tuple[Tensor, ...]
    _outputs: tuple[View, ...]
    _joined: tuple[int | None, ...]
    _plan: Offsets
    _apart: Offsets
    _memory: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on contiguous CPU tensors of the sizes that it was made for; the first dimension is the batch."""
        return self._run_pooled(inputs, None)

    @property
    def constant_bytes(self) -> int:
        """Bytes of weights and other constants."""
        return self._constants.numel()

    def profile(self, *inputs: Tensor) -> tuple[int, ...]:
        """Nanoseconds of each step in one run."""
        times = (ctypes.c_int64 * max(len(self.steps), 1))()
        self._run_pooled(inputs, times)
        return tuple(times[: len(self.steps)])

    def probe(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What every node computes in one run, by the node's name."""
        samples = inputs[0].shape[0]
        memory = self._fresh(samples, torch.get_num_threads(), self._apart)
        outputs = self._run(inputs, memory, self._apart, None)
        made = {view.buffer.index: y for view, y in zip(self._outputs, outputs, strict=True)}
        whole = {"input": dict(enumerate(inputs)), "output": made}
        start = _aligned(memory[0]) - memory[0].data_ptr()
        found = {}
        for name, view in self.values.items():
            buffer, sizes = view.buffer, [samples if size == BATCH else size for size in view.sizes]
            if buffer.place == "arena":
                begin = start + self._apart[0][buffer.index] * samples
                flat = memory[0][begin : begin + buffer.bytes * samples].view(_DTYPES[view.element])
            else:
                flat = whole[buffer.place][buffer.index].flatten()
            found[name] = flat.as_strided(sizes, view.strides, flat.storage_offset() + view.offset).clone()
        return found

    def _run_pooled(self, inputs: Sequence[Tensor], times: Any) -> tuple[Tensor, ...]:
        samples, threads = inputs[0].shape[0], torch.get_num_threads()
        memory = self._take(samples, threads)
        outputs = self._run(inputs, memory, self._plan, times)
        self._memory.append((samples, threads, *memory))
        return outputs

    def _run(self, inputs: Sequence[Tensor], memory: Memory, offsets: Offsets, times: Any) -> tuple[Tensor, ...]:
        samples, threads = inputs[0].shape[0], torch.get_num_threads()
        outputs = tuple(
            torch.empty([samples if size == BATCH else size for size in view.sizes], dtype=_DTYPES[view.element])
            for view in self._outputs
        )
        if samples == 0:
            return self._given(outputs)
        arena, scratch = (_aligned(m) for m in memory)
        given = [x.data_ptr() for x in (*inputs, *self._tables)]
        data = (ctypes.c_void_p * len(given))(*given)
        results = (ctypes.c_void_p * len(outputs))()
        for view, y in zip(self._outputs, outputs, strict=True):
            results[view.buffer.index] = y.data_ptr()
        constants = self._constants.data_ptr()
        if self._library.qfx_run(data, results, constants, arena, offsets[0], scratch, samples, threads, times):
            raise IndexError("index out of range in self")  # what torch's own embedding says
        return self._given(outputs)

    def _given(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs with as many dimensions as the graph gives them."""
        return tuple(
            y if joined is None else y.flatten(joined, joined + 1)
            for y, joined in zip(outputs, self._joined, strict=True)
        )

    def _take(self, samples: int, threads: int) -> Memory:
        """Memory for one run: what an earlier one left, where it fits. Lists pop and append atomically."""
        while self._memory:
            had_samples, had_threads, *memory = self._memory.pop()
            if had_samples == samples and had_threads == threads:
                return memory[0], memory[1]
        return self._fresh(samples, threads, self._plan)

    def _fresh(self, samples: int, threads: int, offsets: Offsets) -> Memory:
        arena = torch.empty(samples * offsets[1] + SLACK + ALIGNMENT, dtype=torch.uint8)
        scratch = torch.empty(self._library.qfx_scratch() * threads + ALIGNMENT, dtype=torch.uint8)
        return arena, scratch


def _aligned(memory: Tensor) -> int:
    return -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT


def emitted(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    isa: Isa,
    *,
    choices: Mapping[str, Choice] | None = None,
    vary: Vary | None = None,
) -> tuple[Emitter, tuple[View, ...]]:
    """A region's program, as the emitter has written it, and its outputs; arguments as for :func:`build`.

    Raises:
        NotNative: with these sizes, it has no native form.
    """
    program = Program(isa, torch.get_num_threads())
    emitter = Emitter(gm, sizes_of(gm, inputs), program, operator_of, choices=choices or {}, vary=vary)
    outputs = emitter.run(inputs)
    assert sorted(view.buffer.index for view in outputs) == list(range(len(program.outputs))), "a buffer for each"
    return emitter, outputs


def build(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    isa: Isa,
    *,
    choices: Mapping[str, Choice] | None = None,
    vary: Vary | None = None,
    flags: tuple[str, ...] = (),
) -> Compiled:
    """Compile a region for inputs of such sizes.

    Args:
        gm: the region's graph.
        inputs: examples.
        isa: the instructions to use; this machine must have them, unless ``flags`` bring a stand-in.
        choices: how layers are computed, by the names of their nodes.
        vary: layers that are computed in all ways, for a measurement.
        flags: further flags for the compiler.

    Raises:
        NotNative: with these sizes, it has no native form.
        NativeError: the compiler failed.
    """
    emitter, outputs = emitted(gm, inputs, isa, choices=choices, vary=vary)
    program = emitter.program
    text = program.source()
    library = _load(text, flags)
    known = {node.name: view for node, view in emitter.values.items() if isinstance(view, View)}
    values = {name: view for name, view in known.items() if view.buffer.place != "constant"}
    plans = [_offsets(*plan) for plan in (program.plan(), program.apart())]
    constants, tables = program.constants(), tuple(program.tables)
    steps = tuple(program.steps)
    joined = tuple(emitter.sizes.joined.get(node) for node in gm.graph.output_node().all_input_nodes)
    return Compiled(
        steps, text, values, library, constants, tables, outputs, joined, _plan=plans[0], _apart=plans[1]
    )


def _offsets(offsets: list[int], size: int) -> Offsets:
    return (ctypes.c_int64 * max(len(offsets), 1))(*offsets), size


def _load(text: str, flags: tuple[str, ...]) -> Any:
    library = load(text, flags)
    library.qfx_scratch.argtypes, library.qfx_scratch.restype = [], ctypes.c_int64
    pointers = [ctypes.c_void_p] * 6
    library.qfx_run.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    library.qfx_run.restype = ctypes.c_int
    return library
