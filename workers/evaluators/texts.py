"""Texts, or pairs of texts, as a tokenizer cuts them for an encoder or a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from optimizer.errors import InvalidInput
from workers.evaluators.base import Batch, Inputs, by_length, pad
from workers.evaluators.loading import check_vocabulary, load_tokenizer, max_length

MAX_LENGTH = "Longer texts are cut to this many tokens; the model's limit, at most 1024, by default."
"""Describes the option of evaluators that read texts."""


class Texts:
    """Tokenised texts, special tokens included, cut where they are too long.

    Args:
        tokenizer: the model's.
        config: the model's.
        texts: at least one.
        pairs: a second text for each, or None.
        limit: most tokens.

    Attributes:
        lengths: tokens of each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        limit: int,
    ) -> None:
        second = None if pairs is None else list(pairs)
        encoded: Any = tokenizer(list(texts), second, truncation=True, max_length=limit, verbose=False)
        self._encoded: dict[str, list[list[int]]] = dict(encoded)
        self._fill = {
            "input_ids": config.get_text_config().pad_token_id or 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        self.lengths = [len(ids) for ids in self.ids]

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each text."""
        return self._encoded["input_ids"]

    @property
    def tokens(self) -> int:
        """How many there are in all texts together."""
        return sum(self.lengths)

    def batches(self, batch_size: int, targets: Tensor, max_padded: int | None = None) -> list[Batch]:
        """Return the texts in batches of similar length; see `by_length`.

        Args:
            batch_size: most texts in one.
            targets: one for each text, in their order.
            max_padded: most tokens in one, padding counted.
        """
        return [
            Batch(
                items,
                {
                    name: pad([values[item] for item in items], self._fill.get(name, 0))
                    for name, values in self._encoded.items()
                },
                targets[torch.from_numpy(items)],
            )
            for items in by_length(self.lengths, batch_size, max_padded)
        ]


def load_texts(inputs: Inputs, config: PreTrainedConfig, longest: int | None, room: int = 0) -> Texts:
    """Tokenise the columns ``text`` and, where there is one, ``text_pair``.

    Args:
        inputs: of the evaluator.
        config: the model's.
        longest: most tokens, as asked for; None for the default.
        room: how many of them are for what is to be written after a text. With any, texts that are too long lose their
            beginning.

    Raises:
        InvalidData: a row has no text, or one without tokens.
        InvalidInput: the model does not take such long texts, or ``room`` leaves none for them.
        InvalidCheckpoint: the tokenizer is missing, unusable or of another model.
    """
    rows, model_dir, field = inputs.rows, inputs.model_dir, inputs.field
    first = rows.texts("text")
    second = rows.texts("text_pair") if rows.has("text_pair") else None
    tokenizer = load_tokenizer(model_dir, field)
    limit = max_length(longest, tokenizer, config, field) - room
    if limit < 1:
        raise InvalidInput(
            f"{room} tokens to write leave no room for a text",
            field=f"{field}.options.max_length",
            remedy=f"use more than {room}, or write fewer tokens",
        )
    if room:
        tokenizer.truncation_side = "left"
    texts = Texts(tokenizer, config, first, second, limit)
    for row, length in enumerate(texts.lengths):
        if not length:
            raise rows.error("text", row, "the text has no tokens")
    check_vocabulary(texts.ids, config, model_dir, field)
    return texts


def unpadded_batch(config: PreTrainedConfig, batch_size: int) -> int:
    """Return how many texts a sequence classifier takes at once.

    Without a padding token, decoders cannot tell where a padded text ends, and refuse batches.
    """
    return 1 if config.get_text_config().pad_token_id is None else batch_size
