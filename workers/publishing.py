"""Directories that appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from optimizer.errors import Conflict, MergeoptError
from workers.checkpoints import Checkpoint

RECIPE = "recipe.json"
"""The file that tells an export from other directories."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_json(path: Path, data: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.write("\n")


@contextmanager
def new_directory(
    out: Path, overwrite: bool = False, checkpoints: Mapping[str, Checkpoint] | None = None
) -> Iterator[Path]:
    """Yield a directory that becomes ``out`` when the block succeeds, and disappears when it fails.

    Args:
        out: where it is to be.
        overwrite: whether an earlier export may stand there.
        checkpoints: models that must not.

    Raises:
        Conflict: something stands there that may not be replaced.
        MergeoptError: the disk is full or cannot be written to.
    """
    if os.path.lexists(out):
        _check_replaceable(out, overwrite, checkpoints or {})
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            with path.open("rb+") as file:
                sync(file)
        _sync_directory(partial)
        _publish(partial, out, overwrite)
    except OSError as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path, overwrite: bool, checkpoints: Mapping[str, Checkpoint]) -> None:
    """Raise `Conflict` unless ``out`` is to be overwritten, and is an earlier export that nothing is made from."""
    if not overwrite:
        raise _exists(out)
    if out.is_symlink() or not (out / RECIPE).is_file():
        raise Conflict(f"{out.name} is no earlier export", remedy="choose another directory, or remove it yourself")
    real = out.resolve()
    for name, checkpoint in checkpoints.items():
        if checkpoint.source.resolve().is_relative_to(real):
            raise Conflict(f"{out.name} holds the model {name!r}", remedy="choose another directory")


def _publish(partial: Path, out: Path, overwrite: bool) -> None:
    old = partial.with_suffix(".old")
    if os.path.lexists(out):  # renaming would replace an empty directory without a word
        if not overwrite:
            raise _exists(out)
        out.rename(old)
    try:
        partial.rename(out)
    except OSError as error:
        if old.exists() and not os.path.lexists(out):
            old.rename(out)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # somebody else was faster
            raise _exists(out) from error
        raise
    _sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exists(out: Path) -> Conflict:
    return Conflict(f"{out.name} exists already", remedy="choose another directory, or ask to overwrite it")


def _write_error(out: Path, error: OSError) -> MergeoptError:
    if error.errno in _FULL:
        return MergeoptError(
            f"{out.name} could not be written: no space is left; nothing was kept",
            remedy="free some space, or export to another disk",
        )
    return MergeoptError(f"{out.name} could not be written: {error.strerror or error}; nothing was kept")


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
