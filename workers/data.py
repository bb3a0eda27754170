"""Loads the rows an objective is measured on: local files only, checked, and digested so that a resumed job sees changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optimizer.errors import InvalidData
from optimizer.spec import DataSpec
from workers.data_files import READERS, PlacedRows, Row, Source, file_inside, inside, read_file, read_saved
from workers.data_images import open_image, open_mask, read_image_folder, subdirectories

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in their order, and how to speak of them in errors.

    Attributes:
        items: the rows; images are paths or bytes until `images` decodes them.
        places: where each row stands in its file: ``line 3``, ``row 3``, ``cat/7.png``.
        columns: role to column, where the spec maps one.
        field: dotted path of the data in the job spec: ``objectives.0.data``.
        digest: SHA-256 over the rows (image files by their bytes), in hex.
        classes: names of the classes, by column, of columns that hold class indices.
    """

    items: Sequence[Row]
    places: Sequence[str]
    columns: Mapping[str, str]
    field: str
    digest: str
    classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def names(self) -> list[str]:
        """Every column that some row has, in order of appearance."""
        return list(dict.fromkeys(name for row in self.items for name in row))

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Of each row the first 16 bytes of its SHA-256, see `digest_of`: what its scores are remembered under."""
        return tuple(_short_digest(row) for row in self.items)

    def contents(self, roles: Iterable[str]) -> tuple[bytes, ...]:
        """Like `digests`, but over what the rows have in these roles only, whatever the columns are called.

        Where the rows have none of the roles, everything counts but the column ``split``.
        """
        columns = {role: self._column(role) for role in roles if self.has(role)}
        if not columns:
            return tuple(_short_digest({k: v for k, v in row.items() if k != "split"}) for row in self.items)
        return tuple(_short_digest({role: row.get(name) for role, name in columns.items()}) for row in self.items)

    def has(self, role: str) -> bool:
        """Whether there is a column for a role."""
        return self._column(role) in self.names

    def values(self, role: str) -> list[Any]:
        """Return one value a row, none of them missing; raises `InvalidData` naming the role's field or the row."""
        column = self._column(role)
        if column not in self.names:
            raise InvalidData(
                f"there is no column {column!r}",
                field=f"{self.field}.columns.{role}",
                remedy=f"map {role!r} to one of: {_listed(self.names)}",
            )
        values = [row.get(column) for row in self.items]
        for index, value in enumerate(values):
            if value is None:
                raise self.error(role, index, f"{column!r} is missing")
        return values

    def texts(self, role: str) -> list[str]:
        """Return one string a row; raises `InvalidData` naming the first row that has none."""
        values = self.values(role)
        for index, value in enumerate(values):
            if not is_text(value):
                raise self.error(role, index, f"{self._column(role)!r} must be a text, not {_kind(value)}")
        return values

    def images(self, role: str, mode: str) -> Iterator[Image.Image]:
        """Decode one image a row, in Pillow's colour ``mode``; raises `InvalidData` naming the first that cannot be."""
        return self._decoded(role, lambda value: open_image(value, mode))

    def masks(self, role: str) -> Iterator[NDArray[np.int64]]:
        """Decode one mask a row, shape (height, width); raises `InvalidData` naming the first that cannot be."""
        return self._decoded(role, open_mask)

    def optional(self, role: str) -> list[Any]:
        """Return one value a row, None where there is none."""
        return [row.get(self._column(role)) for row in self.items]

    def class_names(self, role: str) -> Sequence[str] | None:
        """Return the names behind a role's class indices, where the data has them."""
        return self.classes.get(self._column(role))

    def error(self, role: str, index: int, message: str, remedy: str | None = None) -> InvalidData:
        """Return an error about what row ``index`` has in a role."""
        return InvalidData(f"{self.places[index]}: {message}", field=f"{self.field}.columns.{role}", remedy=remedy)

    def _decoded(self, role: str, decode: Callable[[Any], T]) -> Iterator[T]:
        for index, value in enumerate(self.values(role)):
            try:
                yield decode(value)
            except ValueError as error:
                raise self.error(role, index, str(error)) from error

    def _column(self, role: str) -> str:
        return self.columns.get(role, role)


def no_rows(field: str) -> Rows:
    """Return what an evaluator with items of its own gets."""
    return Rows([], [], {}, field, digest_of([]))


