"""Text classification: accuracy and cross-entropy of a sequence classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimizer.spec import Direction
from workers.evaluators import classification
from workers.evaluators.base import Batch, Evaluator, Inputs, Prediction, Scores, by_length, evaluator, never, pad, run
from workers.evaluators.loading import check_vocabulary, load_tokenizer, max_length


@evaluator("text_classification")
class TextClassification(Evaluator):
    """Per item: ``accuracy`` is 1 or 0, ``loss`` the cross-entropy in nats."""

    summary: ClassVar[str] = "How well a sequence classifier names the class of a text, or of a pair of texts."
    metrics: Mapping[str, Direction] = classification.METRICS
    columns: ClassVar[dict[str, str]] = {
        "text": "The text.",
        "text_pair": "A second text, for tasks on pairs (optional).",
        "label": classification.LABEL,
    }
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    uses_head: ClassVar[bool] = True

    class Options(Evaluator.Options):
        """Options of text classification."""

        max_length: int | None = Field(
            default=None,
            ge=8,
            le=1_000_000,
            description="Longer texts are cut to this many tokens; the model's limit, at most 1024, by default.",
            examples=[128],
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, model_dir, field = inputs.rows, inputs.model_dir, inputs.field
        labels = torch.tensor(classification.labels_of(rows, self.config, field))
        tokenizer = load_tokenizer(model_dir, field)
        encoded = tokenizer(
            rows.texts("text"),
            rows.texts("text_pair") if rows.has("text_pair") else None,
            truncation=True,
            max_length=max_length(options.max_length, tokenizer, self.config, field),
            verbose=False,
        )
        for row, ids in enumerate(encoded["input_ids"]):
            if not ids:
                raise rows.error("text", row, "the text has no tokens")
        check_vocabulary(encoded["input_ids"], self.config, model_dir, field)
        self.tokens = sum(len(ids) for ids in encoded["input_ids"])
        self._classes = classification.class_count(self.config, field)
        self._batches = _batches(encoded, labels, tokenizer, self.config, options.batch_size)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a sequence classifier."""
        return self.scored(classification.item_scores(run(model, self._batches, self._score, cancelled)))

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`."""
        for batch in self._batches:
            yield from classification.predictions_of(*self._outputs(model, batch))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return classification.scores_of(*self._outputs(model, batch))

    def _outputs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(**{name: tensor.to(model.device) for name, tensor in batch.inputs.items()}).logits
        classification.check_outputs(logits, self._classes)
        return logits, batch.targets.to(model.device)


def _batches(
    encoded: Any, labels: Tensor, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, batch_size: int
) -> list[Batch]:
    # Without a padding token, decoders cannot tell where a padded text ends, and refuse batches.
    pad_id = config.get_text_config().pad_token_id
    fill = {"input_ids": pad_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    return [
        Batch(
            items,
            {name: pad([rows[i] for i in items], fill.get(name, 0)) for name, rows in encoded.items()},
            labels[torch.from_numpy(items)],
        )
        for items in by_length([len(ids) for ids in encoded["input_ids"]], 1 if pad_id is None else batch_size)
    ]
