"""Bringing models that differ in vocabulary, or in whether they tie their output layer, to one shape before merging.

An `AlignedCheckpoint` looks like any other checkpoint, so that the engine, the resident model, evaluators and exports
need no case of their own. What was done is in its ``notes``, for the compatibility report.

Vocabularies, by the rule that the user names (``merge.vocabulary``):

- ``base``: the rows of the base's tokens are kept, found by token and not by number; the other tokens are dropped.
- ``union``: the base's tokens keep their numbers, the experts' further ones follow (`workers.tokenizers.join`).

A row that a model lacks is the base's row where the base has the token, so that the model's task vector is zero there;
else the mean of the rows of those that have it, for every model that lacks it (mergekit's rule for
``tokenizer_source``). Rows behind the last token (padding) are the base's.

Output layers: where one model has an output layer of its own and another ties it to its embeddings, the merged model
has one of its own, and a tied model's is its embeddings.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from optimizer.errors import InvalidCheckpoint
from optimizer.problem import Finding
from optimizer.recipe import JoinedVocabulary, canonical_json
from workers.checkpoints import Checkpoint, Factors, TensorMeta
from workers.naming import OUTPUT_LAYER, canonical_names, tied_output
from workers.tokenizers import FILE, LEGACY_FILES, TOKENIZER_FILES, Tokenizer, join, read_tokenizer, relation

Rule = Literal["refuse", "base", "union"]

_ROWS = re.compile(
    r"(^|\.)(embed_tokens|embed_in|word_embeddings|wte|shared|lm_head|embed_out|cls\.predictions(\.decoder)?)"
    r"\.(weight|bias)$"
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_TOKEN_ID = re.compile(r"_token_ids?$")


class AlignedCheckpoint(Checkpoint):
    """A checkpoint seen with other rows, tensors or settings than its files have; the digest is that of the files.

    What is computed is kept in memory: one copy of the embeddings (and of an output layer of its own) in each process.

    Args:
        inner: the checkpoint as it is.
        tensors: what it is to have, by its own names.
        make: how to get those tensors that the inner one does not have like that, by name.
        config: fields of its config that are to differ.
    """

    def __init__(
        self,
        inner: Checkpoint,
        tensors: Mapping[str, TensorMeta],
        make: Mapping[str, Callable[[], Tensor]],
        config: Mapping[str, Any],
    ) -> None:
        self.inner = inner
        self.vocabulary: JoinedVocabulary | None = getattr(inner, "vocabulary", None)
        self.notes: list[Finding] = list(getattr(inner, "notes", []))
        self._make = make
        self._changes = config
        path = _face(inner.path, {**inner.config, **config})
        super().__init__(inner.name, path, {**inner.config, **config}, dict(sorted(tensors.items())))
        self.source = inner.source
        self._finalizer = weakref.finalize(self, shutil.rmtree, path, True)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint`; a tensor that the files do not have like this is computed once."""
        if name not in self._make:
            return self.inner.tensor(name)
        with self._lock:
            if name not in self._mapped:
                self._mapped[name] = self._make[name]()
            return self._mapped[name]

    def read_ahead(self, name: str) -> None:
        """See `Checkpoint`."""
        if name not in self._make:
            self.inner.read_ahead(name)

    def verify(self) -> None:
        """See `Checkpoint`."""
        self.inner.verify()

    def factors(self, name: str) -> Factors | None:
        """See `Checkpoint`; where rows were moved there are none."""
        return None if name in self._make else self.inner.factors(name)

    @cached_property
    def digest(self) -> str:
        """The digest of the files: an aligned model is known by it and by `optimizer.recipe.JoinedVocabulary`."""
        return self.inner.digest


def align(checkpoints: Mapping[str, Checkpoint], rule: Rule) -> dict[str, Checkpoint]:
    """Return checkpoints that can be merged tensor by tensor as far as vocabularies and tied output layers go.

    Args:
        checkpoints: ``base`` and the experts by name, in the order in which tokens get numbers.
        rule: what to do about different vocabularies; with ``refuse`` they stay as they are, and
            `workers.compatibility.inspect` reports them.

    Raises:
        InvalidCheckpoint: the rule needs a tokenizer that a model does not have.
        InvalidInput: the tokenizers are of kinds that have no union.
    """
    return _join_vocabularies(_untie(checkpoints), rule)


