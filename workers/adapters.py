"""PEFT LoRA adapters as checkpoints: a base, and the low-rank changes that an adapter makes to it.

An adapter's tensors are computed when they are asked for, as base + scale · B @ A in float32, and not kept; the engine
asks for the factors instead where an operator can use them. What the adapter has as whole tensors (biases, the modules
of ``modules_to_save``) stands as it is. A head that the base lacks or has in another size is the adapter's own, and its
config says so, as if the model had been saved whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from optimizer.errors import InvalidCheckpoint
from optimizer.problem import Finding
from workers.adapters_config import MERGE_IT, LoraConfig, read_config
from workers.adapters_names import PREFIX, BaseNames
from workers.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    Factors,
    TensorMeta,
    stamp,
    tensor_bytes,
)
from workers.merging.blocks import work_dtype
from workers.merging.configs import load_config
from workers.merging.low_rank import expand, matrix_shape
from workers.safetensors_header import BROKEN, MERGEABLE, read_header

_PAIRS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
    ".lora_B.bias": ("bias", False),
}
"""Ends of the names of factors: which one it is, and whether it is an embedding's."""

_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""PEFT's task types by the class whose head they need."""

_CLASSES = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
"""Names of the layer that has a row for each class."""

_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")
"""Files that tell how a model reads and writes."""

_NOT_BESIDE = ("config.json", ADAPTER_CONFIG, "*.safetensors.index.json")


@dataclass(frozen=True)
class _Pair:
    """The factors of one module: names of tensors in the adapter's file."""

    down: str
    up: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class _Shift:
    """A bias that LoRA adds to the base's: its name in the adapter's file."""

    bias: str
    scale: float


@dataclass(frozen=True)
class _Whole:
    """A tensor that stands in place of the base's, or that the base lacks: its name in the adapter's file."""

    tensor: str


_Change = _Pair | _Shift | _Whole


