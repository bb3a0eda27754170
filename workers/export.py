"""Writing a merged model as a Hugging Face checkpoint, tensor by tensor, completely or not at all."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.mergekit import to_configuration
from optimizer.recipe import PlannedLayer, Recipe
from optimizer.spec import USUAL_HEADS, JobSpec
from workers.adapters import Adapter
from workers.alignment import AlignedCheckpoint
from workers.checkpoints import INDEX, WEIGHTS, Checkpoint, tensor_bytes
from workers.merging.cache import Cache
from workers.merging.configs import Configs
from workers.merging.engine import Measurements, MergeEngine
from workers.merging.operator import operator_info
from workers.merging.plans import Origin, arranged
from workers.model_card import CardFacts, Score, model_card
from workers.naming import canonical_names
from workers.publishing import RECIPE, new_directory, sync, write_json
from workers.safetensors_header import ALIGNMENT, DTYPES, layout_file, size_in_bytes
from workers.tokenizers import TOKENIZER_FILES

GENERATION = "generation_config.json"
TEXT_FILES = (*TOKENIZER_FILES, GENERATION)
"""Files beside the weights that say how a model reads and writes text; they belong together."""

OTHER_FILES = ("*processor_config.json",)
"""Files that say how a model reads anything else."""

MERGEKIT = "mergekit.yml"
_TOKEN_ID = re.compile(r"_token_ids?$")


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
    scores: Mapping[str, Score],
    spec: JobSpec | None,
    progress: Callable[[float], None],
    test_scores: Mapping[str, Score] | None = None,
    overfitted: Sequence[str] = (),
    tokenizer_from: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    measurements: Measurements | None = None,
    cache: Cache | None = None,
) -> Path:
    """Write a merged model that plain transformers loads.

    Written to a directory beside ``out``, synced to disk and renamed: ``out`` appears complete or not at all, and what
    is to be overwritten stays until then. At most one tensor and a few blocks are in memory besides the mapped
    checkpoints. Beside weights, config and tokenizer it gets a model card, the recipe, and a ``mergekit.yml`` where
    mergekit can express the recipe.

    Args:
        recipe: the merged model.
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        out: directory to create.
        head: expert whose head, config and tensor names it gets; None for the base's.
        title: heading of the model card.
        scores: on the data that the search saw, by objective, for the model card.
        spec: the job that found it, for the model card.
        progress: called with the share done, from 0 to 1.
        test_scores: on other data, by objective, for the model card.
        overfitted: objectives of which the model card warns.
        tokenizer_from: model whose tokenizer, chat template and generation config it gets; that of ``head`` by default.
        overwrite: replace an earlier export that stands at ``out``.
        max_shard_bytes: a file of weights is no larger, unless one tensor alone is.
        measurements: what operators such as Fisher merging know of the models, from `load_measurements`.
        cache: of what operators prepare; in memory by default.

    Returns:
        ``out``.

    Raises:
        Conflict: ``out`` exists already, and is not to be overwritten or no export; it is left as it is.
        InvalidInput: no such model.
        InfeasibleCandidate: an operator is not defined for the recipe's coefficients.
        InputsChanged: a checkpoint's file was changed meanwhile.
        MergeoptError: the disk is full or cannot be written to; nothing is left behind.
    """
    source, text = _sources(checkpoints, head, tokenizer_from)
    if spec is not None and spec.merge.heads != USUAL_HEADS:
        recipe = recipe.model_copy(update={"heads": spec.merge.heads})
    engine = MergeEngine(checkpoints, layout, measurements=measurements, cache=cache)
    engine.check(recipe)
    origins = arranged(canonical_names(source), recipe.layers, layout)
    items = _items(source, checkpoints["base"], engine.result_layout(recipe), origins)
    config = _config(source, text, layout, recipe.layers)
    configuration = mergekit_configuration(recipe, checkpoints, layout)
    with new_directory(out, overwrite, checkpoints) as partial:
        progress(0.0)
        _write_weights(partial, items, _shards(items, max_shard_bytes), _Reader(engine, recipe), progress)
        write_json(partial / "config.json", config)
        _copy_files(partial, TEXT_FILES, text.path, checkpoints["base"].path)
        _copy_files(partial, OTHER_FILES, source.path, checkpoints["base"].path)
        write_json(partial / RECIPE, recipe.to_json())
        if isinstance(configuration, dict):
            (partial / MERGEKIT).write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
        reason = configuration if isinstance(configuration, str) else None
        facts = CardFacts(title, head, tokenizer_from, scores, test_scores or {}, spec, reason, overfitted=overfitted)
        (partial / "README.md").write_text(model_card(recipe, checkpoints, facts), encoding="utf-8")
        engine.verify()
    progress(1.0)
    return out


def mergekit_configuration(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], layout: Layout
) -> dict[str, Any] | str:
    """Return the content of a ``mergekit.yml`` that gives the same model, or why mergekit cannot express it."""
    base = str(recipe.models["base"].ref) if "base" in recipe.models else ""
    references = {
        name: f"{base}+{model.ref}" if _is_adapter(checkpoints[name]) else str(model.ref)
        for name, model in recipe.models.items()
        if name in checkpoints
    }
    try:
        return to_configuration(recipe, layout, canonical_names(checkpoints["base"]), references, operator_info)
    except InvalidInput as error:
        return error.message


def _is_adapter(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.inner if isinstance(checkpoint, AlignedCheckpoint) else checkpoint, Adapter)


def _sources(
    checkpoints: Mapping[str, Checkpoint], head: str | None, tokenizer_from: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """The models whose head and config, and whose tokenizer it gets."""
    for field, name in (("head", head), ("tokenizer_from", tokenizer_from)):
        if name is not None and name not in checkpoints:
            what = "expert" if field == "head" else "model"
            raise InvalidInput(
                f"{name!r} is no {what} of the job", field=field, remedy=f"use one of: {', '.join(checkpoints)}"
            )
    return checkpoints[head or "base"], checkpoints[tokenizer_from or head or "base"]


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


def _items(source: Checkpoint, base: Checkpoint, layout: Layout, origins: Mapping[str, Origin]) -> list[_Item]:
    """The tensors of the export, those first whose size keeps the next one aligned.

    Matrix products can differ in the last bit with the alignment of their operands. transformers maps the file, so
    with this order a loaded model computes exactly what the merged model in memory did.
    """
    shared = {tensor.name: tensor for tensor in layout.shared}
    base_names = canonical_names(base)
    float_dtype = _float_dtype(layout)
    items = []
    for name, origin in origins.items():
        meta = source.tensors[origin.raw]
        if name in shared:
            items.append(_Item(origin.target, shared[name].dtype, meta.shape, shared[name], None))
        elif DTYPES[meta.dtype].is_floating_point:
            items.append(_Item(origin.target, float_dtype, meta.shape, None, _own(source, origin.raw)))
        else:  # whole numbers are the base's
            known = origin.name in base_names and base.tensors[base_names[origin.name]].shape == meta.shape
            owner = _own(base, base_names[origin.name]) if known else _own(source, origin.raw)
            items.append(_Item(origin.target, meta.dtype, meta.shape, None, owner))
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
            sync(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def _config(
    source: Checkpoint, text: Checkpoint, layout: Layout, layers: Sequence[PlannedLayer] | None
) -> dict[str, object]:
    config = Configs(source).data(layers)
    if text is not source:  # which tokens begin and end a text belongs to the tokenizer
        config |= {field: value for field, value in text.config.items() if _TOKEN_ID.search(field)}
    dtype = str(DTYPES[_float_dtype(layout)]).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config.pop("attn_implementation", None)  # could name code to download; scores were taken without it
    return config


def _copy_files(directory: Path, patterns: Sequence[str], source: Path, base: Path) -> None:
    """Copy files from the source; from the base instead where the source has none, or nothing but settings."""
    for owner in (source, base):
        found = [path for pattern in patterns for path in sorted(owner.glob(pattern)) if path.is_file()]
        for path in found:
            if not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)
        if any(path.name != GENERATION for path in found):
            return
