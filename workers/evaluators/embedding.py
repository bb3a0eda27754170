"""Embeddings of texts: what retrieval and sentence similarity share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from workers.evaluators.base import Batch, Evaluator, Inputs, run
from workers.evaluators.loading import check_vocabulary, load_tokenizer, max_length
from workers.evaluators.texts import MAX_LENGTH, Texts

Pooling = Literal["mean", "cls", "last"]

_SAVED: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


class EmbeddingOptions(Evaluator.Options):
    """Options of evaluators that embed texts."""

    pooling: Pooling | None = Field(
        default=None,
        description=(
            "What stands for a text: the mean of its tokens' last hidden states, the first token's, or the last one's. By "
            "default what the checkpoint says to sentence-transformers, else the mean."
        ),
        examples=["mean"],
    )
    normalise: bool = Field(default=True, description="Give embeddings length 1, so that products are cosines.")
    max_length: int | None = Field(default=None, ge=2, le=1_000_000, description=MAX_LENGTH, examples=[256])


class Embedder:
    """Prepared texts, embedded by any number of models.

    Args:
        texts: at least one.
        options: of the evaluator.
        inputs: of the evaluator.
        config: the model's.

    Attributes:
        lengths: tokens of each text.

    Raises:
        InvalidInput: the model does not take such long texts.
        InvalidCheckpoint: the tokenizer is missing, unusable or of another model.
    """

    def __init__(
        self, texts: Sequence[str], options: EmbeddingOptions, inputs: Inputs, config: PreTrainedConfig
    ) -> None:
        model_dir, field = inputs.model_dir, inputs.field
        tokenizer = load_tokenizer(model_dir, field)
        tokens = Texts(tokenizer, config, texts, None, max_length(options.max_length, tokenizer, config, field))
        check_vocabulary(tokens.ids, config, model_dir, field)
        self.lengths = np.array(tokens.lengths)
        self._pooling = options.pooling or saved_pooling(model_dir)
        self._normalise = options.normalise
        self._batches = tokens.batches(options.batch_size, torch.from_numpy(self.lengths))

    def embed(self, model: PreTrainedModel, cancelled: Callable[[], bool]) -> NDArray[np.float64]:
        """Return the texts' embeddings, shape (texts, dimensions)."""
        found = run(model, self._batches, self._score, cancelled).T
        if self._normalise:
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        out: NDArray[np.float64] = found
        return out

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        # A pooler's output is of no use: the head that it belongs to may be another model's, or nobody's.
        states = model(**inputs).last_hidden_state.float()
        return _pooled(states, batch.targets.to(model.device), self._pooling).T


def saved_pooling(model_dir: Path) -> Pooling:
    """Return the pooling that a checkpoint of sentence-transformers names, else the mean."""
    try:
        saved = json.loads((model_dir / "1_Pooling" / "config.json").read_bytes())
    except (OSError, ValueError):
        return "mean"
    named = [pooling for key, pooling in _SAVED.items() if isinstance(saved, dict) and saved.get(key)]
    return named[0] if len(named) == 1 else "mean"


def _pooled(states: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector a text, shape (batch, dimensions).

    Args:
        states: shape (batch, tokens, dimensions), padded on the right.
        lengths: shape (batch,): how many tokens are no padding.
        pooling: see `EmbeddingOptions`.
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    within = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return states.where(within[:, :, None], 0.0).sum(dim=1) / lengths[:, None]
