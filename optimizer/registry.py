"""A registry that fills itself: one file per entry, found by walking a package, registered by a decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from optimizer.errors import InvalidInput

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to entries; imports every module of ``package`` the first time it is read.

    Args:
        kind: what an entry is called in error messages, e.g. ``"algorithm"``.
        package: dotted name of the package whose modules register entries.
    """

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an entry under ``name``; a taken name raises ``ValueError``."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self._kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return decorate

    def find(self, name: str, field: str) -> T:
        """Return the entry, or raise `InvalidInput` that names ``field`` and lists what exists."""
        try:
            return self[name]
        except KeyError:
            raise InvalidInput(
                f"unknown {self._kind} {name!r}", field=field, remedy=f"use one of: {', '.join(self)}"
            ) from None

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._loaded = True