def load_rows(data: DataSpec, path: Path, field: str) -> Rows:
    """Read the rows that a data spec asks for.

    A single file with a split asked for must have a ``split`` column. An image folder has the columns ``image`` and
    ``label``, and takes one image of each class in turn; one of images and masks has ``image`` and ``mask``.

    Args:
        data: the spec; its ``path`` is not used.
        path: the file or directory, resolved and allowed.
        field: dotted path of the spec in the job: ``objectives.0.data``.

    Raises:
        InvalidData: nothing there, no rows, malformed rows, an unknown split or a mapped column that does not exist.
        PathNotAllowed: a link inside a directory leads outside it.
    """
    try:
        source = _open(path, data.split, field)
        with closing(source.rows) as rows:
            kept = list(islice(rows, data.limit))
        items = [row for _, row in kept]
        digest = digest_of(items)
    except OSError as error:
        raise InvalidData(
            f"{path.name!r} cannot be read: {error}", field=f"{field}.path", remedy="check that the server may read it"
        ) from error
    if not kept:
        raise InvalidData(
            f"{path.name!r} has no rows", field=f"{field}.path", remedy="give at least one item, or another split"
        )
    out = Rows(items, [place for place, _ in kept], data.columns, field, digest, source.classes)
    for role, column in data.columns.items():
        if column not in out.names:
            raise InvalidData(
                f"there is no column {column!r}",
                field=f"{field}.columns.{role}",
                remedy=f"the columns are: {_listed(out.names)}",
            )
    return out


def digest_of(items: Iterable[Row]) -> str:
    """Return the SHA-256 over rows as canonical JSON, one a line; bytes and files stand as digests of their own."""
    digest = hashlib.sha256()
    for row in items:
        digest.update(_line(row))
    return digest.hexdigest()


def _short_digest(row: Row) -> bytes:
    return hashlib.sha256(_line(row)).digest()[:16]


def _line(row: Row) -> bytes:
    """A row as canonical JSON."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=_canonical)
    return text.encode("ascii") + b"\n"


def is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can hold (JSON also has lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _canonical(value: Any) -> Any:
    if isinstance(value, Path):
        with value.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    return str(value)  # dates, decimals, UUIDs


def _open(path: Path, split: str | None, field: str) -> Source:
    where = f"{field}.path"
    if path.is_file():
        return _by_column(read_file(path, where), split, field)
    if not path.is_dir():
        raise InvalidData(
            f"there is no file or directory {path.name!r}", field=where, remedy="check the spelling, or upload it first"
        )
    if (path / "state.json").is_file():
        return _by_column(read_saved(path, where), split, field)
    saved = {name: path / name for name in subdirectories(path) if (path / name / "state.json").is_file()}
    if saved:
        return read_saved(inside(path, _pick(saved, split, field), where), where)
    files = _split_files(path, where)
    if files:
        return read_file(file_inside(path, _pick(files, split, field), where), where)
    if split is None:
        return read_image_folder(path, path, where)
    directories = {name: path / name for name in subdirectories(path)}
    return read_image_folder(path, _pick(directories, split, field), where)


def _split_files(path: Path, where: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in READERS and not file.name.startswith("."):
            if file.stem in files:
                raise InvalidData(
                    f"two files hold the split {file.stem!r}: {files[file.stem].name} and {file.name}",
                    field=where,
                    remedy="remove one of them",
                )
            files[file.stem] = file
    return files


def _pick(splits: Mapping[str, T], split: str | None, field: str) -> T:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise InvalidData(
            "the data has several splits", field=f"{field}.split", remedy=f"use one of: {_listed(splits)}"
        )
    if split not in splits:
        raise _unknown_split(split, splits, field)
    return splits[split]


def _by_column(source: Source, split: str | None, field: str) -> Source:
    return source if split is None else dataclasses.replace(source, rows=_only(source.rows, split, field))


def _only(rows: PlacedRows, split: str, field: str) -> PlacedRows:
    seen: dict[str, None] = {}
    with closing(rows):
        for place, row in rows:
            if "split" not in row:
                raise InvalidData(
                    f"{place}: a split is asked for, but there is no column `split`",
                    field=f"{field}.split",
                    remedy="leave the split out, or give a directory with one file for each split",
                )
            seen[str(row["split"])] = None
            if str(row["split"]) == split:
                yield place, row
    if seen and split not in seen:
        raise _unknown_split(split, seen, field)


def _unknown_split(split: str, splits: Iterable[str], field: str) -> InvalidData:
    return InvalidData(
        f"there is no split {split!r}", field=f"{field}.split", remedy=f"the splits are: {_listed(splits)}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _kind(value: object) -> str:
    return "one with lone surrogates" if isinstance(value, str) else type(value).__name__