class Adapter(Checkpoint):
    """A LoRA adapter over its base, seen as a whole model.

    Attributes:
        base: the model it was trained on, as the job gives it.
        notes: what the compatibility report says of it.

    Tensors have the base's names (with its architecture's prefix where the adapter adds a head to a headless base) and
    the types of the base's files; those that the adapter changes are returned in float32, so that a merge rounds once.
    """

    def __init__(self, base: Checkpoint, file: Checkpoint, read: _Reading) -> None:
        self.base = base
        self._file = file
        self._changes = read.changes
        self._base_names = read.base_names
        self.notes = _notes(file.name, read)
        path = _face(file.path, base.path, read.config)
        super().__init__(file.name, path, read.config, dict(sorted(read.tensors.items())))
        self.source = file.path
        self._finalizer = weakref.finalize(self, shutil.rmtree, path, True)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint`; what the adapter changes is computed anew every time."""
        change = self._changes.get(name)
        if change is None:
            return self.base.tensor(self._base_names[name])
        if isinstance(change, _Whole):
            return self._file.tensor(change.tensor)
        old = self.base.tensor(self._base_names[name])
        if isinstance(change, _Pair):
            return expand(old, self._factors(change, len(old.shape)))
        shift = self._file.tensor(change.bias)
        work = work_dtype(old, shift)
        return old.to(work) + shift.to(work) * change.scale

    def factors(self, name: str) -> Factors | None:
        """See `Checkpoint`; of rank 0 for tensors that the adapter leaves as they are, None for those it replaces."""
        change = self._changes.get(name)
        if isinstance(change, _Pair):
            return self._factors(change, len(self.tensors[name].shape))
        if change is not None:
            return None
        height, width = matrix_shape(self.tensors[name].shape)
        return Factors(torch.empty(height, 0), torch.empty(0, width), 1.0)

    def read_ahead(self, name: str) -> None:
        """See `Checkpoint`."""
        if not isinstance(self._changes.get(name), _Whole):
            self.base.read_ahead(self._base_names[name])

    def verify(self) -> None:
        """See `Checkpoint`; the base is verified by itself."""
        self._file.verify()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the base's digest and everything that the adapter changes: names, scales, and bytes."""
        total = hashlib.sha256(self.base.digest.encode())
        for name, change in sorted(self._changes.items()):
            kind, parts, scale = _content(change)
            shapes = [[self._file.tensors[part].dtype, list(self._file.tensors[part].shape)] for part in parts]
            head = json.dumps([name, kind, scale, shapes], separators=(",", ":")).encode()
            total.update(len(head).to_bytes(8, "little") + head)
            for part in parts:
                total.update(memoryview(tensor_bytes(self._file.tensor(part))))
        return total.hexdigest()

    def _factors(self, pair: _Pair, dimensions: int) -> Factors:
        down, up = self._file.tensor(pair.down), self._file.tensor(pair.up)
        if pair.transposed:
            return Factors(down.T, up.T, pair.scale, True)
        return Factors(up.flatten(1), down.flatten(1), pair.scale) if dimensions > 2 else Factors(up, down, pair.scale)


def open_adapter(path: Path, name: str, base: Checkpoint, field: str | None = None) -> Adapter:
    """Open the LoRA adapter in the directory ``path``; its factors are checked, the base's weights not read.

    Args:
        path: an existing directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what the job calls the model.
        base: what the adapter was trained on. That ``base_model_name_or_path`` says so is no condition; that all
            modules and shapes fit is.
        field: dotted path in the job spec, for errors.

    Raises:
        InvalidCheckpoint: not LoRA or a variant that is not base + scale · B @ A, broken files, or another base.
    """
    config = read_config(path, field)
    if not (path / ADAPTER_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise InvalidCheckpoint(
            f"{path.name} has no {ADAPTER_WEIGHTS}" + (", only a pickle, which can run code" if pickled else ""),
            field=field,
            remedy="save the adapter with peft's save_pretrained, which writes safetensors",
        )
    known = stamp(path / ADAPTER_WEIGHTS)
    entries = read_header(path / ADAPTER_WEIGHTS, field)
    metas = {key: TensorMeta(key, entry.dtype, entry.shape, ADAPTER_WEIGHTS) for key, entry in entries.items()}
    file = Checkpoint(name, path, {}, metas, {ADAPTER_WEIGHTS: known})
    return Adapter(base, file, _Reading(file, base, config, field))


class _Reading:
    """What an adapter's file says, checked against its base.

    Attributes:
        changes: by the name the tensor has in the adapter's view of the model.
        base_names: the base's own names by those names.
        tensors: all tensors of the view.
        config: of the view.
        lora: the adapter's own configuration.
        ranks: how many modules have which rank and scale.
    """

    def __init__(self, file: Checkpoint, base: Checkpoint, lora: LoraConfig, field: str | None) -> None:
        self.lora = lora
        self.ranks: Counter[tuple[int, float]] = Counter()
        self._file, self._base, self._field = file, base, field
        self._names = BaseNames(base)
        self._new: dict[str, TensorMeta] = {}
        self.changes: dict[str, _Change] = {}
        wholes, modules = self._sorted()
        for key, name in wholes.items():
            self._add_whole(key, name)
        for module, parts in sorted(modules.items()):
            self._add_module(module, parts)
        if not self.changes:
            raise self._broken("has no factors", remedy=BROKEN)
        self._check_finite()
        self._rename()

    # --- what the file has -----------------------------------------------------------------------------------------

    def _sorted(self) -> tuple[dict[str, str], dict[str, dict[tuple[str, bool], str]]]:
        """Whole tensors with the wrapped model's names for them, and factors by module."""
        wholes: dict[str, str] = {}
        modules: dict[str, dict[tuple[str, bool], str]] = {}
        for key, meta in self._file.tensors.items():
            if not key.startswith(PREFIX):
                raise self._broken(f"has tensor {key!r}, whose name does not begin with {PREFIX!r}", remedy=BROKEN)
            if meta.dtype not in MERGEABLE:
                raise self._broken(f"has tensor {key!r} of type {meta.dtype}, which is no type of weights")
            name = key.removeprefix(PREFIX)
            end = next((end for end in _PAIRS if name.endswith(end)), None)
            if end is not None:
                modules.setdefault(name.removesuffix(end), {})[_PAIRS[end]] = key
            elif "lora_" in name or "trainable_tokens" in name:
                raise self._broken(f"has tensor {key!r}, which is no factor of plain LoRA", remedy=MERGE_IT)
            elif ".original_module." not in name and ".modules_to_save." not in name:
                wholes[key] = name  # the others are what bias="all" saves once more, or of a head before training
        return wholes, modules

    def _add_whole(self, key: str, name: str) -> None:
        plain = name.replace(".base_layer.", ".")
        raw = self._names.find(plain)
        if raw is None and self._names.is_tied_output(plain):
            return  # PEFT saves a tied output layer beside the embeddings, which are what counts
        if raw is not None and plain != name and not name.endswith(".bias"):
            self._check_copy(key, raw)
        elif raw is not None:
            self._put(raw, _Whole(key))
        else:
            self._put(plain, _Whole(key))
            self._new[plain] = replace(self._file.tensors[key], name=plain)

    def _check_copy(self, key: str, raw: str) -> None:
        """PEFT saves the base's embeddings beside their factors: they tell whether the base is the one."""
        copy, own = self._file.tensor(key), self._base.tensor(raw)
        if copy.shape != own.shape or not torch.equal(copy.to(own.dtype), own):
            raise self._broken(f"has with {key!r} a copy of the base's {raw!r} that differs from the base's")

    def _add_module(self, module: str, parts: Mapping[tuple[str, bool], str]) -> None:
        embedding = ("A", True) in parts or ("B", True) in parts
        down, up = parts.get(("A", embedding)), parts.get(("B", embedding))
        if down is None or up is None:
            other = next(iter(parts.values()))
            raise self._broken(f"has {other!r} without its partner of {'B' if up is None else 'A'}", remedy=BROKEN)
        raw = self._names.find(f"{module}.weight")
        if raw is None:
            self._refuse_module(module, down)
            return
        rank = self._check_rank(module, down, up)
        scale = self.lora.scale_of(module)
        transposed = self._check_shape(f"{module}.weight", raw, down, up, embedding)
        self.ranks[rank, scale] += 1
        self._put(raw, _Pair(down, up, scale, transposed))
        if ("bias", False) in parts:
            self._add_shift(module, parts["bias", False], scale)

    def _refuse_module(self, module: str, key: str) -> None:
        if not self._names.is_tied_output(f"{module}.weight"):
            raise self._broken(f"has factors {key!r} for a module that the base lacks")
        if not self.lora.tied:  # with it the embeddings have the same factors
            raise self._broken(
                f"has factors {key!r} for the output layer, which the base ties to its embeddings",
                remedy="train it with ensure_weight_tying, or on a base with an output layer of its own",
            )

    def _add_shift(self, module: str, key: str, scale: float) -> None:
        raw = self._names.find(f"{module}.bias")
        if raw is None or self._file.tensors[key].shape != self._base.tensors[raw].shape:
            raise self._broken(f"has {key!r}, a bias that does not fit the base")
        self._put(raw, _Shift(key, scale))

    def _put(self, name: str, change: _Change) -> None:
        if name in self.changes:
            keys = sorted({*_content(self.changes[name])[1], *_content(change)[1]})
            raise self._broken(f"changes {name!r} twice, with {', '.join(map(repr, keys))}", remedy=BROKEN)
        self.changes[name] = change

    # --- whether it fits -------------------------------------------------------------------------------------------

    def _check_rank(self, module: str, down: str, up: str) -> int:
        shapes = self._file.tensors[down].shape, self._file.tensors[up].shape
        if min(len(shape) for shape in shapes) < 2 or shapes[0][0] != shapes[1][1]:
            raise self._broken(f"has {down!r} of shape {list(shapes[0])} and {up!r} of shape {list(shapes[1])}")
        rank = self.lora.rank_of(module)
        if shapes[0][0] != rank:
            raise self._broken(
                f"has {down!r} of rank {shapes[0][0]}, but {ADAPTER_CONFIG} gives the module rank {rank}", remedy=BROKEN
            )
        return rank

    def _check_shape(self, name: str, raw: str, down: str, up: str, embedding: bool) -> bool:
        """Return whether the base stores the transpose of B @ A."""
        shape = self._base.tensors[raw].shape
        a, b = self._file.tensors[down].shape, self._file.tensors[up].shape
        if len(shape) == 2 and len(a) == len(b) == 2:
            plain, turned = (b[0], a[1]) == shape, (a[1], b[0]) == shape
            if embedding and turned:
                return True
            if plain and turned:
                return self._names.stored_transposed(name)
            if plain or turned:
                return turned
        elif len(shape) == len(a) > 2 and (b[0], *a[1:]) == shape and set(b[2:]) <= {1}:
            return False  # a convolution
        raise self._broken(
            f"has {down!r} of shape {list(a)} and {up!r} of shape {list(b)} for the base's {raw!r} of shape {list(shape)}"
        )

    def _check_finite(self) -> None:
        for change in self.changes.values():
            for key in _content(change)[1]:
                if not bool(self._file.tensor(key).isfinite().all()):
                    raise self._broken(f"has numbers in {key!r} that are not finite", remedy=BROKEN)

    def _broken(self, what: str, remedy: str = "name the base that the adapter was trained on") -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{ADAPTER_WEIGHTS} of {self._file.name} {what}", field=self._field, remedy=remedy)

    @property
    def loosens_tie(self) -> bool:
        """Whether embeddings change to which the base, but not the adapter, ties the output layer."""
        tied = self._names.tied
        return tied is not None and not self.lora.tied and isinstance(self.changes.get(tied[1]), _Pair)

    # --- the view --------------------------------------------------------------------------------------------------

    def _rename(self) -> None:
        """Give the tensors the names that a whole model with the adapter's head would have."""
        own = list(self._names.raw.values())
        headless = bool(self._new) and not any(raw.startswith(self._names.prefix) for raw in own)
        prefix = self._names.prefix if headless else ""
        self.base_names = {prefix + raw: raw for raw in own}
        self.changes = {name if name in self._new else prefix + name: change for name, change in self.changes.items()}
        self.tensors = dict(self._new)
        for name, raw in self.base_names.items():
            change = self.changes.get(name)
            meta = self._file.tensors[change.tensor] if isinstance(change, _Whole) else self._base.tensors[raw]
            self.tensors[name] = replace(meta, name=name)
        self.config = self._config()

    def _config(self) -> dict[str, Any]:
        config = dict(self._base.config)
        if self._new and (found := self._architecture()) is not None:
            config["architectures"] = [found]
        heads = [self.tensors[name] for name in self.changes if name.endswith(_CLASSES)]
        if heads and heads[0].shape:
            labels = heads[0].shape[0]
            if labels != len(config.get("id2label") or "12"):  # two classes are what transformers assumes
                config["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
                config["label2id"] = {f"LABEL_{number}": number for number in range(labels)}
        return config

    def _architecture(self) -> str | None:
        """The class that was wrapped, where transformers has it."""
        if self.lora.base_class is not None:
            return self.lora.base_class if hasattr(transformers, self.lora.base_class) else None
        automatic: Any = getattr(transformers, _TASKS.get(self.lora.task or "", ""), None)
        if automatic is None:
            return None
        found = automatic._model_mapping.get(type(load_config(self._base)), None)
        return found.__name__ if isinstance(found, type) else None


def _content(change: _Change) -> tuple[str, tuple[str, ...], float]:
    match change:
        case _Pair(down, up, scale, transposed):
            return "transposed" if transposed else "product", (down, up), scale
        case _Shift(bias, scale):
            return "shift", (bias,), scale
        case _Whole(tensor):
            return "whole", (tensor,), 1.0


def _notes(name: str, read: _Reading) -> list[Finding]:
    ranks = ", ".join(
        f"rank {rank} and scale {scale:g} in {count} modules" for (rank, scale), count in sorted(read.ranks.items())
    )
    text = f"is a LoRA adapter on {read.lora.targets}: {ranks or 'no factors'}"
    wholes = sorted(name for name, change in read.changes.items() if not isinstance(change, _Pair))
    if wholes:
        text += f"; {len(wholes)} tensors are its own as a whole"
    notes = [Finding(severity="info", model=name, message=text, tensors=wholes[:20])]
    if read.loosens_tie:
        text = "changes the embeddings; the output layer, which the base ties to them, changes with them in a merge"
        notes.append(Finding(severity="warning", model=name, message=text))
    return notes


def _face(adapter: Path, base: Path, config: Mapping[str, Any]) -> Path:
    """A directory with what a whole model has beside its weights: the base's files, and the adapter's over them."""
    face = Path(tempfile.mkdtemp(prefix="mergeopt-adapter-"))
    for owner in (base, adapter):
        for file in (found for pattern in _BESIDE for found in owner.glob(pattern)):
            if file.is_file() and not any(file.match(other) for other in _NOT_BESIDE):
                (face / file.name).unlink(missing_ok=True)
                (face / file.name).symlink_to(file.resolve())
    (face / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return face
