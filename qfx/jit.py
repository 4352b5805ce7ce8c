"""Compile small C++ libraries (C ABI, no torch headers) with g++ when they are first used, and keep them in a cache.

A library is known by a hash of its sources, the flags, the compiler's version and the CPU's features. It lies in
``$QFX_CACHE_DIR``, else in ``$XDG_CACHE_HOME/qfx`` or ``~/.cache/qfx``; where that cannot be written, in a temporary
folder of this process. It ends with a checksum of itself, so that a damaged file is built again and never loaded.

The code is not linked to an OpenMP runtime: its calls are bound to the one that torch has loaded, so that there is one
pool of threads. That is also why only g++ will do: clang's code would bring a second runtime.

Environment: ``QFX_NO_JIT=1`` behaves as if there were no compiler; ``CXX`` names the compiler if it is a g++.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  (brings the OpenMP runtime that unavailable() looks for)

from qfx.cpu import fingerprint
from qfx.errors import NativeError

_LOG = logging.getLogger(__name__)

# Results must be the same on every machine: no contraction into fused multiply-adds, no fast-math. That math functions
# set no errno and raise no traps changes no value and lets loops that round be vectorized.
_COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)
# All that g++ links by default but its OpenMP runtime.
_LINK_FLAGS = ("-nodefaultlibs", "-lstdc++", "-lm", "-lgcc_s", "-lgcc", "-lpthread", "-lc")
_NATIVE_FLAGS = {"x86_64": ("-march=native",), "aarch64": ("-march=native",)}
_HEADERS = (".h", ".hpp")
_SEAL = b"qfx-sha256:"

_lock = threading.Lock()


@dataclass(frozen=True)
class Compiler:
    """A g++: the words that start it, and the first line of ``--version``."""

    command: tuple[str, ...]
    version: str


def unavailable() -> str | None:
    """Why no library can be compiled here; ``None`` where it can."""
    if os.environ.get("QFX_NO_JIT", "") not in ("", "0"):
        return "turned off by QFX_NO_JIT"
    if not sys.platform.startswith("linux"):
        return f"C++ loops are built on Linux only, this is {sys.platform}"
    if compiler() is None:
        return "no g++ was found"
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return "this build of torch brings no OpenMP runtime that g++'s code can use"
    return None


def compiler() -> Compiler | None:
    """The g++ that ``CXX`` names, else the one on the path; ``None`` where neither is there and truly a g++."""
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=8)
def _find_compiler(cxx: str, path: str) -> Compiler | None:
    for words in filter(None, (tuple(shlex.split(cxx)), ("g++",))):
        program = shutil.which(words[0], path=path)
        if program is None:
            continue
        version = subprocess.run(
            (program, *words[1:], "--version"), capture_output=True, text=True, check=False, env=_environment()
        ).stdout
        if "Free Software Foundation" in version:  # clang answers to the name g++ too
            return Compiler((program, *words[1:]), version.splitlines()[0])
        _LOG.debug("%s is not a g++, passed over", shlex.join(words))
    return None


def load(
    sources: tuple[Path, ...], *, flags: tuple[str, ...] = (), prelude: Path | None = None
) -> ctypes.CDLL | None:
    """Compile ``sources`` (or find them compiled) and load the library; ``None`` where :func:`unavailable` says why.

    Args:
        sources: C++ files, and the headers that they include (``.h``, ``.hpp``): all count in the cache's key.
        flags: further flags for the compiler, behind the standard ones.
        prelude: one of the headers, which every source shall begin with; it is compiled once for all libraries.

    Raises:
        NativeError: the compiler failed, or its library cannot be loaded; the text gives the command and the log.
    """
    reason = unavailable()
    cxx = compiler()
    if reason is not None or cxx is None:
        _LOG.info("C++ loops are not used: %s", reason)
        return None
    options = (*_COMPILE_FLAGS, *_NATIVE_FLAGS.get(platform.machine(), ()), *flags)
    key_words = (cxx.version, *cxx.command, *options, *_LINK_FLAGS, fingerprint())
    key = _key(sources, key_words)
    name = f"{sources[0].stem}-{key}.so"
    with _lock:
        library = cache_dir() / name
        if not _is_intact(library):
            library = _writable(library.parent) / name
            if not _is_intact(library):
                if prelude is not None:
                    compiled = _precompiled(prelude, (*cxx.command, *options), key_words, library.parent)
                    # The first places that g++ looks at: a compiled header that it cannot use, it passes over.
                    options = (f"-I{compiled.parent}", f"-I{prelude.parent}", "-include", prelude.name, *options)
                _build((*cxx.command, *options), sources, library)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise NativeError(
                f"the compiled library {library} cannot be loaded: {error}",
                hint="delete it, or set QFX_NO_JIT=1 to run without C++ loops",
            ) from error


def cache_dir() -> Path:
    """The folder where compiled libraries are looked for; it need not exist."""
    named = os.environ.get("QFX_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qfx"


def _writable(folder: Path) -> Path:
    """``folder``, made if need be, or a temporary one where it cannot be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = Path(_temporary_dir().name)
        _LOG.warning("cannot write to the cache %s (%s): compiling into %s instead", folder, error, temporary)
        return temporary


