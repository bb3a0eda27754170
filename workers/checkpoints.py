"""Reading checkpoints: Hugging Face directories of safetensors, single or sharded, memory-mapped and never unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from optimizer.errors import InputsChanged, InvalidCheckpoint, InvalidInput
from optimizer.spec import Expert, JobSpec, ModelRef
from workers.roots import Roots
from workers.safetensors_header import BROKEN, TensorEntry, no_doubles, read_header
from workers.system import will_need

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_JSON = 50_000_000  # bytes of a config or index; real ones stay below 5 MB
MAX_NAME = 255  # characters of a file's name
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
class Stamp:
    """What tells whether a file was replaced or written to since it was opened."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def stamp(path: Path) -> Stamp | None:
    """Return a file's stamp; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Factors:
    """A task vector of low rank: scale · up @ down, as a matrix of the tensor's first dimension by all others.

    The rank is 0 where an adapter leaves a tensor as it is.

    Attributes:
        up: B, shape (rows, rank).
        down: A, shape (rank, columns).
        scale: PEFT's alpha / rank, or alpha / sqrt(rank).
        transposed: the tensor is stored as the transpose of B @ A (embeddings, and layers that store (in, out)), so
            that ``up`` is Aᵀ and ``down`` is Bᵀ.
    """

    up: Tensor
    down: Tensor
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Number of columns of ``up``."""
        return self.up.shape[1]

    def to(self, device: torch.device) -> Factors:
        """Return them on ``device``."""
        return replace(self, up=self.up.to(device), down=self.down.to(device))


class Checkpoint:
    """A model directory, opened: its configuration, and its tensors mapped from disk.

    The files' pages are shared by all processes on a machine that map them. Safe to use from several threads.

    Attributes:
        name: the model's name in the job.
        path: the directory with its config and tokenizer.
        source: the directory with its weights; another one for checkpoints that stand for others.
        config: its ``config.json``.
        tensors: by name, sorted.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorMeta],
        stamps: Mapping[str, Stamp | None] | None = None,
    ) -> None:
        self.name = name
        self.path = self.source = path
        self.config = config
        self.tensors = tensors
        self._stamps = dict(stamps or {})
        self._files: dict[str, Any] = {}
        self._mapped: dict[str, Tensor] = {}
        self._lock = Lock()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from disk without a copy. By convention nobody writes to it.

        Raises:
            KeyError: the checkpoint has no such tensor.
            InputsChanged: the file was changed since its header was checked.
        """
        with self._lock:
            if name not in self._mapped:
                file = self.tensors[name].file
                if file not in self._files:
                    self._files[file] = self._open(file)
                self._mapped[name] = self._files[file].get_tensor(name)
            return self._mapped[name]

    def read_ahead(self, name: str) -> None:
        """Ask the system to read a tensor's pages, if it is mapped; a hint."""
        with self._lock:
            known = self._mapped.get(name)
        if known is not None:
            will_need(known)

    def verify(self) -> None:
        """Raise `InputsChanged` if a file of weights is not the one that was opened, or was written to since then.

        Told by the file's number, size and time of change. Not noticed: a file written to whose time was set back, one
        written to through a mapping whose time the system has not set yet, and what a network file system does not
        report. A file that is cut short while it is read kills the process (SIGBUS), as with every mapped file: replace
        files by renaming, never write to those in use.
        """
        for file in self._stamps:
            self._verify(file)

    def _verify(self, file: str) -> None:
        known = self._stamps.get(file)
        if known is not None and stamp(self.path / file) != known:
            raise InputsChanged(
                f"{file} of the checkpoint {self.name!r} was changed or replaced while it was in use",
                remedy="restore the file, or start again with the new one",
            )

    def _open(self, file: str) -> Any:
        self._verify(file)
        opened = safe_open(self.path / file, framework="pt")
        self._verify(file)  # it may have been replaced in between
        return opened

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


