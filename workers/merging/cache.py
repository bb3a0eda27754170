"""Prepared numbers, kept by content: in memory, and on disk for all workers of a machine.

On disk an answer is one safetensors file, named by the SHA-256 of what was asked. It is written beside its place and
renamed, with a checksum of its data, so what a crash or a full disk leaves behind is noticed and computed again. Whoever
computes an answer holds a lock on a file beside it, which the system lets go of when the process dies; the others wait
and then read. Answers are mapped, not copied: all processes share their pages. The directory may be removed at any
time.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimizer.errors import InvalidCheckpoint
from optimizer.recipe import canonical_json
from workers.checkpoints import tensor_bytes
from workers.safetensors_header import DTYPES, layout_file, read_header

log = logging.getLogger(__name__)

FORMAT = "1"
"""Part of every key: another one when what answers mean, or how they are kept, changes for all questions."""

MEMORY_BYTES = 2 * 2**30
"""How much of answers a process keeps in memory of its own, by default."""

DISK_BYTES = 100 * 2**30
"""How large the directory may get, by default."""

SMALL = 64 * 1024  # bytes; smaller answers are copied into memory, a mapping costs more
_ENTRY = 2 * 1024  # bytes that an answer in memory costs besides its numbers
_MAPPING = 64 * 1024  # what a mapped answer is taken to cost: a process may have some 65,000 mappings
_KEPT = 0.9  # share of the directory's bound that an eviction leaves
_STALE_S = 24 * 3600.0  # age at which what crashed processes left behind is removed
_RECENT_S = 3600.0
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Numbers = Mapping[str, Tensor]


def key_of(data: Any) -> str:
    """Return the SHA-256 of plain data, as hexadecimal digits."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


@dataclass
class _Turn:
    lock: Lock = field(default_factory=Lock)
    waiting: int = 0


