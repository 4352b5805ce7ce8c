"""The file of a saved model: safetensors, with one document of JSON among its metadata and a digest over every byte.

The digest is the SHA-256 of the whole file with zeros in its own place. It tells damage, not forgery: whoever edits a
file can compute it anew. One document, because safetensors writes several metadata in an order that differs from one
process to the next.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qfx.errors import ArtifactError
from qfx.json_values import dumps, loads, typed
from qfx.whole_file import replacing

SCHEMA = 1
KEY = "qfx"
LONGEST = 2**25
"""Characters of a document, at most."""

_ZEROS = "0" * 64
_CHUNK = 2**20


def write(path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file; whatever ends the writing early leaves an old one as it was.

    Raises:
        ArtifactError: the document is too long, or safetensors refuses a tensor.
        OSError: the file cannot be written.
    """
    text = dumps({"schema": SCHEMA, "sha256": _ZEROS, **document})
    if len(text) > LONGEST:
        raise ArtifactError(f"the graph takes {len(text)} characters, more than the {LONGEST} of a file")
    with replacing(path) as part:
        try:
            save_file(dict(tensors), part, {KEY: text})
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"safetensors cannot write the model's tensors: {error}") from error
        with part.open("r+b") as file:
            place = _header(file).index(_ZEROS.encode())
            digest = _digest(file, _ZEROS)
            file.seek(place)
            file.write(digest.encode())


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    """The document of a file and its tensors, an open ``safe_open``.

    Raises:
        ArtifactError: the file is none of qfx's, damaged, or of a newer schema.
        OSError: it cannot be read.
    """
    file = Path(path)
    if not stat.S_ISREG(file.stat().st_mode):
        raise ArtifactError("this is no file", hint="give the path of a file that qfx.save wrote")
    with file.open("rb") as raw:
        _header(raw)
        try:
            tensors = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"this is no whole safetensors file: {error}", hint=_AGAIN) from None
        with tensors:
            metadata: dict[str, str] | None = tensors.metadata()  # type: ignore[no-untyped-call]
            document = _document(metadata)
            digest = typed(document.pop("sha256", None), "the digest", str)
            if len(digest) != len(_ZEROS) or not digest.isalnum() or _digest(raw, digest) != digest:
                raise ArtifactError("the file is damaged: its content is not that of its digest", hint=_AGAIN)
            yield document, tensors


_AGAIN = "fetch it again, or save the model again"


def _document(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(KEY)
    if text is None:
        raise ArtifactError("this safetensors file holds no qfx model", hint="give a file that qfx.save wrote")
    if len(text) > LONGEST:
        raise ArtifactError(f"its document has {len(text)} characters, more than {LONGEST}")
    document: dict[str, Any] = typed(loads(text), "the document", dict)
    schema = typed(document.pop("schema", None), "the schema", int)
    if schema != SCHEMA:
        newer = schema > SCHEMA
        raise ArtifactError(
            f"the file has schema {schema}, this qfx reads {SCHEMA}",
            hint="load it with a newer qfx" if newer else "save the model again with this qfx",
        )
    return document


def _header(file: BinaryIO) -> bytes:
    """The file's start: eight bytes that give the length of safetensors' own JSON, and that.

    Raises:
        ArtifactError: there is no such thing.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, 4 * LONGEST):
        raise ArtifactError("this is no whole safetensors file: it ends before its header does", hint=_AGAIN)
    return length.to_bytes(8, "little") + file.read(length)


def _digest(file: BinaryIO, found: str) -> str:
    """The digest of the file in which ``found`` stands where it belongs."""
    header = _header(file)
    if found.encode() not in header:
        return ""
    digest = hashlib.sha256(header.replace(found.encode(), _ZEROS.encode(), 1))
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
