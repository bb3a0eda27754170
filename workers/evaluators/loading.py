"""Opens the config, tokenizer and image processor of a checkpoint directory: offline, quiet, and without its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from optimizer.errors import InvalidCheckpoint, InvalidInput
from workers.quiet import quiet

T = TypeVar("T")

DEFAULT_MAX_LENGTH = 1024


def load_config(model_dir: Path, field: str) -> PreTrainedConfig:
    """Return a checkpoint's config; raises `InvalidCheckpoint`."""
    config: PreTrainedConfig = _load(AutoConfig.from_pretrained, model_dir, "config", field)
    return config


def load_tokenizer(model_dir: Path, field: str) -> PreTrainedTokenizerBase:
    """Return a checkpoint's tokenizer; raises `InvalidCheckpoint`, also where it has no vocabulary files."""
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, model_dir, "tokenizer", field)
    # Without its files, transformers builds a Bert tokenizer that knows no word at all, and says nothing.
    if not any((model_dir / name).is_file() for name in tokenizer.vocab_files_names.values()):
        raise InvalidCheckpoint(
            f"the checkpoint {model_dir.name!r} has no tokenizer files",
            field=f"{field}.evaluator",
            remedy=f"save the tokenizer beside the weights: {', '.join(tokenizer.vocab_files_names.values())}",
        )
    return tokenizer


def load_image_processor(model_dir: Path, field: str) -> Any:
    """Return a checkpoint's image processor; raises `InvalidCheckpoint`.

    It is the one built on Pillow even where torchvision is installed, so that all workers see the same pixels.
    """
    return _load(AutoImageProcessor.from_pretrained, model_dir, "image processor", field, backend="pil")


def _load(load: Callable[..., Any], model_dir: Path, what: str, field: str, **options: Any) -> Any:
    where = f"{field}.evaluator"
    if not model_dir.is_dir():
        raise InvalidCheckpoint(f"there is no checkpoint directory {model_dir.name!r}", field=where)
    try:
        with quiet():
            return load(str(model_dir), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # on malformed files the libraries raise anything, plain Exception included
        first = str(error).strip().split("\n", 1)[0]
        raise InvalidCheckpoint(
            f"the checkpoint {model_dir.name!r} has no usable {what}: {first}",
            field=where,
            remedy=f"save the {what} in the directory with `save_pretrained`",
        ) from error


def max_length(asked: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, field: str) -> int:
    """Return the longest sequence to use, in tokens: what is asked for, else the model's limit up to a default.

    Raises:
        InvalidInput: more is asked for than the model takes.
    """
    limit = longest_sequence(tokenizer, config)
    if asked is not None and asked > limit:
        raise InvalidInput(f"the model takes {limit} tokens at most, not {asked}", field=f"{field}.options.max_length")
    return asked or min(limit, DEFAULT_MAX_LENGTH)


def longest_sequence(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """Return the most tokens that a model takes, as its tokenizer and its config say; 10⁹ where they say nothing."""
    known = (tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None))
    return int(min(number for number in (*known, 10**9) if number))


def check_vocabulary(sequences: Iterable[Sequence[int]], config: PreTrainedConfig, model_dir: Path, field: str) -> None:
    """Refuse token ids that the model's embeddings do not have; on a GPU they would break the whole process."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    highest = max((max(ids) for ids in sequences if ids), default=0)
    if size is not None and highest >= size:
        raise InvalidCheckpoint(
            f"the tokenizer of {model_dir.name!r} gives token {highest}, but the model has only {size}",
            field=f"{field}.evaluator",
            remedy="save the tokenizer that belongs to the model",
        )
