"""What tuning found, on disk: damaged files, folders that cannot be written, and several processes at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qfx.targets.native import tuning_cache
from qfx.targets.native.choice import SCALES, Choice

KEPT = {"a layer": {"kernel": "panel", "scale": 2.0}}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QFX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(text: str | bytes) -> None:
    tuning_cache.path().parent.mkdir(exist_ok=True)
    tuning_cache.path().write_bytes(text if isinstance(text, bytes) else text.encode())


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_added_is_read() -> None:
    assert tuning_cache.read() == {}
    tuning_cache.add(KEPT)
    assert tuning_cache.read() == KEPT
    tuning_cache.add({"another": {"parts": 2}})
    tuning_cache.add({"a layer": {"kernel": "winograd"}})
    assert tuning_cache.read() == {"a layer": {"kernel": "winograd"}, "another": {"parts": 2}}


def test_it_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tuning_cache.add(KEPT)
    assert tuning_cache.path().parent == folder and tuning_cache.path().is_file()
    monkeypatch.setenv("QFX_CACHE_DIR", str(folder / "other"))
    assert tuning_cache.read() == {}
    monkeypatch.delenv("QFX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    assert tuning_cache.path().parent == folder / "home" / "qfx"


def test_every_cpu_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_cache.add(KEPT)
    mine = tuning_cache.path()
    monkeypatch.setattr(tuning_cache, "fingerprint", lambda: "another CPU")
    assert tuning_cache.path() != mine and tuning_cache.read() == {}
    tuning_cache.add({"a layer": {"parts": 1}})
    monkeypatch.undo()
    monkeypatch.setenv("QFX_CACHE_DIR", str(mine.parent))
    assert tuning_cache.read() == KEPT


@pytest.mark.parametrize(
    ("text", "warns"),
    [
        ("", True),
        ("{", True),
        (b"\xff\xfe\x00", True),
        ("[" * 100_000, True),
        ("[]", False),
        ("null", False),
        ("{}", False),
        ('{"version": 1}', False),
        ('{"version": 1, "choices": [1]}', False),
        ('{"version": 1, "choices": null}', False),
        ('{"version": 0, "choices": {"a layer": {}}}', False),
        ('{"version": "1", "choices": {"a layer": {}}}', False),
        ('{"choices": {"a layer": {}}}', False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_damaged_or_of_another_layout_counts_as_empty(
    text: str | bytes, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    put(text)
    with caplog.at_level(logging.WARNING, logger="qfx"):
        assert tuning_cache.read() == {}
    assert ("counts as empty" in caplog.text) == warns
    tuning_cache.add(KEPT)
    assert tuning_cache.read() == KEPT


@pytest.mark.parametrize("inside", [False, True], ids=["no folder", "a folder in the file's place"])
def test_where_nothing_can_be_written_nothing_is_kept(
    folder: Path, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if inside:
        tuning_cache.path().mkdir(parents=True)
    else:
        folder.write_text("a file")
    with caplog.at_level(logging.INFO, logger="qfx"):
        tuning_cache.add(KEPT)
    assert "not kept" in caplog.text
    assert tuning_cache.read() == {}


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_cache.add(KEPT)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tuning_cache, "write_whole", full)
        tuning_cache.add({"another": {}})
    assert tuning_cache.read() == KEPT


def test_processes_that_add_at_once_lose_nothing(folder: Path) -> None:
    """The module alone, without torch, so that its processes start soon; its slow writes make them meet."""
    program = f"""
import sys, time, types
package = types.ModuleType("qfx"); package.__path__ = [{str(Path(tuning_cache.__file__).parents[2])!r}]
jit, cpu = types.ModuleType("qfx.jit"), types.ModuleType("qfx.cpu")
from pathlib import Path
jit.cache_dir, cpu.fingerprint = lambda: Path({str(folder)!r}), lambda: "a CPU"
sys.modules |= {{"qfx": package, "qfx.jit": jit, "qfx.cpu": cpu}}
import importlib.util
spec = importlib.util.spec_from_file_location("tuning_cache", {tuning_cache.__file__!r})
cache = importlib.util.module_from_spec(spec); spec.loader.exec_module(cache)
real = cache.write_whole
cache.write_whole = lambda *args: (time.sleep(0.005), real(*args))
print("ready", flush=True); sys.stdin.readline()
for i in range(20):
    cache.add({{f"{{sys.argv[1]}} {{i}}": {{}}}})
print(cache.path())
"""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", program, name], **pipes) for name in "ab"]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    (path,) = {output.strip() for output in outputs}
    held = json.loads(Path(path).read_text())["choices"]
    assert {*held} == {f"{name} {i}" for name in "ab" for i in range(20)}


# --- choices as JSON --------------------------------------------------------------------------------------------------

CHOICES = st.builds(
    Choice,
    st.none() | st.sampled_from(["panel", "winograd", "amx", "depthwise"]) | st.text(max_size=5),
    st.none() | st.sampled_from(SCALES["full"]),
    st.none() | st.integers(1, 512),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = ("kernel", "scale", "parts")


@given(CHOICES)
def test_a_choice_comes_back_from_json(choice: Choice) -> None:
    assert Choice.of(json.loads(json.dumps(choice.plain()))) == choice
    assert None not in choice.plain().values()


@given(JSON | st.dictionaries(st.sampled_from(NAMES), JSON))
@example({"scale": float("nan")})
@example({"scale": float("inf")})
@example({"scale": 0.0})
@example({"scale": -1.0})
@example({"scale": 1e12})
@example({"scale": True})
@example({"parts": 0})
@example({"parts": -3})
@example({"parts": True})
@example({"parts": 2.0})
@example({"kernel": 3})
@example({"kernel": None})
@example({"kernel": ["panel"]})
@example({"kernel": "panel", "unroll": 4})
@example({"kernel": "panel", "parts": 0})
def test_what_no_choice_can_be_leaves_all_open(plain: Any) -> None:
    """A kernel believes the sizes that it gets: 0 parts would compute nothing, and not a number no program at all."""
    made = Choice.of(plain)
    assert made == Choice() or made.plain() == plain
    assert made.kernel is None or isinstance(made.kernel, str)
    assert made.scale is None or made.scale in SCALES["full"]
    assert made.parts is None or (type(made.parts) is int and made.parts >= 1)


def test_full_tries_what_fast_does_and_more() -> None:
    assert {*SCALES["fast"]} < {*SCALES["full"]} and 1.0 in SCALES["fast"]
