"""The cache of compiled libraries: keys, damage, races, places that cannot be written, compilers that are none."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qfx import jit
from qfx.errors import NativeError

needs_compiler = pytest.mark.skipif(jit.unavailable() is not None, reason=f"no C++ loops here: {jit.unavailable()}")

# hidden by default: a library exports what it marks
ANSWER = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QFX_CACHE_DIR", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    code, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    code.write_text(ANSWER)
    header.write_text("#define ANSWER 42\n")
    return code, header


def program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def answer(sources: tuple[Path, ...], flags: tuple[str, ...] = ()) -> int:
    library = jit.load(sources, flags=flags)
    assert isinstance(library, ctypes.CDLL)
    return int(library.answer())


@needs_compiler
def test_compiles_once(cache: Path, sources: tuple[Path, Path]) -> None:
    assert answer(sources) == 42
    (library,) = cache.iterdir()
    before = library.stat().st_mtime_ns
    assert answer(sources) == 42
    assert [*cache.iterdir()] == [library] and library.stat().st_mtime_ns == before


@needs_compiler
def test_a_changed_header_or_flag_is_another_library(cache: Path, sources: tuple[Path, Path]) -> None:
    assert answer(sources) == 42
    sources[1].write_text("#ifndef ANSWER\n#define ANSWER 43\n#endif\n")
    assert answer(sources) == 43
    assert answer(sources, ("-DANSWER=44",)) == 44
    assert len([*cache.iterdir()]) == 3


@needs_compiler
def test_a_prelude_is_compiled_once(cache: Path, sources: tuple[Path, Path]) -> None:
    code, header = sources
    there = (f"-I{header.parent}",)
    code.write_text(ANSWER.replace('#include "answer.h"', ""))  # it comes without being asked for
    assert jit.load((code, header), flags=there, prelude=header).answer() == 42  # type: ignore[union-attr]
    (compiled,) = cache.glob("answer-*/answer.h.gch")
    assert jit._is_intact(compiled)
    before = compiled.stat().st_mtime_ns

    code.write_text(code.read_text().replace("ANSWER", "2 * ANSWER"))
    command = []
    with pytest.MonkeyPatch.context() as patched:
        run = subprocess.run
        patched.setattr(subprocess, "run", lambda words, **given: command.append(words) or run(words, **given))
        assert jit.load((code, header), flags=there, prelude=header).answer() == 84  # type: ignore[union-attr]
    assert [*cache.glob("answer-*/*")] == [compiled] and compiled.stat().st_mtime_ns == before
    opened = run((*command[0][:-1], os.devnull, "-H"), capture_output=True, text=True, check=True).stderr
    assert f"! {compiled}" in opened  # the mark of a precompiled header that is used, though a seal ends it

    compiled.write_bytes(compiled.read_bytes()[:-100])
    code.write_text(code.read_text().replace("2 *", "3 *"))
    assert jit.load((code, header), flags=there, prelude=header).answer() == 126  # type: ignore[union-attr]
    assert jit._is_intact(compiled)

    assert jit.load((code, header), flags=(*there, "-DMORE"), prelude=header).answer() == 126  # type: ignore[union-attr]
    assert len([*cache.glob("answer-*/answer.h.gch")]) == 2


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:2000] + b"?" + b[2001:]])
def test_a_damaged_library_is_built_again(cache: Path, sources: tuple[Path, Path], damage: object) -> None:
    assert callable(damage)
    # Built but not loaded here: overwriting a mapped library would crash this process.
    code = "import sys; from pathlib import Path; from qfx import jit; jit.load(tuple(map(Path, sys.argv[1:])))"
    subprocess.run([sys.executable, "-c", code, *map(str, sources)], check=True, env=environment())
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert answer(sources) == 42
    assert [*cache.iterdir()] == [library] and jit._is_intact(library)


@needs_compiler
def test_several_processes_build_at_once(cache: Path, sources: tuple[Path, Path]) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=check_answer, args=(sources,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def check_answer(sources: tuple[Path, ...]) -> None:
    os._exit(0 if answer(sources) == 42 else 1)


@needs_compiler
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert answer(sources) == 42
    assert "cannot write to the cache" in caplog.text


@needs_compiler
def test_a_full_cache_that_cannot_be_written_serves(
    cache: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(sources) == 42

    def refuse(folder: Path) -> Path:
        raise AssertionError(f"{folder} need not be written")

    monkeypatch.setattr(jit, "_writable", refuse)
    assert answer(sources) == 42


@needs_compiler
def test_wrong_source_names_command_and_log(cache: Path, sources: tuple[Path, Path]) -> None:
    sources[0].write_text("int answer() { return nonsense; }\n")
    with pytest.raises(NativeError, match="nonsense") as caught:
        jit.load(sources)
    (log,) = cache.iterdir()
    assert log.suffix == ".log" and "nonsense" in log.read_text()
    assert str(log) in str(caught.value) and "-ffp-contract=off" in str(caught.value)
    assert "QFX_NO_JIT" in str(caught.value)


@needs_compiler
def test_a_broken_compiler_is_an_error_and_not_a_fallback(
    cache: Path, tmp_path: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = program(
        tmp_path / "g++-broken",
        """
        [ "$1" = --version ] && echo "g++ 1.0, Free Software Foundation" && exit 0
        echo "no space left"; exit 4
        """,
    )
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeError, match="exit status 4") as caught:
        jit.load(sources)
    assert "no space left" in str(caught.value) and str(broken) in str(caught.value)


@needs_compiler
def test_a_library_that_cannot_be_loaded(cache: Path, sources: tuple[Path, Path]) -> None:
    sources[0].write_text('#include "answer.h"\nextern int elsewhere(); int answer() { return elsewhere(); }\n')
    with pytest.raises(NativeError, match="cannot be loaded"):
        jit.load(sources)


@needs_compiler
def test_cxx_is_taken_if_it_is_a_gcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = program(tmp_path / "my-compiler", 'exec g++ "$@"')
    monkeypatch.setenv("CXX", f"{ours} -pipe")
    found = jit.compiler()
    assert found is not None and found.command == (str(ours), "-pipe")
    clang = program(tmp_path / "clang++", "echo clang version 17.0.6")
    for other in (str(clang), "no-such-compiler"):
        monkeypatch.setenv("CXX", other)
        found = jit.compiler()
        assert found is not None and Path(found.command[0]).name == "g++"


def test_without_a_compiler(cache: Path, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("has another reason here")
    monkeypatch.delenv("QFX_NO_JIT", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert jit.unavailable() == "no g++ was found"
    assert jit.load(sources) is None


@pytest.mark.parametrize(("value", "off"), [("1", True), ("0", False), ("", False)])
def test_switched_off(value: str, off: bool, sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QFX_NO_JIT", value)
    assert (jit.unavailable() == "turned off by QFX_NO_JIT") is off
    if off:
        assert jit.load(sources) is None


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QFX_NO_JIT", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert jit.unavailable() == f"C++ loops are built on Linux only, this is {platform}"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QFX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/place")
    assert jit.cache_dir() == Path("/some/place/qfx")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert jit.cache_dir() == Path("/home/someone/.cache/qfx")


def environment(**more: str) -> dict[str, str]:
    """This process's, with qfx importable."""
    places = [str(Path(jit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **more}
