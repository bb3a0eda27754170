"""Reads tables row by row: JSONL, CSV, Parquet, and the Arrow files that ``datasets.save_to_disk`` writes.

Nothing here decodes media, follows a path that stands inside the data, or unpickles.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from optimizer.errors import InvalidData, PathNotAllowed

Row = dict[str, Any]
Placed = tuple[str, Row]
PlacedRows = Generator[Placed, None, None]

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """Rows that are read as they are needed.

    Attributes:
        rows: pairs of where a row stands (``line 3``) and the row; closing it closes the file.
        classes: names of the classes of columns that hold class indices, where the file says so.
    """

    rows: PlacedRows
    classes: Mapping[str, list[str]] = field(default_factory=dict)


def read_file(path: Path, where: str) -> Source:
    """Open a JSONL, CSV or Parquet file, told by its suffix.

    Args:
        path: the file.
        where: dotted field that named it, for errors.

    Raises:
        InvalidData: another suffix, or a file that cannot be read; malformed rows raise when they are reached.
    """
    try:
        reader = READERS[path.suffix.lower()]
    except KeyError:
        raise InvalidData(
            f"{path.name!r} has a suffix that is not known", field=where, remedy=f"use one of: {', '.join(READERS)}"
        ) from None
    return reader(path, where)


def read_saved(directory: Path, where: str) -> Source:
    """Open one split written by ``datasets.Dataset.save_to_disk``: its Arrow streams, without decoding any feature.

    Raises:
        InvalidData: the directory's own list of files cannot be read.
        PathNotAllowed: that list, or a link, leads outside the directory.
    """
    try:
        state = json.loads((directory / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidData(
            f"{directory.name}/state.json is not one of `datasets.save_to_disk`: {error!r}",
            field=where,
            remedy="write the data set again with save_to_disk",
        ) from error
    files = [file_inside(directory, directory / name, where) for name in names]
    classes: dict[str, list[str]] = {}
    for file in files[:1]:
        with _arrow_errors(file, where), pa.OSFile(str(file)) as source:
            classes = _class_names(pa.ipc.open_stream(source).schema)
    return Source(_saved_rows(files, where), classes)


def inside(root: Path, path: Path, where: str) -> Path:
    """Return ``path`` with its links resolved; raises `PathNotAllowed` when that is not under ``root``."""
    try:
        resolved = path.resolve()
    except RuntimeError:  # links in a circle, on Python before 3.13
        resolved = Path("/")
    if not resolved.is_relative_to(root.resolve()):
        raise PathNotAllowed(
            f"{path.name!r} is a link that leads outside the data's directory",
            field=where,
            remedy="copy the file instead of linking it",
        )
    return resolved


def file_inside(root: Path, path: Path, where: str) -> Path:
    """Like `inside`, for a path that must be a regular file; else raises `InvalidData`."""
    resolved = inside(root, path, where)
    if not resolved.is_file():
        raise InvalidData(f"{path.name!r} is no regular file", field=where, remedy="name a file or a directory")
    return resolved


def _read_jsonl(path: Path, where: str) -> Source:
    return Source(_jsonl_rows(path, where))


def _jsonl_rows(path: Path, where: str) -> PlacedRows:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_not_json)
            except (ValueError, RecursionError) as error:
                raise InvalidData(
                    f"{path.name}, line {number}: not JSON: {error}",
                    field=where,
                    remedy="write one JSON object a line, in UTF-8",
                ) from error
            if not isinstance(row, dict):
                raise InvalidData(
                    f"{path.name}, line {number}: a JSON object is needed, not {type(row).__name__}",
                    field=where,
                    remedy="write one JSON object a line, with the column names as keys",
                )
            yield f"line {number}", row


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _read_csv(path: Path, where: str) -> Source:
    return Source(_csv_rows(path, where))


def _csv_rows(path: Path, where: str) -> PlacedRows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InvalidData(
                    f"{path.name}: two columns of the header have the same name", field=where, remedy="rename one"
                )
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise InvalidData(
                        f"{path.name}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}",
                        field=where,
                        remedy="put text that contains commas in quotes",
                    )
                if cells:
                    yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidData(
                f"{path.name}, after line {reader.line_num}: not CSV in UTF-8: {error}",
                field=where,
                remedy="save it as comma-separated values in UTF-8",
            ) from error


def _read_parquet(path: Path, where: str) -> Source:
    with _arrow_errors(path, where), pq.ParquetFile(path) as file:
        classes = _class_names(file.schema_arrow)
    return Source(_parquet_rows(path, where), classes)


def _parquet_rows(path: Path, where: str) -> PlacedRows:
    with _arrow_errors(path, where), pq.ParquetFile(path) as file:
        yield from _numbered(file.iter_batches(batch_size=_BATCH_ROWS))


def _saved_rows(files: list[Path], where: str) -> PlacedRows:
    first = 1
    for file in files:
        with _arrow_errors(file, where), pa.OSFile(str(file)) as source:
            for placed in _numbered(pa.ipc.open_stream(source), first):
                yield placed
                first += 1


def _numbered(batches: Iterable[Any], first: int = 1) -> PlacedRows:
    for batch in batches:
        batch.validate(full=True)  # a damaged file can hold offsets that point anywhere
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield f"row {first}", row
                first += 1


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the class names that `datasets` keeps in an Arrow schema's metadata, by column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # not written by `datasets`, which is as good


@contextmanager
def _arrow_errors(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise InvalidData(
            f"{path.name} is not a sound {kind} file: {error}", field=where, remedy="write or copy it again"
        ) from error


READERS: dict[str, Callable[[Path, str], Source]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
