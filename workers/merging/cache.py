"""Prepared numbers, kept by content: in memory, and on disk for all workers of a machine."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizer.recipe import canonical_json


def key_of(data: Any) -> str:
    """Return the SHA-256 of plain data, as hexadecimal digits."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


class Cache:
    """Answers by key. Safe to use from several threads, and from several processes that share the directory.

    Args:
        directory: where lasting answers are; None keeps all in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._memory: dict[str, Mapping[str, Tensor]] = {}
        self._lock = Lock()

    def get(self, key: str, compute: Callable[[], Mapping[str, Tensor]], lasting: bool) -> Mapping[str, Tensor]:
        """Return the answer under ``key``, computed if there is none; ``lasting`` ones are kept on disk."""
        with self._lock:
            known = self._memory.get(key)
        if known is None:
            path = self._directory / key[:2] / f"{key}.safetensors" if self._directory and lasting else None
            known = _read(path) if path is not None else None
            if known is None:
                known = compute()
                if path is not None:
                    _write(path, known)
            with self._lock:
                self._memory[key] = known
        return known


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # absent, or left broken by a full disk: computed again and replaced
        return None


def _write(path: Path, answer: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        save_file(
            {name: tensor.detach().contiguous().to(torch.device("cpu")) for name, tensor in answer.items()}, partial
        )
        os.replace(partial, path)  # noqa: PTH105 - replaces what another worker wrote meanwhile: the same
    finally:
        partial.unlink(missing_ok=True)
