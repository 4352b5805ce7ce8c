"""The decode benchmark on a tiny model: what it shows and from which numbers. No test asserts a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from qfx import jit
from qfx.models.llama import LlamaConfig
from qfx.targets.native.inlined import regions_of
from qfx.tools import bench, bench_decode
from qfx.tools.bench_decode import NATIVE, READ, TORCH, decode
from qfx.tools.bench_figures import Figure, Options, Skip, table
from qfx.tools.bench_timing import Candidate, Times

TINY = LlamaConfig(vocab_size=64, dim=64, layers=1, heads=2, kv_heads=2, hidden=64, max_length=8)

native_programs = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")
pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

ROUNDS = {NATIVE: (2.0, 4.0, 1.0), TORCH: (4.0, 5.0, 5.0), READ: (8.0, 4.0, 2.0)}
"""Milliseconds."""


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Figure], dict[str, Callable[[], object]], int]:
    """The figures of times that are given; the calls that would have been timed; and the bytes of the weights."""
    calls: dict[str, Callable[[], object]] = {}
    models = []
    real = bench_decode._quantized

    def quantized(model: torch.nn.Module, token: tuple[torch.Tensor, ...], target: str) -> torch.fx.GraphModule:
        made = real(model, token, target)
        models.append((target, made))
        return made

    def turns(candidates: Sequence[Candidate], *, rounds: int) -> Times:
        assert rounds == 3
        calls.update({candidate.name: candidate.call for candidate in candidates})
        return Times(ROUNDS)

    monkeypatch.setattr(bench_decode, "_quantized", quantized)
    monkeypatch.setattr(bench_decode, "take_turns", turns)
    monkeypatch.setattr(bench_decode, "WORKING_SET", 2**16)
    found = list(decode(Options(), config=TINY, rounds=3))
    (held,) = [
        sum(p.constant_bytes for r in regions_of(made).values() for p in r.programs)
        for target, made in models
        if target == "native"
    ]
    assert [target for target, _ in models] == ["native", "x86"]
    return found, calls, held


@native_programs
def test_figures(figures: tuple[list[Figure], dict[str, Callable[[], object]], int]) -> None:
    (ratio, share), calls, held = figures
    assert ratio.what == "decode: time of a token against torch's int4 path"
    assert ratio.value == pytest.approx(1 / 2)  # the median of 4 / 2, 5 / 4 and 5 / 1
    assert (str(ratio.bar), ratio.unit, ratio.verdict) == ("≤ 0.8", "x", "met")
    assert all(name in ratio.note for name in (NATIVE, TORCH, READ))
    assert share.what == "decode: share of the memory's bandwidth"
    layers = 4 * 64 * 64 + 3 * 64 * 64 + 64 * 64
    assert layers / 2 < held < 2 * layers  # half a byte each, then scales and the norms
    assert share.value == pytest.approx(held / 2**16 * 2)  # the median of 8 / 2, 4 / 4 and 2 / 1
    assert (str(share.bar), share.unit) == ("≥ 0.7", "")
    assert f"memory {2**16 / 2.0 / 1e6:.1f} GB/s" in share.note
    assert len(table([ratio, share]).splitlines()) == 4

    assert {*calls} == {NATIVE, TORCH, READ}
    assert calls[READ]() == 2**16 / 8
    mine, theirs = (calls[name]() for name in (NATIVE, TORCH))
    assert isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor)
    assert mine.shape == theirs.shape == (1, 1, 64)
    assert (mine.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (mine - theirs.float()).abs().max() <= 0.1 * mine.abs().max()


def test_without_a_compiler_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_NO_JIT", "1")
    with pytest.raises(Skip, match="QFX_NO_JIT"):
        next(decode(Options(), config=TINY))
    (figure,) = bench.measure("decode", bench.BENCHMARKS["decode"], Options())
    assert figure.verdict == "skipped" and "QFX_NO_JIT" in figure.note
