"""The safetensors file format: reading and checking a header, and laying one out for writing.

A file is an 8-byte little-endian length, that many bytes of JSON (name → dtype, shape, data_offsets), then the data.
The header is checked completely before anything is mapped, so that a broken file is an error that names the tensor
and not a crash in the middle of a merge. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
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

MERGEABLE = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that arithmetic makes sense on."""

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

    Raises:
        InvalidCheckpoint: truncated or malformed file, unknown type, offsets out of range, overlaps or holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            raw = file.read(length) if length is not None and length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise InvalidCheckpoint(f"{path.name} cannot be read: {error.strerror}", field=field) from error
    if length is None or len(raw) != length:
        raise _broken(path, "it is truncated, or no safetensors file", field)
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


def _json(path: Path, raw: bytes, field: str | None) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is no valid JSON: {error}", field) from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object", field)
    return header


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _entry(path: Path, name: str, value: Any, field: str | None) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _broken(path, f"the entry of tensor {name!r} is malformed", field)
    if dtype not in DTYPES:
        raise _broken(path, f"tensor {name!r} has the unknown type {dtype!r}", field)
    if not all(type(number) is int and number >= 0 for number in shape):
        raise _broken(path, f"tensor {name!r} has the impossible shape {shape}", field)
    if not 0 <= begin <= end or end - begin != size_in_bytes(dtype, tuple(shape)):
        raise _broken(path, f"the offsets of tensor {name!r} do not fit its shape and type", field)
    return TensorEntry(dtype, tuple(shape), begin, end)


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
