"""Text classification: accuracy and cross-entropy of a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.spec import Direction
from workers.evaluators import classification
from workers.evaluators.base import Batch, Evaluator, Inputs, Prediction, Scores, evaluator, never, run
from workers.evaluators.texts import MAX_LENGTH, load_texts, unpadded_batch


@evaluator("text_classification")
class TextClassification(Evaluator):
    """The measures are described at `workers.evaluators.classification.item_scores`."""

    summary: ClassVar[str] = "How well a sequence classifier names the class of a text, or of a pair of texts."
    metrics: Mapping[str, Direction] = classification.METRICS
    whole_only = classification.WHOLE_ONLY
    columns: ClassVar[dict[str, str]] = {
        "text": "The text.",
        "text_pair": "A second text, for tasks on pairs (optional).",
        "label": classification.LABEL,
    }
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    uses_head: ClassVar[bool] = True

    class Options(classification.ClassificationOptions):
        """Options of text classification."""

        max_length: int | None = Field(default=None, ge=8, le=1_000_000, description=MAX_LENGTH, examples=[128])

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        self._labels = torch.tensor(classification.labels_of(inputs.rows, self.config, inputs.field))
        self._classes = classification.class_count(self.config, inputs.field)
        self.metrics = classification.metrics_of(self._classes, options.k)
        texts = load_texts(inputs, self.config, options.max_length)
        self.tokens = texts.tokens
        self._batches = texts.batches(unpadded_batch(self.config, options.batch_size), self._labels)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a sequence classifier."""
        found = run(model, self._batches, self._score, cancelled)
        return self.scored(classification.item_scores(found, self._labels, self._classes, self.options.k))

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`."""
        for batch in self._batches:
            yield from classification.predictions_of(*self._outputs(model, batch))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return classification.scores_of(*self._outputs(model, batch), self.options.k)

    def _outputs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.inputs.items()}).logits
        classification.check_outputs(logits, self._classes)
        return logits, batch.targets.to(model.device)