@functools.cache
def _temporary_dir() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qfx-")  # removed when the process ends


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # messages in English, whatever the user's language


def _key(sources: tuple[Path, ...], words: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for source in sources:
        content = source.read_bytes()
        digest.update(f"\0{source.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:24]


def _seal(content: bytes) -> bytes:
    return _SEAL + hashlib.sha256(content).hexdigest().encode()


def _is_intact(built: Path) -> bool:
    """True if the file is there and ends with the checksum of the rest: a loader would crash on a torn one."""
    try:
        content = built.read_bytes()
    except OSError:  # not there, or not ours to read
        return False
    length = len(content) - len(_seal(b""))
    if length >= 0 and content[length:] == _seal(content[:length]):
        return True
    _LOG.warning("%s is damaged and is built again", built)
    return False


def _precompiled(header: Path, command: tuple[str, ...], words: tuple[str, ...], cache: Path) -> Path:
    """The compiled form of ``header``, in a folder of its own; ``words``: what it depends on."""
    folder = cache / f"{header.stem}-{_key((header,), words)}"
    folder.mkdir(mode=0o755, exist_ok=True)
    compiled = folder / f"{header.name}.gch"
    if not _is_intact(compiled):
        with _workplace(compiled) as place:
            _run((*command, "-x", "c++-header", str(header), "-o", str(place / compiled.name)), compiled)
            _publish(place / compiled.name, compiled)
    return compiled


def _build(command: tuple[str, ...], sources: tuple[Path, ...], library: Path) -> None:
    """Compile the units side by side, and link them."""
    units = [source.resolve() for source in sources if source.suffix not in _HEADERS]
    with _workplace(library) as place:
        objects = [str(place / f"{unit.stem}.o") for unit in units]
        with ThreadPoolExecutor() as pool:
            commands = [(*command, "-c", str(unit), "-o", o) for unit, o in zip(units, objects, strict=True)]
            list(pool.map(_run, commands, itertools.repeat(library)))
        _run((*command, *objects, "-o", str(place / library.name), *_LINK_FLAGS), library)
        _publish(place / library.name, library)


@contextmanager
def _workplace(built: Path) -> Iterator[Path]:
    """A folder on the same file system as ``built``, for as long as it is being made."""
    with tempfile.TemporaryDirectory(prefix=f"{built.stem}-", suffix=".tmp", dir=built.parent) as folder:
        yield Path(folder)


def _run(command: tuple[str, ...], built: Path) -> None:
    """Raises NativeError where the compiler fails, and leaves a log beside what was to be built."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=_environment()
    )
    if done.returncode != 0:
        log = built.with_suffix(".log")
        log.write_text(f"$ {shlex.join(command)}\n{done.stdout}", encoding="utf-8")
        raise NativeError(
            f"the C++ compiler failed with exit status {done.returncode}\n"
            f"  command: {shlex.join(command)}\n  log: {log}\n{done.stdout[-2000:]}",
            hint="repair the compiler, name another g++ by CXX, or set QFX_NO_JIT=1 to run without C++ loops",
        )


def _publish(output: Path, built: Path) -> None:
    """Seal and rename: other processes see the whole file or none."""
    with output.open("ab") as file:  # what follows the last section is ignored
        file.write(_seal(output.read_bytes()))
    output.chmod(0o644)  # a cache may be filled by one user (an image's builder) and read by another
    output.replace(built)
    _LOG.info("compiled %s", built)
