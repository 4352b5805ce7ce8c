"""The measured peak, of a machine that keeps to what it is told, and once of the real one."""

from __future__ import annotations

from typing import Any

import pytest

from qfx import jit
from qfx.errors import NativeError
from qfx.targets.native import library, peak
from qfx.targets.native.isa import ISAS, find
from qfx.targets.native.peak import measured_peak

PRODUCTS = 4096


class Machine:
    """Stands for the library: every thread makes ``rate`` products per second."""

    def __init__(self, rate: float, slow: tuple[int, ...] = ()) -> None:
        self.rate, self.slow = rate, slow
        self.calls: list[tuple[int, int]] = []
        self.qfx_peak = lambda calls, threads: self._peak(calls, threads)  # a type can be set for its result

    def qfx_peak_products(self) -> int:
        return PRODUCTS

    def _peak(self, calls: int, threads: int) -> float:
        self.calls.append((calls, threads))
        return calls * PRODUCTS / self.rate * (3 if len(self.calls) in self.slow else 1)


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(peak, "load", lambda text: machine)
    return machine


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("rate", [1e6, 3.3e11])
def test_the_products_of_all_threads_are_counted(rate: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = on(Machine(rate), monkeypatch)
    assert measured_peak(ISAS[0], threads, seconds=0.002, rounds=5) == pytest.approx(rate * threads)
    assert {given for _, given in machine.calls} == {threads}
    measured = [calls for calls, _ in machine.calls[-5:]]
    assert len({*measured}) == 1
    assert measured[0] == max(1, round(0.002 * rate / PRODUCTS))  # rounds are as long as they shall be


def test_the_best_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = on(Machine(1e9), monkeypatch)
    want = measured_peak(ISAS[0], 1, rounds=4)
    last = len(quiet.calls)
    busy = on(Machine(1e9, slow=(1, 2, *range(last - 2, last + 1))), monkeypatch)
    assert measured_peak(ISAS[0], 1, rounds=4) == pytest.approx(want) == pytest.approx(1e9)
    assert len(busy.calls) == len(quiet.calls)


@pytest.mark.skipif(jit.unavailable() is not None, reason=f"no native programs: {jit.unavailable()}")
def test_this_machine() -> None:
    isa, made = find(None), []

    def load(text: str) -> Any:
        made.append(library.load(text))
        return made[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peak, "load", load)
        assert all(measured_peak(isa, threads, seconds=2e-4, rounds=3) > 1e6 for threads in (1, 2))
    assert made[0].qfx_peak_products() == isa.rows * isa.channels * 256


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_NO_JIT", "1")
    with pytest.raises(NativeError, match="no compiler"):
        measured_peak(ISAS[0], 1)
