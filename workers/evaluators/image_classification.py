"""Image classification: accuracy and cross-entropy of an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.spec import Direction
from workers.data import Rows
from workers.evaluators import classification
from workers.evaluators.base import Batch, Evaluator, Inputs, Prediction, Scores, by_length, evaluator, never, run
from workers.evaluators.loading import load_image_processor


@evaluator("image_classification")
class ImageClassification(Evaluator):
    """Per item: ``accuracy`` is 1 or 0, ``loss`` the cross-entropy in nats."""

    summary: ClassVar[str] = "How well an image classifier names the class of an image."
    metrics: Mapping[str, Direction] = classification.METRICS
    columns: ClassVar[dict[str, str]] = {
        "image": "The image: a file of an image folder, or the bytes of an image file.",
        "label": classification.LABEL + " In an image folder, the name of the image's directory.",
    }
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    uses_head: ClassVar[bool] = True

    def __init__(self, options: Evaluator.Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, model_dir, field = inputs.rows, inputs.model_dir, inputs.field
        labels = torch.tensor(classification.labels_of(rows, self.config, field))
        mode = "L" if getattr(self.config, "num_channels", 3) == 1 else "RGB"
        self._pixels = _prepare(load_image_processor(model_dir, field), rows, mode)
        self._classes = classification.class_count(self.config, field)
        self._batches = [
            Batch(
                items, {"pixel_values": self._pixels.stored[items[0] : items[-1] + 1]}, labels[items[0] : items[-1] + 1]
            )
            for items in by_length([1] * len(rows), options.batch_size)  # in their order: all have one length
        ]

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score an image classifier."""
        return self.scored(classification.item_scores(run(model, self._batches, self._score, cancelled)))

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`."""
        for batch in self._batches:
            yield from classification.predictions_of(*self._outputs(model, batch))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return classification.scores_of(*self._outputs(model, batch))

    def _outputs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        pixels = self._pixels.restore(batch.inputs["pixel_values"].to(model.device))
        logits = model(pixel_values=pixels.to(model.dtype)).logits
        classification.check_outputs(logits, self._classes)
        return logits, batch.targets.to(model.device)


@dataclass(frozen=True)
class _Pixels:
    """What the processor makes of the images, as compact as it can be without changing a bit.

    Rescaling and normalising map each byte of a channel to one float32, so bytes and a table are enough: a quarter of
    the memory. A processor that does more than that after resizing is stored as float32 and has no table.

    Attributes:
        stored: shape (items, channels, height, width), uint8, or float32 without a table.
        table: shape (channels, 256), float32, or None.
    """

    stored: Tensor
    table: Tensor | None

    def restore(self, stored: Tensor) -> Tensor:
        """Return pixel values, shape of ``stored``, float32."""
        if self.table is None:
            return stored
        channels = torch.arange(len(self.table), device=stored.device)[:, None, None]
        values: Tensor = self.table.to(stored.device)[channels, stored.int()]
        return values


def _prepare(processor: Any, rows: Rows, mode: str) -> _Pixels:
    images = rows.images("image", mode)
    first = next(images)
    table = _table(processor, first, mode)
    steps = {} if table is None else {"do_rescale": False, "do_normalize": False}
    pixels = [_process(processor, first, **steps)]
    for row, image in enumerate(images, 1):
        pixels.append(_process(processor, image, **steps))
        if pixels[row].shape != pixels[0].shape:
            raise rows.error(
                "image",
                row,
                f"the processor makes it {tuple(pixels[row].shape)}, but the first image {tuple(pixels[0].shape)}",
                remedy="use images of one size, or a processor that resizes",
            )
    return _Pixels(torch.stack(pixels), table)


def _table(processor: Any, example: Image.Image, mode: str) -> Tensor | None:
    """Return the float that each byte of each channel becomes, or None if that is not all the processor does."""
    raw = _process(processor, example, do_rescale=False, do_normalize=False)
    if raw.dtype != torch.uint8 or getattr(processor, "do_pad", None):
        return None
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    levels = Image.fromarray(np.stack([ramp] * 3, axis=-1) if mode == "RGB" else ramp)
    table = _process(processor, levels, do_resize=False, do_center_crop=False).flatten(1)
    same = torch.equal(_Pixels(raw, table).restore(raw), _process(processor, example))
    return table if same else None


def _process(processor: Any, image: Image.Image, **options: Any) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels
