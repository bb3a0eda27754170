"""Writing a merged model as a Hugging Face checkpoint, tensor by tensor, completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torch import Tensor

from optimizer.errors import Conflict, InvalidInput, MergeoptError
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec
from workers.checkpoints import INDEX, WEIGHTS, Checkpoint, tensor_bytes
from workers.merging.engine import MergeEngine
from workers.model_card import model_card
from workers.naming import canonical_names
from workers.safetensors_header import ALIGNMENT, DTYPES, layout_file, size_in_bytes

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
)
"""Files beside the weights that belong to a model: how it reads and writes, not what it is."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class _Item:
    """One tensor to write; `info` is None for tensors that are not merged."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    info: TensorInfo | None
    own: Callable[[], Tensor] | None

    @property
    def nbytes(self) -> int:
        return size_in_bytes(self.dtype, self.shape)


def export_checkpoint(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    layout: Layout,
    out: Path,
    *,
    head: str | None,
    title: str,
    scores: Mapping[str, float],
    spec: JobSpec | None,
    progress: Callable[[float], None],
    max_shard_bytes: float = 5e9,
) -> Path:
    """Write a merged model that plain transformers loads.

    Written to a directory beside ``out``, synced to disk and renamed: ``out`` appears complete or not at all. At most
    one tensor and a few blocks are in memory besides the mapped checkpoints.

    Args:
        recipe: the merged model.
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        out: directory to create.
        head: expert whose head, config, tokenizer and tensor names it gets; None for the base's.
        title: heading of the model card.
        scores: by objective, for the model card.
        spec: the job that found it, for the model card.
        progress: called with the share done, from 0 to 1.
        max_shard_bytes: a file of weights is no larger, unless one tensor alone is.

    Returns:
        ``out``.

    Raises:
        Conflict: ``out`` exists already; it is left as it is.
        InvalidInput: no such expert.
        InfeasibleCandidate: an operator is not defined for the recipe's coefficients.
        MergeoptError: the disk is full or cannot be written to; nothing is left behind.
    """
    if head is not None and head not in checkpoints:
        raise InvalidInput(f"{head!r} is no expert of the job", field="head", remedy="name an expert")
    source = checkpoints[head or "base"]
    engine = MergeEngine(checkpoints, layout)
    engine.check(recipe)
    items = _items(source, checkpoints["base"], layout)
    with _new_directory(out) as partial:
        progress(0.0)
        _write_weights(partial, items, _shards(items, max_shard_bytes), _Reader(engine, recipe), progress)
        _write_json(partial / "config.json", _config(source, layout))
        _copy_files(partial, source.path, checkpoints["base"].path)
        _write_json(partial / "recipe.json", recipe.to_json())
        card = model_card(recipe, checkpoints, head=head, title=title, scores=scores, spec=spec)
        (partial / "README.md").write_text(card, encoding="utf-8")
    progress(1.0)
    return out


class _Reader:
    """Computes what is written."""

    def __init__(self, engine: MergeEngine, recipe: Recipe) -> None:
        self._engine = engine
        self._recipe = recipe

    def __call__(self, item: _Item) -> Tensor:
        if item.info is not None:
            return self._engine.merged(self._recipe, item.info, DTYPES[item.dtype])
        assert item.own is not None  # noqa: S101 - an item has one or the other
        return item.own().to(DTYPES[item.dtype])


def _items(source: Checkpoint, base: Checkpoint, layout: Layout) -> list[_Item]:
    """The tensors of the export, those first whose size keeps the next one aligned.

    Matrix products can differ in the last bit with the alignment of their operands. transformers maps the file, so
    with this order a loaded model computes exactly what the merged model in memory did.
    """
    shared = {tensor.name: tensor for tensor in layout.shared}
    base_names = canonical_names(base)
    float_dtype = _float_dtype(layout)
    items = []
    for name, raw in canonical_names(source).items():
        meta = source.tensors[raw]
        if name in shared:
            items.append(_Item(raw, shared[name].dtype, meta.shape, shared[name], None))
        elif DTYPES[meta.dtype].is_floating_point:
            items.append(_Item(raw, float_dtype, meta.shape, None, _own(source, raw)))
        else:  # whole numbers are the base's
            known = name in base_names and base.tensors[base_names[name]].shape == meta.shape
            owner = _own(base, base_names[name]) if known else _own(source, raw)
            items.append(_Item(raw, meta.dtype, meta.shape, None, owner))
    return sorted(items, key=lambda item: (-_alignment(item.nbytes), item.name))


def _own(checkpoint: Checkpoint, raw: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.tensor(raw)


def _alignment(size: int) -> int:
    """The largest power of two, up to `ALIGNMENT`, that divides ``size``."""
    return min(ALIGNMENT, size & -size) if size else ALIGNMENT


def _float_dtype(layout: Layout) -> str:
    """The base's type: that of most of its parameters."""
    return Counter(tensor.dtype for tensor in layout.shared).most_common(1)[0][0]


def _shards(items: Sequence[_Item], limit: float) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write_weights(
    directory: Path,
    items: Sequence[_Item],
    shards: Sequence[Sequence[_Item]],
    read: Callable[[_Item], Tensor],
    progress: Callable[[float], None],
) -> None:
    total = max(1, sum(item.nbytes for item in items))
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb") as file:
            file.write(layout_file([(item.name, item.dtype, item.shape) for item in shard], {"format": "pt"}))
            for item in shard:
                file.write(memoryview(tensor_bytes(read(item))))
                weight_map[item.name] = name
                done += item.nbytes
                progress(done / total)
            _sync(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _config(source: Checkpoint, layout: Layout) -> dict[str, object]:
    config = dict(source.config)
    dtype = str(DTYPES[_float_dtype(layout)]).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config.pop("attn_implementation", None)  # could name code to download; scores were taken without it
    return config


def _copy_files(directory: Path, source: Path, base: Path) -> None:
    for pattern in COPIED:
        for owner in (source, base):
            found = [path for path in sorted(owner.glob(pattern)) if path.is_file()]
            for path in found:
                shutil.copyfile(path, directory / path.name)
            if found:
                break


def _write_json(path: Path, data: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)
        file.write("\n")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory that becomes ``out`` when the block succeeds, and disappears when it fails."""
    if os.path.lexists(out):
        raise _exists(out)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            with path.open("rb+") as file:
                _sync(file)
        _sync_directory(partial)
        _publish(partial, out)
    except OSError as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, out: Path) -> None:
    if os.path.lexists(out):  # renaming would replace an empty directory without a word
        raise _exists(out)
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # somebody else was faster
            raise _exists(out) from error
        raise
    _sync_directory(out.parent)


def _exists(out: Path) -> Conflict:
    return Conflict(f"{out.name} exists already", remedy="choose another directory, or remove it first")


def _write_error(out: Path, error: OSError) -> MergeoptError:
    if error.errno in _FULL:
        return MergeoptError(
            f"{out.name} could not be written: no space is left; nothing was kept",
            remedy="free some space, or export to another disk",
        )
    return MergeoptError(f"{out.name} could not be written: {error.strerror or error}; nothing was kept")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