def vocabulary_of(checkpoint: Checkpoint) -> JoinedVocabulary | None:
    """Return how a checkpoint's vocabulary was joined with others, or None where it is its own."""
    return checkpoint.vocabulary if isinstance(checkpoint, AlignedCheckpoint) else None


def content_of(name: str, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return digests of all that a checkpoint's shared weights depend on.

    Args:
        name: of the checkpoint.
        checkpoints: all of the job, by name.
    """
    joined = vocabulary_of(checkpoints[name])
    if joined is None:
        return [checkpoints[name].digest]
    return [checkpoints[name].digest, joined.digest, *(checkpoints[other].digest for other in joined.order)]


def notes_of(checkpoint: Checkpoint) -> list[Finding]:
    """Return what the report says of how a checkpoint was opened, and of what was done to make it fit."""
    return list(getattr(checkpoint, "notes", []))


def rows_by_token(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensors that have a row for each token: the checkpoint's own names by canonical name."""
    return {
        name: raw
        for name, raw in canonical_names(checkpoint).items()
        if _ROWS.search(name) and checkpoint.tensors[raw].shape
    }


def row_count(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows of the embeddings, padding included; None for models without tokens."""
    size = _text_config(checkpoint.config).get("vocab_size")
    rows = [checkpoint.tensors[raw].shape[0] for raw in rows_by_token(checkpoint).values()]
    return max(rows) if rows else size if isinstance(size, int) else None


# --- output layers -------------------------------------------------------------------------------------------------


def _untie(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    tied = {name: tied_output(checkpoint) for name, checkpoint in checkpoints.items()}
    own = [name for name, checkpoint in checkpoints.items() if tied[name] is None and _has_output(checkpoint)]
    if not own or not any(tied.values()):
        return dict(checkpoints)
    out = dict(checkpoints)
    for name, found in tied.items():
        if found is not None:
            out[name] = _untied(checkpoints[name], *found, own[0])
    return out


def _has_output(checkpoint: Checkpoint) -> bool:
    return any(OUTPUT_LAYER.search(name) for name in checkpoint.tensors)


def _untied(checkpoint: Checkpoint, output: str, source: str, other: str) -> Checkpoint:
    meta = checkpoint.tensors[source]
    tensors = {**checkpoint.tensors, output: replace(meta, name=output)}
    view = AlignedCheckpoint(
        checkpoint, tensors, {output: lambda: checkpoint.tensor(source)}, {"tie_word_embeddings": False}
    )
    text = (
        f"ties its output layer to its embeddings, {other} has one of its own: the merged model has one of its own, "
        "and this model's embeddings stand for its output layer"
    )
    view.notes.append(Finding(severity="warning", model=checkpoint.name, message=text, tensors=[output]))
    return view


# --- vocabularies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a model come from.

    Attributes:
        own: for each row of the result the model's own row, or -1.
        tokens: for each row whether it stands for a token.
    """

    own: Tensor
    tokens: Tensor


def _join_vocabularies(checkpoints: Mapping[str, Checkpoint], rule: Rule) -> dict[str, Checkpoint]:
    counts = {name: row_count(checkpoint) for name, checkpoint in checkpoints.items()}
    if rule == "refuse" or counts["base"] is None:
        return dict(checkpoints)
    found = {name: read_tokenizer(checkpoint.path) for name, checkpoint in checkpoints.items()}
    base = found["base"]
    if base is None:
        raise _no_tokenizer(checkpoints["base"])
    own = {name: _own_tokenizer(checkpoints[name], tokenizer, base, counts) for name, tokenizer in found.items()}
    if all(relation(base, tokenizer) == "equal" for tokenizer in own.values()) and len(set(counts.values())) == 1:
        return dict(checkpoints)
    joined = join(base, [own[name] for name in checkpoints if name != "base"]) if rule == "union" else base
    return _Joiner(checkpoints, own, joined, rule).views()


def _own_tokenizer(
    checkpoint: Checkpoint, found: Tokenizer | None, base: Tokenizer, counts: Mapping[str, int | None]
) -> Tokenizer:
    if found is not None:
        return found
    if counts[checkpoint.name] != counts["base"] or any((checkpoint.path / file).is_file() for file in LEGACY_FILES):
        raise _no_tokenizer(checkpoint)
    return base


def _no_tokenizer(checkpoint: Checkpoint) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{checkpoint.name} has no readable {FILE}, so its rows cannot be found by token",
        field="base" if checkpoint.name == "base" else "experts",
        remedy="save its tokenizer with transformers' save_pretrained, or set merge.vocabulary to `refuse`",
    )


class _Joiner:
    """Makes the views of models whose vocabularies are joined."""

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], own: Mapping[str, Tokenizer], joined: Tokenizer, rule: Rule
    ) -> None:
        self._checkpoints, self._own, self._joined, self._rule = checkpoints, own, joined, rule
        self._raw = {name: rows_by_token(checkpoint) for name, checkpoint in checkpoints.items()}
        base_rows = row_count(checkpoints["base"]) or 0
        numbers = [number for number in joined.tokens.values() if rule == "union" or number < base_rows]
        self._size = max(base_rows, max(numbers) + 1)
        self._rows = {name: self._find(name) for name in checkpoints}

    def views(self) -> dict[str, Checkpoint]:
        """Return the checkpoints by name; tensors whose rows stay where they are remain mapped from disk."""
        base = self._view("base", None)
        return {name: base if name == "base" else self._view(name, base) for name in self._checkpoints}

    def _find(self, name: str) -> _Rows:
        own = torch.full((self._size,), -1, dtype=torch.int64)
        tokens = torch.zeros(self._size, dtype=torch.bool)
        count = row_count(self._checkpoints[name]) or 0
        mine = self._own[name].tokens
        for token, number in self._joined.tokens.items():
            if number >= self._size:
                continue
            tokens[number] = True
            own[number] = row if (row := mine.get(token, -1)) < count else -1
        if name == "base":  # padding keeps its place
            padding = ~tokens[:count]
            own[:count][padding] = torch.arange(count)[padding]
        return _Rows(own, tokens)

    def _view(self, name: str, base: AlignedCheckpoint | None) -> AlignedCheckpoint:
        checkpoint = self._checkpoints[name]
        tensors, make = dict(checkpoint.tensors), {}
        for canonical, raw in self._raw[name].items():
            meta = checkpoint.tensors[raw]
            tensors[raw] = replace(meta, shape=(self._size, *meta.shape[1:]))
            if not torch.equal(self._rows[name].own, torch.arange(meta.shape[0])):
                make[raw] = self._maker(name, canonical, base)
        view = AlignedCheckpoint(checkpoint, tensors, make, self._config(checkpoint, base))
        view.vocabulary = JoinedVocabulary(
            rule=self._rule if self._rule != "refuse" else "base",
            order=list(self._checkpoints),
            digest=self._digest(name),
        )
        self._write_tokenizer(view, base)
        view.notes += self._notes(name)
        return view

    def _maker(self, name: str, canonical: str, base: AlignedCheckpoint | None) -> Callable[[], Tensor]:
        def make() -> Tensor:
            source = self._checkpoints[name].tensor(self._raw[name][canonical])
            rows = self._rows[name].own
            known = rows >= 0
            out = source.new_zeros((self._size, *source.shape[1:]))
            out[known] = source[rows[known]]
            lacking = torch.nonzero(~known).flatten()
            if base is not None and canonical in self._raw["base"]:
                out[lacking] = base.tensor(self._raw["base"][canonical])[lacking].to(out.dtype)
            else:
                out[lacking] = self._mean(canonical, lacking, out)
            return out

        return make

    def _mean(self, canonical: str, rows: Tensor, like: Tensor) -> Tensor:
        """The mean, row by row, of the models that have the token; of all of a model's rows where none has it."""
        total = like.new_zeros((len(rows), *like.shape[1:]), dtype=torch.float64)
        count = torch.zeros(len(rows), dtype=torch.float64)
        for name, checkpoint in self._checkpoints.items():
            if canonical not in self._raw[name]:
                continue
            own = self._rows[name].own[rows]
            has = own >= 0
            total[has] += checkpoint.tensor(self._raw[name][canonical])[own[has]].to(torch.float64)
            count += has
        shape = (-1, *[1] * (total.dim() - 1))
        fallback = like.to(torch.float64).mean(dim=0, keepdim=True)
        mean = torch.where(count.view(shape) > 0, total / count.clamp(min=1).view(shape), fallback)
        return mean.to(like.dtype)

    def _digest(self, name: str) -> str:
        tokens = sorted((number, token) for token, number in self._joined.tokens.items())
        rows = {other: found.own.tolist() for other, found in self._rows.items()}
        return hashlib.sha256(canonical_json([tokens, rows, name]).encode()).hexdigest()

    def _config(self, checkpoint: Checkpoint, base: Checkpoint | None) -> dict[str, Any]:
        numbers = self._numbers(checkpoint.name)
        fallback = base.config if base is not None else {}
        changes = _renumbered(checkpoint.config, fallback, numbers)
        text = checkpoint.config.get("text_config")
        if isinstance(text, dict) and "vocab_size" in text:
            changes["text_config"] = {**text, **_renumbered(text, {}, numbers), "vocab_size": self._size}
        else:
            changes["vocab_size"] = self._size
        return changes

    def _numbers(self, name: str) -> dict[int, int | None]:
        """The number in the joined vocabulary of each of a model's own tokens; None for those that were dropped."""
        return {number: self._joined.tokens.get(token) for token, number in self._own[name].tokens.items()}

    def _write_tokenizer(self, view: AlignedCheckpoint, base: AlignedCheckpoint | None) -> None:
        if self._rule == "base" and base is not None:
            _copy(base.path, view.path, TOKENIZER_FILES)
        for file in LEGACY_FILES if self._rule == "union" else ():
            (view.path / file).unlink(missing_ok=True)
        if self._rule == "union":
            (view.path / FILE).write_text(json.dumps(self._joined.data, ensure_ascii=False), encoding="utf-8")
            _adapt_settings(view.path / "tokenizer_config.json")
        generation = view.path / "generation_config.json"
        if generation.is_file():
            data = json.loads(generation.read_bytes())
            data.update(_renumbered(data, {}, self._numbers(view.name)))
            generation.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def _notes(self, name: str) -> list[Finding]:
        mine, joined = self._own[name].tokens, self._joined.tokens
        new, dropped = len(joined.keys() - mine.keys()), len(mine.keys() - joined.keys())
        base = self._own["base"].tokens
        moved = sum(joined[token] != number for token, number in mine.items() if token in joined)
        parts = []
        if moved:
            parts.append(f"{moved} of its tokens have other numbers than in the merged model and are found by name")
        if new:
            whose = "the base's rows, so that it changes nothing there" if name != "base" else "the experts' rows"
            parts.append(f"{new} tokens that it lacks get {whose}")
        if dropped:
            parts.append(f"{dropped} tokens that the base lacks are dropped")
        if name == "base" and len(joined) > len(base):
            parts.append(f"the merged model has {len(joined)} tokens in {self._size} rows")
        text = "; ".join(parts)
        if not text:
            return []
        return [Finding(severity="warning", model=name, message=f"vocabulary ({self._rule}): {text}")]


def _renumbered(
    config: Mapping[str, Any], fallback: Mapping[str, Any], numbers: Mapping[int, int | None]
) -> dict[str, Any]:
    """The fields of a config that name tokens, with their new numbers."""
    out: dict[str, Any] = {}
    for field, value in config.items():
        if not _TOKEN_ID.search(field) or value is None:
            continue
        if isinstance(value, list):
            out[field] = [new for old in value if (new := numbers.get(old)) is not None]
        elif isinstance(value, int):
            new = numbers.get(value, value)
            out[field] = fallback.get(field) if new is None else new
    return out


def _adapt_settings(path: Path) -> None:
    """Have transformers use the joined `tokenizer.json` as it is, whatever class the tokenizer was of."""
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    settings.pop("added_tokens_decoder", None)
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _face(path: Path, config: Mapping[str, Any]) -> Path:
    """A directory with the small files of the checkpoint at ``path`` and another config."""
    face = Path(tempfile.mkdtemp(prefix="mergeopt-aligned-"))
    for file in path.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(file, face / file.name)
    (face / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return face


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for old in target.glob(pattern):
            old.unlink()
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" in text else config