class Cache:
    """Answers by key. Safe to use from several threads, and from several processes that share the directory.

    Where the directory cannot be used, answers stay in memory and a warning is logged: a search is slower then, not
    wrong. Pickled, it becomes an empty one over the same directory.

    Args:
        directory: where lasting answers are; None keeps all in memory.
        disk_bytes: bound of the directory's size; what was not used for longest is removed first. Checked as answers are
            written, so several processes may exceed it by what they are writing.
        memory_bytes: bound of the answers in this process's memory, without mapped ones, whose pages the system takes
            back when it needs them. Least recently used ones are dropped.
    """

    def __init__(
        self, directory: Path | None = None, *, disk_bytes: int = DISK_BYTES, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._arguments = directory, disk_bytes, memory_bytes
        self._memory = _Memory(memory_bytes)
        self._disk = _Disk(directory, disk_bytes) if directory is not None else None
        self._lock = Lock()
        self._turns: dict[str, _Turn] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, self._arguments

    def get(self, key: str, compute: Callable[[], Numbers], lasting: bool) -> Numbers:
        """Return the answer under ``key``, computed if there is none; ``lasting`` ones are kept on disk.

        It is computed once, however many threads and processes ask at the same time. Not to be written to.
        """
        with self._lock:
            known = self._memory.get(key)
        if known is not None:
            return known
        with self._turn(key):
            with self._lock:
                known = self._memory.get(key)
            if known is None:
                known, cost = self._find(key, compute, lasting)
                with self._lock:
                    self._memory.put(key, known, cost)
        return known

    def _find(self, key: str, compute: Callable[[], Numbers], lasting: bool) -> tuple[Numbers, int]:
        """Return an answer that is not in memory, and what keeping it there costs."""
        found = self._shared(self._disk, key, compute) if self._disk is not None and lasting else _owned(compute())
        size = _size(found)
        mapped = isinstance(found, _Read) and size > SMALL
        return found, _MAPPING if mapped else size + _ENTRY

    def _shared(self, disk: _Disk, key: str, compute: Callable[[], Numbers]) -> Numbers:
        found = disk.read(key)
        if found is None:
            with disk.locked(key):
                found = disk.read(key)  # by whoever had the lock
                if found is None:
                    computed = _owned(compute())
                    disk.write(key, computed)
                    return disk.read(key) or computed
        return found

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """Hold the lock of one question among this process's threads."""
        with self._lock:
            turn = self._turns.setdefault(key, _Turn())
            turn.waiting += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.waiting -= 1
                if not turn.waiting:
                    del self._turns[key]


def _remade(directory: Path | None, disk_bytes: int, memory_bytes: int) -> Cache:
    return Cache(directory, disk_bytes=disk_bytes, memory_bytes=memory_bytes)


class _Memory:
    """Answers and what each costs, least recently used first."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._total = 0
        self._entries: OrderedDict[str, tuple[Numbers, int]] = OrderedDict()

    def get(self, key: str) -> Numbers | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: str, answer: Numbers, cost: int) -> None:
        self._entries[key] = answer, cost
        self._total += cost
        while self._total > self._bound and len(self._entries) > 1:  # the one in use stays, however large
            self._total -= self._entries.popitem(last=False)[1][1]


class _Read(dict[str, Tensor]):
    """An answer from disk; mapped unless it is small."""


class _Disk:
    """The directory."""

    def __init__(self, directory: Path, bound: int) -> None:
        self._directory = directory
        self._bound = bound
        self._written: int | None = None  # since the directory was last looked through; None: not yet
        self._warned = False

    def read(self, key: str) -> _Read | None:
        """Return an answer, mapped where it is large; None where there is none, or a broken one."""
        path = self._path(key)
        try:
            entries = read_header(path)
            with safe_open(path, framework="pt") as file:
                answer = {name: file.get_tensor(name) for name in entries}
                known = (file.metadata() or {}).get("crc32")
            if known != str(_checksum(answer)):
                return None
            os.utime(path)  # for whoever looks for what was not used for longest
        except (OSError, SafetensorError, InvalidCheckpoint):  # none, or broken: computed again and replaced
            return None
        small = _size(answer) <= SMALL
        return _Read({name: tensor.clone() if small else tensor for name, tensor in answer.items()})

    def write(self, key: str, answer: Numbers) -> None:
        """Keep an answer; one that cannot be kept is only missing later."""
        path = self._path(key)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    rows = [(name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in answer.items()]
                    file.write(layout_file(rows, {"crc32": str(_checksum(answer))}))
                    for tensor in answer.values():
                        file.write(memoryview(tensor_bytes(tensor.cpu())))
                os.replace(partial, path)  # noqa: PTH105 - replaces what another process wrote meanwhile: the same
            finally:
                partial.unlink(missing_ok=True)
            self._bounded(path.stat().st_size)
        except OSError as error:
            self._warn(error)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of a question among all processes; without one where the file system has no locks."""
        path = self._path(key).with_suffix(".lock")
        handle = self._lock(path)
        try:
            yield
        finally:
            if handle is not None:
                path.unlink(missing_ok=True)  # while it is held: whoever waits notices and takes a new one
                os.close(handle)

    def _lock(self, path: Path) -> int | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    if _is_at(handle, path):
                        return handle
                except BaseException:
                    os.close(handle)
                    raise
                os.close(handle)
        except OSError as error:
            self._warn(error)
            return None

    def _path(self, key: str) -> Path:
        return self._directory / FORMAT / key[:2] / f"{key}.safetensors"

    def _bounded(self, written: int) -> None:
        """Look through the directory once for a process, and then whenever it may have grown by a twentieth."""
        if self._written is not None and self._written + written < self._bound / 20:
            self._written += written
            return
        self._written = 0
        files = []
        for path in self._directory.glob("*/??/*"):
            with suppress(OSError):  # removed by another process meanwhile
                found = path.lstat()
                if path.suffix == ".safetensors":
                    files.append((found.st_mtime, found.st_size, path))
                elif time.time() - found.st_mtime > _STALE_S:
                    path.unlink()
        self._evict(files)

    def _evict(self, files: list[tuple[float, int, Path]]) -> None:
        total = sum(size for _, size, _ in files)
        if total <= self._bound:
            return
        newest = 0.0
        for used, size, path in sorted(files):
            if total <= self._bound * _KEPT:
                break
            with suppress(OSError):
                path.unlink()
                total -= size
                newest = used
        if time.time() - newest < _RECENT_S:
            text = (
                "the cache %s is too small: answers in use were removed and will be computed again; give it more room"
            )
            log.warning(text, self._directory)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the cache %s cannot be used (%s): prepared numbers stay in memory", self._directory, error)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one under its name: who had the lock before removed it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (own.st_ino, own.st_dev) == (found.st_ino, found.st_dev)


def _owned(answer: Numbers) -> dict[str, Tensor]:
    """The answer without what it shares memory with: a view would keep the whole alive."""
    return {name: _alone(tensor.detach()) for name, tensor in answer.items()}


def _alone(tensor: Tensor) -> Tensor:
    own = tensor.contiguous()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


def _size(answer: Numbers) -> int:
    return sum(tensor.nbytes for tensor in answer.values())


def _checksum(answer: Numbers) -> int:
    total = 0
    for name in sorted(answer):
        total = zlib.crc32(tensor_bytes(answer[name].cpu()), total)
    return total
