"""Image classification: accuracy and cross-entropy of an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.spec import Direction
from workers.evaluators import classification, pixels
from workers.evaluators.base import Batch, Evaluator, Inputs, Prediction, Scores, evaluator, never, run
from workers.evaluators.loading import load_image_processor


@evaluator("image_classification")
class ImageClassification(Evaluator):
    """The measures are described at `workers.evaluators.classification.item_scores`."""

    summary: ClassVar[str] = "How well an image classifier names the class of an image."
    metrics: Mapping[str, Direction] = classification.METRICS
    whole_only = classification.WHOLE_ONLY
    columns: ClassVar[dict[str, str]] = {
        "image": "The image: a file of an image folder, or the bytes of an image file.",
        "label": classification.LABEL + " In an image folder, the name of the image's directory.",
    }
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    uses_head: ClassVar[bool] = True

    class Options(classification.ClassificationOptions):
        """Options of image classification."""

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, field = inputs.rows, inputs.field
        self._labels = torch.tensor(classification.labels_of(rows, self.config, field))
        self._classes = classification.class_count(self.config, field)
        self.metrics = classification.metrics_of(self._classes, options.k)
        processor = load_image_processor(inputs.model_dir, field)
        self._pixels = pixels.prepare(processor, rows, pixels.mode_of(self.config))
        self._batches = self._pixels.batches(options.batch_size, self._labels)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score an image classifier."""
        found = run(model, self._batches, self._score, cancelled)
        return self.scored(classification.item_scores(found, self._labels, self._classes, self.options.k))

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`."""
        for batch in self._batches:
            yield from classification.predictions_of(*self._outputs(model, batch))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return classification.scores_of(*self._outputs(model, batch), self.options.k)

    def _outputs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(**self._pixels.inputs(model, batch)).logits
        classification.check_outputs(logits, self._classes)
        return logits, batch.targets.to(model.device)
