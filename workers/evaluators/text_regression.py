"""Regression: how close a model with one output comes to a number that belongs to a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.spec import Direction
from workers.evaluators import regression
from workers.evaluators.base import Batch, Evaluator, Inputs, Scores, evaluator, never, run
from workers.evaluators.texts import MAX_LENGTH, load_texts, unpadded_batch


@evaluator("text_regression")
class TextRegression(Evaluator):
    """The measures are described at `workers.evaluators.regression.item_scores`."""

    summary: ClassVar[str] = (
        "How close a sequence model with one output comes to the number of a text or pair of texts."
    )
    metrics: Mapping[str, Direction] = regression.METRICS
    whole_only = regression.WHOLE_ONLY
    columns: ClassVar[dict[str, str]] = {
        "text": "The text.",
        "text_pair": "A second text, for tasks on pairs (optional).",
        "label": regression.LABEL,
    }
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    uses_head: ClassVar[bool] = True

    class Options(Evaluator.Options):
        """Options of text regression."""

        max_length: int | None = Field(default=None, ge=8, le=1_000_000, description=MAX_LENGTH, examples=[128])

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        regression.check_config(self.config, inputs.field)
        self._labels = regression.labels_of(inputs.rows)
        texts = load_texts(inputs, self.config, options.max_length)
        self.tokens = texts.tokens
        self._batches = texts.batches(unpadded_batch(self.config, options.batch_size), torch.arange(len(self)))

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a sequence model with one output."""
        (predicted,) = run(model, self._batches, self._score, cancelled)
        return self.scored(regression.item_scores(predicted, self._labels))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        return regression.outputs_of(model(**inputs).logits)
