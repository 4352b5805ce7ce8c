"""Saved models taken apart and put together again, for tests of what loading refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

ZEROS = "0" * 64


class SmallNet(nn.Module):
    """Convolution, batch norm, a concatenation, a linear layer, a layer norm; a dict comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.norm = nn.Linear(64, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.bn(self.conv(x)).relu()
        y = self.norm(self.linear(y.flatten(1)))
        return {"out": y * scale, "parts": (y, None)}


@dataclass(frozen=True)
class Parts:
    """A file's document, safetensors' own table, and the bytes of its tensors."""

    document: dict[str, Any]
    table: dict[str, Any]
    tensors: bytes

    @classmethod
    def of(cls, file: Path) -> Parts:
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:end])
        return cls(json.loads(table.pop("__metadata__")["qfx"]), table, content[end:])

    def written(self, document: dict[str, Any] | None = None, text: str = "") -> bytes:
        """The bytes of the file with this document, and a digest that is right."""
        text = text or json.dumps(self.document if document is None else document)
        header = json.dumps({"__metadata__": {"qfx": text}, **self.table}).encode()
        header += b" " * (-len(header) % 8)
        return sealed(len(header).to_bytes(8, "little") + header + self.tensors)

    def edited(self, edit: Callable[[dict[str, Any]], object]) -> bytes:
        document = copy.deepcopy(self.document)
        edit(document)
        return self.written(document)


def sealed(content: bytes) -> bytes:
    """``content`` with the digest that it should have."""
    mark = b'sha256\\":'
    if mark not in content:
        return content
    start = content.index(b'\\"', content.index(mark) + len(mark)) + 2
    content = content[:start] + ZEROS.encode() + content[start + 64 :]
    return content[:start] + hashlib.sha256(content).hexdigest().encode() + content[start + 64 :]


def node(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The line of the node ``name``."""
    return next(n for n in document["nodes"] if n["name"] == name)


# --- at random --------------------------------------------------------------------------------------------------------

_STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 3, 7, 2**31, 2**62, 2**70, -(2**63), 1.5, 1e308, "", "x", 'a"b', "__class__", "forward"),
    *("');import os;os._exit(3)#", [], {}, [[[[[]]]]], {"float": "nan"}, {"node": "x"}, {"node": "nope"}),
    *({"tuple": [1]}, {"dtype": "float16"}, {"slice": [0, 0, 0]}, {"complex": [1, 2]}, {"device": "cpu"}),
    *("aten::relu", "aten::add.Tensor", "aten::from_file", "qfx::quantize", "operator::getitem", "aten::split.Tensor"),
    *("aten::unbind.int", "aten::cat", "output", "placeholder", "get_attr", "call_function"),
)


def mutated(content: bytes, parts: Parts, seed: int) -> bytes:
    """A file that is damaged, cut, or edited with a digest that is right: which and where, the seed says."""
    chance = random.Random(seed)
    kind = chance.choice(("flip", "cut", "tensors", "document", "document", "document"))
    if kind == "cut":
        return content[: chance.randrange(len(content))]
    if kind == "document":
        return parts.edited(lambda document: _disturb(document, chance))
    changed = bytearray(content)
    first = 0 if kind == "flip" else len(content) - len(parts.tensors)
    for _ in range(chance.choice((1, 1, 4))):
        changed[chance.randrange(first, len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed) if kind == "flip" else sealed(bytes(changed))


def _disturb(document: dict[str, Any], chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = [p for p in _places(document) if p and p[0] != "sha256"]
        part = chance.choice(("nodes", "nodes", "nodes", "call", "tensors", "report", None))
        *way, last = chance.choice([p for p in places if part in (p[0], None)] or places)
        owner = _at(document, way)
        how = chance.random()
        if how < 0.15:
            del owner[last]
        elif how < 0.3:
            owner[last] = copy.deepcopy(_at(document, chance.choice(places)))
        elif how < 0.4 and isinstance(owner, list):
            owner.insert(last, copy.deepcopy(chance.choice(owner)))
        elif how < 0.7 and type(owner[last]) is int:
            owner[last] += chance.choice((-100, -1, 1, 2, 100))
        else:
            owner[last] = copy.deepcopy(chance.choice(_STRANGE))


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from _places(value[key], (*way, key))


def _at(value: Any, way: Any) -> Any:
    for key in way:
        value = value[key]
    return value
