"""Scores by the content that they were computed from: weights, graph, data and score.

What a scan has computed is kept, in memory and in a file, sample by sample: a scan that was interrupted goes on where
it stopped, and one with more widths computes only the new ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, fx

from qfx.jit import cache_dir
from qfx.whole_file import write_whole

log = logging.getLogger(__name__)

_KEPT: OrderedDict[object, ScoreCache] = OrderedDict()
_MOST = 16  # contents kept in memory


class ScoreCache:
    """The sums of every entry that was computed, by its name; ``file`` None: in memory only."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._sums: dict[str, tuple[float, ...]] = _read(file) if file is not None else {}
        self._saved = len(self._sums)

    def __contains__(self, entry: str) -> bool:
        return entry in self._sums

    def __getitem__(self, entry: str) -> tuple[float, ...]:
        return self._sums[entry]

    def __setitem__(self, entry: str, sums: tuple[float, ...]) -> None:
        self._sums[entry] = sums

    def save(self) -> None:
        """Write what is new to the file, whole or not at all; a folder that cannot be written is no error."""
        if self.file is None or len(self._sums) == self._saved:
            return
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            merged = {**_read(self.file), **self._sums}  # another process may have added to it
            write_whole(self.file, json.dumps(merged).encode())
            self._saved = len(self._sums)
        except OSError as error:
            log.warning("scores are not kept on disk: %s", error)


def _read(file: Path) -> dict[str, tuple[float, ...]]:
    """What the file holds; nothing where it is missing or torn."""
    try:
        found = json.loads(file.read_text())
        return {str(entry): tuple(float(x) for x in sums) for entry, sums in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is no file of scores (%s): it will be made anew", file, error)
        return {}


def cache_for(content: str, judge: object, *, on_disk: bool) -> ScoreCache:
    """The scores of this content by this judge (a hashable value); ``on_disk``: a new process finds them too."""
    key = (content, judge)
    if key not in _KEPT:
        name = hashlib.sha256(f"{content}\0{judge}".encode()).hexdigest()[:32]
        _KEPT[key] = ScoreCache(cache_dir() / "scores" / f"{name}.json" if on_disk else None)
        while len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]


def forget() -> None:
    """Let go of what is kept in memory; files stay."""
    _KEPT.clear()


_FORM = 4  # to be counted up where the same content gets other scores


def content_of(gm: fx.GraphModule, tensors: Iterable[Tensor], words: Iterable[str] = ()) -> str:
    """A digest of the graph, of all its tensors, of ``tensors`` and ``words``."""
    digest = hashlib.sha256("\0".join([str(_FORM), str(gm.graph), *words]).encode())
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    for tensor in tensors:
        _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
