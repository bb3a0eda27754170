"""Where checkpoints and data may be read from: directories the operator of the server chose, and a hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from optimizer.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed
from optimizer.spec import ModelRef
from workers.policy import Policy

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md"]
"""Files that are downloaded: no pickles, no code."""


NOTHING = Policy()


class Roots:
    """The directories that paths in job specs may lead to.

    Attributes:
        policy: what else the operator of the server allows.

    Args:
        paths: the roots; relative paths are tried under each in this order.
        policy: nothing else by default.
    """

    def __init__(self, paths: Sequence[Path], policy: Policy = NOTHING) -> None:
        self.policy = policy
        self.paths = tuple(Path(os.path.realpath(path)) for path in paths)

    def path(self, text: str, field: str) -> Path:
        """Return the real path of the existing file or directory that ``text`` names.

        Raises:
            PathNotAllowed: it leads outside every root, directly, by ``..`` or through a link.
            InvalidInput: nothing is there.
        """
        candidates = self._candidates(text, field)
        for real in candidates:
            if self._contains(real) and os.path.exists(real):  # noqa: PTH110 - Path.exists raises on very long names
                return real
        if all(self._contains(real) for real in candidates):
            raise InvalidInput(f"{text!r} does not exist", field=field, remedy="check the spelling, or upload it first")
        raise PathNotAllowed(
            f"{text!r} is outside the server's directories",
            field=field,
            remedy="use a path relative to one of the server's roots, or have the server's `roots` setting extended",
        )

    def holds(self, text: str) -> bool:
        """Whether something is at the path ``text``, inside one of the roots."""
        try:
            self.path(text, "path")
        except InvalidInput:
            return False
        return True

    def resolve(self, ref: ModelRef, field: str) -> Path:
        """Return the local directory of a checkpoint, downloaded from the hub where it is a hub id.

        Raises:
            PathNotAllowed: the directory, or a file in it through a link, is outside the roots.
            InvalidCheckpoint: it is missing or no directory, or the hub does not give it.
        """
        if ref.path is None:
            return _download(ref, field)
        try:
            path = self.path(ref.path, f"{field}.path")
        except PathNotAllowed:
            raise
        except InvalidInput as error:
            raise InvalidCheckpoint(error.message, field=error.field, remedy=error.remedy) from error
        if not path.is_dir():
            raise InvalidCheckpoint(
                f"{ref.path!r} is no directory", field=f"{field}.path", remedy="name the checkpoint's directory"
            )
        self._check_links(path, ref.path, f"{field}.path")
        return path

    def _candidates(self, text: str, field: str) -> list[Path]:
        try:
            return [Path(os.path.realpath(root / text)) for root in self.paths]
        except (ValueError, OSError) as error:  # a NUL byte, a name that is too long
            raise InvalidInput(f"{text[:100]!r} is no valid path", field=field) from error

    def _contains(self, real: Path) -> bool:
        return any(os.path.commonpath([root, real]) == str(root) for root in self.paths)

    def _check_links(self, directory: Path, text: str, field: str) -> None:
        for entry in directory.iterdir():
            if entry.is_symlink() and not self._contains(Path(os.path.realpath(entry))):
                raise PathNotAllowed(
                    f"{entry.name} in {text!r} is a link to outside the server's directories",
                    field=field,
                    remedy="replace the link by the file",
                )


NOWHERE = Roots(())


def _download(ref: ModelRef, field: str) -> Path:
    try:
        return Path(snapshot_download(str(ref.hub), revision=ref.revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the client lets errors of several libraries through
        first = str(error).strip().splitlines()[:1]
        raise InvalidCheckpoint(
            f"{ref} cannot be downloaded: {first[0] if first else type(error).__name__}",
            field=f"{field}.hub",
            remedy="check the id and the revision, or give a path to a local copy",
        ) from error
