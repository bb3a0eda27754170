"""The safetensors file format: reading and checking a header, and laying one out for writing.

A file is an 8-byte little-endian length, that many bytes of JSON (name → dtype, shape, data_offsets), then the data.
The header is checked completely before anything is mapped, so that a broken file is an error that names the tensor
and not a crash in the middle of a merge. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimizer.errors import InvalidCheckpoint

MAX_HEADER = 100_000_000  # bytes; the format's own limit
ALIGNMENT = 64  # bytes; what memory allocators and vector units like

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The format's names of types."""

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Types that torch converts but does not compute with."""

MERGEABLE = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Types that arithmetic makes sense on; numbers of 8 bits only where no scales stand beside them."""

MAX_DIMENSIONS = 64  # more than torch's kernels take
MAX_ELEMENTS = 2**63 - 1  # what torch counts with; also where one dimension is 0

_HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which JSON can write but UTF-8 cannot

BROKEN = "copy or download the file again, or save the model anew with save_pretrained"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: one of `DTYPES`.
        shape: its dimensions.
        begin, end: bytes within the data section.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def size_in_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_header(path: Path, field: str | None = None) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Stricter than the format where nobody writes what it allows: an entry has nothing but its three fields.

    Raises:
        InvalidCheckpoint: truncated or malformed file, unknown type, offsets out of range, overlaps or holes.
    """
    raw, size = _read(path, field)
    length = len(raw)
    entries = {
        name: _entry(path, name, value, field)
        for name, value in _json(path, raw, field).items()
        if name != "__metadata__"
    }
    _check_coverage(path, entries, size - 8 - length, field)
    return entries


def layout_file(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and header of a file whose data are the given (name, dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + size_in_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)  # the data start aligned, for whoever maps them
    return struct.pack("<Q", len(raw)) + raw


def _read(path: Path, field: str | None) -> tuple[bytes, int]:
    """Return a file's header and the file's size in bytes."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise _broken(path, "it is no regular file", field)
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is not None and MAX_HEADER < length <= found.st_size:
                raise _broken(path, f"its header has {length} bytes, and {MAX_HEADER} are allowed", field)
            raw = file.read(length) if length is not None and length <= found.st_size else b""
    except OSError as error:
        raise InvalidCheckpoint(f"{path.name} cannot be read: {error.strerror}", field=field) from error
    if length is None or len(raw) != length:
        raise _broken(path, "it is truncated, or no safetensors file", field)
    return raw, found.st_size


def _json(path: Path, raw: bytes, field: str | None) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_doubles, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no valid JSON: {error}", field) from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object", field)
    metadata = header.get("__metadata__")
    if metadata is not None and not (isinstance(metadata, dict) and all(map(_is_text, metadata.values()))):
        raise _broken(path, "its __metadata__ is no table of texts", field)
    return header


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _HALF.search(value)


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dictionary; raises ``ValueError`` where a name stands twice or is no valid Unicode."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"a name stands twice: {name[:200]!r}")
        if not _is_text(name):
            raise ValueError("a name is no valid Unicode")
        out[name] = value
    return out


def _whole(text: str) -> int | float:
    """A number as the format has it; others (below zero, -0 as well, and huge ones) become fractions, which none may be."""
    out_of_range = text.startswith("-") or len(text) > len(str(MAX_ELEMENTS))
    return float(text) if out_of_range else int(text)


def _entry(path: Path, name: str, value: Any, field: str | None) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            pass
        case _:
            raise _broken(path, f"the entry of tensor {name!r} is malformed", field)
    if dtype not in DTYPES:
        raise _broken(path, f"tensor {name!r} has the unknown type {dtype!r}", field)
    if not all(type(number) is int for number in shape) or not _possible(shape):
        raise _broken(path, f"tensor {name!r} has the impossible shape {str(shape)[:200]}", field)
    if type(begin) is not int or type(end) is not int or end - begin != size_in_bytes(dtype, tuple(shape)):
        raise _broken(path, f"the offsets of tensor {name!r} do not fit its shape and type", field)
    return TensorEntry(dtype, tuple(shape), begin, end)


def _possible(shape: list[int]) -> bool:
    return len(shape) <= MAX_DIMENSIONS and math.prod(number for number in shape if number) <= MAX_ELEMENTS


def _check_coverage(path: Path, entries: dict[str, TensorEntry], data: int, field: str | None) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data:
            raise _broken(path, f"it is truncated: tensor {name!r} ends at byte {entry.end} of {data}", field)
        if entry.begin != position:
            what = "overlaps another one" if entry.begin < position else "is preceded by a hole"
            raise _broken(path, f"tensor {name!r} {what}", field)
        position = entry.end
    if position != data:
        raise _broken(path, f"{data - position} bytes belong to no tensor", field)


def _broken(path: Path, what: str, field: str | None) -> InvalidCheckpoint:
    return InvalidCheckpoint(f"{path.name} cannot be used: {what}", field=field, remedy=BROKEN)
