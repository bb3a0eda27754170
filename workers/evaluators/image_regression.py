"""Regression: how close a model with one output comes to a number that belongs to an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.spec import Direction
from workers.evaluators import pixels, regression
from workers.evaluators.base import Batch, Evaluator, Inputs, Scores, evaluator, never, run
from workers.evaluators.loading import load_image_processor


@evaluator("image_regression")
class ImageRegression(Evaluator):
    """The measures are described at `workers.evaluators.regression.item_scores`."""

    summary: ClassVar[str] = "How close an image model with one output comes to the number of an image."
    metrics: Mapping[str, Direction] = regression.METRICS
    whole_only = regression.WHOLE_ONLY
    columns: ClassVar[dict[str, str]] = {
        "image": "The image: the bytes of an image file.",
        "label": regression.LABEL,
    }
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    uses_head: ClassVar[bool] = True

    def __init__(self, options: Evaluator.Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        regression.check_config(self.config, inputs.field)
        self._labels = regression.labels_of(inputs.rows)
        processor = load_image_processor(inputs.model_dir, inputs.field)
        self._pixels = pixels.prepare(processor, inputs.rows, pixels.mode_of(self.config))
        self._batches = self._pixels.batches(options.batch_size, torch.arange(len(self)))

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score an image model with one output."""
        (predicted,) = run(model, self._batches, self._score, cancelled)
        return self.scored(regression.item_scores(predicted, self._labels))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return regression.outputs_of(model(**self._pixels.inputs(model, batch)).logits)
