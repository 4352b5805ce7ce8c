"""What qfx believes of the CPU, on this machine and on simulated ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qfx import cpu

ALDER_LAKE = frozenset({"avx2", "avx_vnni"})
ICE_LAKE = frozenset({"avx2", "avx512f", "avx512_vnni"})
SAPPHIRE_RAPIDS = ICE_LAKE | {"avx_vnni", "amx_int8"}
HASWELL = frozenset({"avx2", "fma"})


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)


@pytest.mark.parametrize(
    ("features", "limit", "vnni"),
    [
        (HASWELL, "", False),
        (ALDER_LAKE, "", True),
        (ICE_LAKE, "", True),
        (frozenset(), "", False),
        (SAPPHIRE_RAPIDS, "SSE41", False),
        (SAPPHIRE_RAPIDS, "AVX2", False),
        (SAPPHIRE_RAPIDS, "AVX512_CORE", False),
        (SAPPHIRE_RAPIDS, "avx512_core", False),
        (SAPPHIRE_RAPIDS, "AVX2_VNNI", True),
        (SAPPHIRE_RAPIDS, "AVX512_CORE_VNNI", True),
        (SAPPHIRE_RAPIDS, "AVX512_CORE_AMX", True),
        (SAPPHIRE_RAPIDS, "DEFAULT", True),
        (ICE_LAKE, "AVX2_VNNI", False),  # has VNNI only in 512 bits
        (ALDER_LAKE, "AVX512_CORE_VNNI", False),  # does not include AVX2_VNNI
        (ALDER_LAKE, "AVX512_CORE_FP16", True),  # does
    ],
)
def test_vnni(features: frozenset[str], limit: str, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu.onednn_has_vnni() is vnni


def test_the_old_name_of_the_limit_counts_behind_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "avx2")
    assert cpu.onednn_isa_limit() == "AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert cpu.onednn_isa_limit() == "AVX512_CORE"


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", ""])
def test_other_machines_have_no_x86_features(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cpu.cpu_features.__wrapped__() == frozenset()


def test_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu.cpu_features.__wrapped__() == frozenset()
    assert cpu.fingerprint.__wrapped__() != ""


def test_cpuinfo_of_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert cpu._cpuinfo_words("Features") == {"fp", "asimd", "asimddp", "i8mm"}
    assert cpu._cpuinfo_words("flags") == frozenset()
    assert "i8mm" in cpu.fingerprint.__wrapped__()
