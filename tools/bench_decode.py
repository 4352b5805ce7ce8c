"""One token of a language model with 4-bit weights, against torch's own kernels and the memory's bandwidth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx, nn

import qfx
from qfx import jit
from qfx.models.llama import LlamaConfig, build_llama
from qfx.targets.native.inlined import regions_of
from qfx.tools.bench_calls import call
from qfx.tools.bench_figures import Figure, Options, Skip, at_least, at_most
from qfx.tools.bench_timing import Candidate, take_turns

DECODER = LlamaConfig(vocab_size=32000, dim=768, layers=12, heads=12, kv_heads=12, hidden=2048, max_length=64)
"""110 million parameters."""

WORKING_SET = 2**28
"""Bytes that are read to find the memory's bandwidth: many times what a last-level cache gives to two cores."""

NATIVE, TORCH, READ = "native float32", "torch int4 in bfloat16", "read"


def decode(options: Options, *, config: LlamaConfig = DECODER, rounds: int = 7) -> Iterator[Figure]:
    """Time of one token, weights int4 in groups of 32, and the share of the memory's bandwidth that this takes.

    Raises:
        Skip: no native program can be made here.
    """
    if (reason := jit.unavailable()) is not None:
        raise Skip(f"no native programs: {reason}")
    token = (torch.ones(1, 1, dtype=torch.int64),)
    model = build_llama(config, seed=0)
    native = _quantized(model, token, "native")
    peer = _quantized(build_llama(config, seed=0).bfloat16(), token, "x86")
    memory = torch.ones(WORKING_SET // 8, dtype=torch.int64)
    times = take_turns(
        [
            Candidate(NATIVE, partial(call, native, token)),
            Candidate(TORCH, partial(call, peer, token)),
            Candidate(READ, lambda: int(memory.sum())),
        ],
        rounds=rounds,
    )
    ratio = 1 / times.speedup(NATIVE, TORCH)
    yield Figure("decode: time of a token against torch's int4 path", ratio, "x", at_most(0.8), str(times))
    programs = [program for region in regions_of(native).values() for program in region.programs]
    held = sum(program.constant_bytes for program in programs)
    rounds_ = zip(times.rounds[NATIVE], times.rounds[READ], strict=True)
    shares = [held / mine / (WORKING_SET / read) for mine, read in rounds_]
    note = f"{held / 2**20:.0f} MiB of weights; memory {WORKING_SET / min(times.rounds[READ]) / 1e6:.1f} GB/s"
    yield Figure("decode: share of the memory's bandwidth", sorted(shares)[len(shares) // 2], "", at_least(0.7), note)


def _quantized(model: nn.Module, token: tuple[Tensor, ...], target: str) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qfx.QfxWarning)
        made = qfx.quantize(model, token, recipe=qfx.Recipe.w4a16(32), target=target, verbose=False)
    assert isinstance(made, fx.GraphModule)
    return made
