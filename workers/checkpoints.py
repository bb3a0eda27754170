"""Reading checkpoints: Hugging Face directories of safetensors, single or sharded, memory-mapped and never unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimizer.errors import InvalidCheckpoint
from optimizer.spec import JobSpec
from workers.roots import Roots
from workers.safetensors_header import BROKEN, TensorEntry, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 50_000_000  # bytes of a config or index; real ones stay below 5 MB
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


@dataclass(frozen=True)
class TensorMeta:
    """Where a tensor is.

    Attributes:
        name: as the checkpoint calls it.
        dtype: safetensors' name of its type.
        shape: its dimensions.
        file: name of the file within the checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Factors:
    """A task vector of low rank: scale · up @ down.

    Attributes:
        up: B, shape (out, rank).
        down: A, shape (rank, in).
        scale: PEFT's alpha / rank, or alpha / sqrt(rank).
    """

    up: Tensor
    down: Tensor
    scale: float


class Checkpoint:
    """A model directory, opened: its configuration, and its tensors mapped from disk.

    The files' pages are shared by all processes on a machine that map them. Safe to use from several threads.

    Attributes:
        name: the model's name in the job.
        path: the directory.
        config: its ``config.json``.
        tensors: by name, sorted.
    """

    def __init__(self, name: str, path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorMeta]) -> None:
        self.name = name
        self.path = path
        self.config = config
        self.tensors = tensors
        self._files: dict[str, Any] = {}
        self._mapped: dict[str, Tensor] = {}
        self._lock = Lock()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from disk without a copy. By convention nobody writes to it.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        with self._lock:
            if name not in self._mapped:
                file = self.tensors[name].file
                if file not in self._files:
                    self._files[file] = safe_open(self.path / file, framework="pt")
                self._mapped[name] = self._files[file].get_tensor(name)
            return self._mapped[name]

    def factors(self, name: str) -> Factors | None:
        """Return the low-rank factors of a tensor's difference to the base's, or None: only adapters have them."""
        del name
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all tensors in order of their names, as hexadecimal digits.

        How the tensors are spread over files does not matter. Streams over the mapped files once.
        """
        total = hashlib.sha256()
        for name, meta in sorted(self.tensors.items()):
            head = json.dumps([name, meta.dtype, list(meta.shape)], separators=(",", ":")).encode()
            total.update(len(head).to_bytes(8, "little") + head)
            total.update(memoryview(tensor_bytes(self.tensor(name))))
        return total.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor in memory as a flat numpy array of uint8, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def open_checkpoint(path: Path, name: str, field: str | None = None) -> Checkpoint:
    """Open the checkpoint in the directory ``path``; its headers are checked, its weights not yet read.

    Args:
        path: an existing directory, e.g. from `Roots.resolve`.
        name: what the job calls the model.
        field: dotted path in the job spec, for errors.

    Raises:
        InvalidCheckpoint: no checkpoint, pickles, or broken files.
    """
    config = read_json(path / "config.json", field) if (path / "config.json").is_file() else None
    _refuse_what_is_no_checkpoint(path, config is not None, field)
    tensors: dict[str, TensorMeta] = {}
    for file, expected in _files(path, field).items():
        entries = read_header(path / file, field)
        for missing in sorted(set(expected or entries) - set(entries)):
            raise InvalidCheckpoint(
                f"{file} lacks tensor {missing!r}, which the index says it has", field=field, remedy=BROKEN
            )
        tensors |= _metas(file, entries, expected)
    if not tensors:
        raise InvalidCheckpoint(f"{name}: the checkpoint has no tensors", field=field, remedy=BROKEN)
    return Checkpoint(name, path, config or {}, dict(sorted(tensors.items())))


def open_checkpoints(spec: JobSpec, roots: Roots) -> dict[str, Checkpoint]:
    """Open all models of a job: ``base`` first, then the experts under their names, in the job's order.

    Raises:
        InvalidCheckpoint, PathNotAllowed: with the field at fault, e.g. ``experts.1.path``.
    """
    out = {"base": open_checkpoint(roots.resolve(spec.base, "base"), "base", "base")}
    for number, expert in enumerate(spec.experts):
        field = f"experts.{number}"
        out[expert.name] = open_checkpoint(roots.resolve(expert, field), expert.name, field)
    return out


def _metas(file: str, entries: Mapping[str, TensorEntry], expected: Sequence[str] | None) -> dict[str, TensorMeta]:
    names = entries if expected is None else expected
    return {name: TensorMeta(name, entries[name].dtype, entries[name].shape, file) for name in names}


def _refuse_what_is_no_checkpoint(path: Path, has_config: bool, field: str | None) -> None:
    if not any(path.iterdir()):
        raise InvalidCheckpoint(f"{path.name} is an empty directory", field=field, remedy="name a model's directory")
    if not has_config and (path / "adapter_config.json").is_file():
        raise InvalidCheckpoint(
            f"{path.name} is a PEFT adapter, not a whole model",
            field=field,
            remedy="merge the adapter into its base (peft: merge_and_unload) and save the result",
        )
    if not ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        raise _no_weights(path, field)
    if not has_config:
        raise InvalidCheckpoint(
            f"{path.name} has no config.json", field=field, remedy="save the model with save_pretrained"
        )


def _no_weights(path: Path, field: str | None) -> InvalidCheckpoint:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return InvalidCheckpoint(
            f"{path.name} has its weights as a pickle ({pickles[0]}), which can run code when it is read",
            field=field,
            remedy="convert it where you trust it: load it and save it with save_pretrained, which writes safetensors",
        )
    return InvalidCheckpoint(
        f"{path.name} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}",
        field=field,
        remedy="name the directory that save_pretrained wrote",
    )


def _files(path: Path, field: str | None) -> dict[str, list[str] | None]:
    """Weight files with the tensors the index expects in them (None: all it has)."""
    if not (path / INDEX).is_file():
        return {WEIGHTS: None}
    weight_map = read_json(path / INDEX, field).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{INDEX} has no weight_map", field=field, remedy=BROKEN)
    out: dict[str, list[str] | None] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InvalidCheckpoint(
                f"{INDEX} places tensor {tensor!r} in {file!r}, which is no safetensors file beside it",
                field=field,
                remedy=BROKEN,
            )
        if not (path / file).is_file():
            raise InvalidCheckpoint(
                f"shard {file} is missing; it holds tensor {tensor!r}", field=field, remedy="copy or download it again"
            )
        expected = out.setdefault(file, [])
        if expected is not None:
            expected.append(tensor)
    return out


def read_json(path: Path, field: str | None = None) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file; raises `InvalidCheckpoint` when it is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise InvalidCheckpoint(f"{path.name} is larger than {MAX_JSON // 10**6} MB", field=field, remedy=BROKEN)
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path.name} cannot be read: {error}", field=field, remedy=BROKEN) from error
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path.name} is no JSON object", field=field, remedy=BROKEN)
    return data
