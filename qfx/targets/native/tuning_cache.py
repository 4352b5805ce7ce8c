"""What tuning found, on disk: one JSON file for a CPU, in the folder of the compiled code.

Several processes may read and write it: a lock file beside it orders them. A file that is damaged, or of another
layout, counts as empty and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from qfx.cpu import fingerprint
from qfx.jit import cache_dir
from qfx.whole_file import write_whole

_LOG = logging.getLogger(__name__)

VERSION = 1


def path() -> Path:
    """The file for this CPU."""
    name = hashlib.sha256(fingerprint().encode()).hexdigest()[:16]
    return cache_dir() / f"native-tuning-{name}.json"


def read() -> dict[str, Any]:
    """What is known: the choice made for each key."""
    try:
        held = json.loads(path().read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _LOG.warning("%s cannot be read and counts as empty: %s", path(), error)
        return {}
    fits = isinstance(held, dict) and held.get("version") == VERSION and isinstance(held.get("choices"), dict)
    return dict(held["choices"]) if fits else {}


def add(choices: Mapping[str, Any]) -> None:
    """Keep ``choices`` beside what is known; where the folder cannot be written, they are not kept."""
    try:
        path().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{path()}.lock"):
            text = json.dumps({"version": VERSION, "choices": read() | dict(choices)}, indent=1, sort_keys=True)
            write_whole(path(), text.encode())
    except OSError as error:
        _LOG.info("what tuning found is not kept: %s", error)
