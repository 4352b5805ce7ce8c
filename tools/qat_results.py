"""The results of finished runs, one a line of JSON: runs in processes of their own append to one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qfx.errors import ConfigError
from qfx.tools.qat_loop import Point

METHODS = ("float", "PTQ", "QAT")


@dataclass(frozen=True)
class Result:
    """One measured model.

    ``value`` is its ``metric`` on ``count`` examples and ``drop`` how much worse that is than ``reference``, the float
    model's. ``rising`` says that a higher value is better. ``bytes`` are of parameters and buffers, ``peak_bytes`` the
    resident memory of a forward pass with the model in it, ``latency_ms`` the median of a call of one example and
    ``speedup`` how many times faster than the float model that is. ``seed`` and ``epochs`` are those of the training,
    ``seconds`` its time. What was not measured is None.
    """

    task: str
    model: str
    method: str
    bits: str
    metric: str
    rising: bool
    value: float
    reference: float
    count: int
    seed: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    peak_bytes: int | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    note: str = ""
    curve: tuple[Point, ...] = ()

    @property
    def drop(self) -> float:
        return self.reference - self.value if self.rising else self.value - self.reference

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it another run: of two results with one key the later counts."""
        return (self.task, self.model, self.method, self.bits, self.count, self.epochs, self.note, self.seed)


def append(path: Path, result: Result) -> None:
    """Add one line to ``path``; one write, so that processes do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def read(paths: Iterable[Path]) -> list[Result]:
    """The results in these files, and in the ``.json`` and ``.jsonl`` files of these folders; the last of each key.

    Raises:
        ConfigError: there is no such file, or a line is no result; the text names it.
    """
    found: dict[tuple[object, ...], Result] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"there is no {path}", hint="give files that --json has written, or a folder of them")
        files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    held = json.loads(line)
                    held["curve"] = tuple(Point(**point) for point in held["curve"])
                    result = Result(**held)
                except (ValueError, TypeError, KeyError) as error:
                    raise ConfigError(f"{file}, line {number} is no result of a run: {error}") from error
                found[result.key] = result
    return list(found.values())
