"""Tokenizers as data: which token has which number, how two vocabularies relate, and the union of several.

Only what `tokenizer.json` says is used; no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optimizer.errors import InvalidCheckpoint, InvalidInput
from workers.checkpoints import read_json

FILE = "tokenizer.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
"""Patterns of the files that say how a model reads and writes text."""

LEGACY_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Vocabularies of tokenizers that have no `tokenizer.json`."""

Relation = Literal["equal", "extended", "reduced", "different"]


@dataclass(frozen=True)
class Tokenizer:
    """The content of a `tokenizer.json`."""

    data: Mapping[str, Any]

    @cached_property
    def tokens(self) -> Mapping[str, int]:
        """Number of every token, those that were added later included."""
        return {**self._vocabulary, **{token: int(entry["id"]) for token, entry in self.added.items()}}

    @cached_property
    def added(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings of the tokens that stand outside the model's vocabulary, or are matched before it, by token."""
        return {str(entry["content"]): entry for entry in self.data.get("added_tokens") or []}

    @cached_property
    def merges(self) -> tuple[tuple[str, ...], ...]:
        """The merges of byte pair encoding, in order; empty for other kinds."""
        return tuple(_pair(merge) for merge in self.data["model"].get("merges") or [])

    @cached_property
    def splitting(self) -> Any:
        """What else decides how a text is split into tokens; settings of the last call are no part of it."""
        return self.merges, self.data.get("normalizer"), self.data.get("pre_tokenizer")

    @property
    def _vocabulary(self) -> Mapping[str, int]:
        vocabulary = self.data["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            return {str(entry[0]): number for number, entry in enumerate(vocabulary)}
        return {str(token): int(number) for token, number in vocabulary.items()}


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Read the tokenizer of the checkpoint in the directory ``path``; None where it has no readable `tokenizer.json`."""
    try:
        found = Tokenizer(read_json(path / FILE))
        return found if found.tokens and found.splitting else None
    except (InvalidCheckpoint, KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def relation(base: Tokenizer, other: Tokenizer) -> Relation:
    """Say how a vocabulary relates to the base's.

    Returns:
        ``equal``; ``extended``: all tokens of the base with their numbers, and more; ``reduced``: the other way round;
        ``different``: a token has another number, or each has tokens that the other lacks.
    """
    mine, theirs = base.tokens.items(), other.tokens.items()
    if mine <= theirs:
        return "equal" if len(mine) == len(theirs) else "extended"
    return "reduced" if theirs <= mine else "different"


def conflicts(base: Tokenizer, other: Tokenizer) -> list[str]:
    """Return the tokens of ``other`` whose number stands for another token in ``base``, or that stand elsewhere there."""
    owners = {number: token for token, number in base.tokens.items()}
    return [
        token
        for token, number in other.tokens.items()
        if owners.get(number, token) != token or base.tokens.get(token, number) != number
    ]


def join(base: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """Return the union of tokenizers.

    The base's tokens keep their numbers. Those that only others have follow after its highest number, tokenizer by
    tokenizer, in the order of their numbers there. A token that was added in its own tokenizer is added with the same
    settings; one of the model's own vocabulary joins the base's vocabulary, and for byte pair encoding the merges that
    make it follow after the base's own, so that text of the base's words is split as before until those apply.

    Raises:
        InvalidInput: the tokenizers are of kinds that have no union, e.g. byte pairs and words.
    """
    data = deepcopy(dict(base.data))
    following = max(base.tokens.values()) + 1
    known = dict(base.tokens)
    for other in others:
        for token, _ in sorted(other.tokens.items(), key=lambda item: item[1]):
            if token in known:
                continue
            _append(data, other, token, following)
            known[token] = following
            following += 1
        _append_merges(data, other, known)
    return Tokenizer(data)


def chat_template(path: Path) -> str | None:
    """Return the chat template of the checkpoint in ``path``; several named ones as one text. None where it has none."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        pass
    for file in ("tokenizer_config.json", "chat_template.json"):
        try:
            found = read_json(path / file).get("chat_template")
        except InvalidCheckpoint:
            continue
        if found:
            return found.strip() if isinstance(found, str) else json.dumps(found, sort_keys=True)
    return None


def _append(data: dict[str, Any], other: Tokenizer, token: str, number: int) -> None:
    if token in other.added:
        data.setdefault("added_tokens", []).append({**other.added[token], "id": number})
        return
    model, theirs = data["model"], other.data["model"]
    if model.get("type") != theirs.get("type"):
        raise InvalidInput(
            f"a tokenizer of kind {theirs.get('type')} has no union with one of kind {model.get('type')}",
            field="merge.vocabulary",
            remedy="use `base`, which keeps the base's tokens only",
        )
    if isinstance(model["vocab"], dict):
        model["vocab"][token] = number
        return
    if len(model["vocab"]) != number:  # a Unigram token's number is its place in the list
        raise InvalidInput(
            "the base's tokenizer has tokens after its vocabulary's end, so the vocabulary cannot be extended",
            field="merge.vocabulary",
            remedy="use `base`, which keeps the base's tokens only",
        )
    model["vocab"].append(list(theirs["vocab"][other.tokens[token]]))


def _append_merges(data: dict[str, Any], other: Tokenizer, known: Mapping[str, int]) -> None:
    model = data["model"]
    if not other.merges or "merges" not in model:
        return
    present = {_pair(merge) for merge in model["merges"]}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for merge in other.merges:
        if merge not in present and all(part in known for part in (*merge, "".join(merge))):
            model["merges"].append(" ".join(merge) if as_text else list(merge))


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