def open_checkpoint(path: Path, name: str, field: str | None = None, base: Checkpoint | None = None) -> Checkpoint:
    """Open the checkpoint in the directory ``path``; its headers are checked, its weights not yet read.

    Args:
        path: an existing directory, e.g. from `Roots.resolve`.
        name: what the job calls the model.
        field: dotted path in the job spec, for errors.
        base: the job's, so that a PEFT adapter to it can be opened too (`workers.adapters.Adapter`).

    Raises:
        InvalidCheckpoint: no checkpoint, pickles, or broken files.
    """
    if base is not None and _is_adapter(path):
        from workers.adapters import open_adapter  # which builds on this module

        return open_adapter(path, name, base, field)
    config = read_json(path / "config.json", field) if (path / "config.json").is_file() else None
    _refuse_what_is_no_checkpoint(path, config is not None, field)
    tensors: dict[str, TensorMeta] = {}
    stamps: dict[str, Stamp | None] = {}
    for file, expected in _files(path, field).items():
        stamps[file] = stamp(path / file)
        entries = read_header(path / file, field)
        for missing in sorted(set(expected or entries) - set(entries)):
            raise InvalidCheckpoint(
                f"{file} lacks tensor {missing!r}, which the index says it has", field=field, remedy=BROKEN
            )
        _refuse_second_copies(file, entries, tensors, field)
        tensors |= {name: TensorMeta(name, entry.dtype, entry.shape, file) for name, entry in entries.items()}
    if not tensors:
        raise InvalidCheckpoint(f"{name}: the checkpoint has no tensors", field=field, remedy=BROKEN)
    return Checkpoint(name, path, config or {}, dict(sorted(tensors.items())), stamps)


def open_checkpoints(spec: JobSpec, roots: Roots) -> dict[str, Checkpoint]:
    """Open all models of a job: ``base`` first, then the experts under their names, in the job's order.

    Raises:
        InvalidCheckpoint, PathNotAllowed: with the field at fault, e.g. ``experts.1.path``.
    """
    if spec.base is None:
        raise InvalidInput("the job has no checkpoints", field="base", remedy="name a base and experts")
    return open_models(spec.base, spec.experts, roots)


def open_models(base: ModelRef, experts: Sequence[Expert], roots: Roots) -> dict[str, Checkpoint]:
    """Open a base and experts; see `open_checkpoints`."""
    opened = open_checkpoint(roots.resolve(base, "base"), "base", "base")
    out = {"base": opened}
    for number, expert in enumerate(experts):
        field = f"experts.{number}"
        out[expert.name] = open_checkpoint(roots.resolve(expert, field), expert.name, field, opened)
    return out


def _refuse_second_copies(
    file: str, entries: Mapping[str, TensorEntry], known: Mapping[str, TensorMeta], field: str | None
) -> None:
    """Tensors that the index leaves out count as well: transformers loads whole shards. Two of one name cannot."""
    for name in sorted(set(entries) & set(known)):
        raise InvalidCheckpoint(
            f"tensor {name!r} is in {known[name].file} and in {file}; which one counts nobody can tell",
            field=field,
            remedy=BROKEN,
        )


def _refuse_what_is_no_checkpoint(path: Path, has_config: bool, field: str | None) -> None:
    if not any(path.iterdir()):
        raise InvalidCheckpoint(f"{path.name} is an empty directory", field=field, remedy="name a model's directory")
    if _is_adapter(path):
        raise InvalidCheckpoint(
            f"{path.name} is a PEFT adapter, not a whole model",
            field=field,
            remedy="name the model it was trained on as the base, and the adapter among the experts",
        )
    if not ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        raise _no_weights(path, field)
    if not has_config:
        raise InvalidCheckpoint(
            f"{path.name} has no config.json", field=field, remedy="save the model with save_pretrained"
        )


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() and not ((path / WEIGHTS).is_file() or (path / INDEX).is_file())


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
    weight_map = read_json(path / INDEX, field, doubles=False).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{INDEX} has no weight_map", field=field, remedy=BROKEN)
    out: dict[str, list[str] | None] = {}
    for tensor, file in weight_map.items():
        if not _is_shard_name(file):
            raise InvalidCheckpoint(
                f"{INDEX} places tensor {tensor!r} in {str(file)[:200]!r}, which is no safetensors file beside it",
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


def _is_shard_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and Path(file).name == file
        and file.endswith(".safetensors")
        and file.isprintable()
        and len(file) <= MAX_NAME
    )


def read_json(path: Path, field: str | None = None, *, doubles: bool = True) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file.

    Args:
        path: of the file.
        field: dotted path in the job spec, for errors.
        doubles: whether a name may stand twice, the last one counting.

    Raises:
        InvalidCheckpoint: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise InvalidCheckpoint(f"{path.name} is larger than {MAX_JSON // 10**6} MB", field=field, remedy=BROKEN)
        data = json.loads(path.read_bytes(), object_pairs_hook=None if doubles else no_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path.name} cannot be read: {error}", field=field, remedy=BROKEN) from error
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path.name} is no JSON object", field=field, remedy=BROKEN)
    return data
