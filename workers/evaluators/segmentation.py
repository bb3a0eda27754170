"""Semantic segmentation: overlap of the classes that a model gives the pixels of an image with those they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from transformers import PreTrainedModel

from optimizer.errors import InvalidCheckpoint, InvalidInput, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows
from workers.evaluators import contributions, pixels
from workers.evaluators.base import Batch, Evaluator, Inputs, Prediction, Scores, evaluator, log_softmax, never, run
from workers.evaluators.loading import load_image_processor

_IGNORED = -1
Mask = NDArray[np.int64]


@evaluator("segmentation")
class Segmentation(Evaluator):
    """Each image is an item. With T, P and I the pixels that a class has in the mask, in the prediction, and in both:

    - ``dice``: the mean of 2 I / (T + P) over the classes that the mask or the prediction has; 1 where there is none;
    - ``iou``: the mean of I / (T + P − I) over the same classes;
    - ``pixel_accuracy``: the share of pixels that are right, weight: the image's pixels;
    - ``loss``: the mean cross-entropy of its pixels in nats, weight: its pixels;
    - ``mean_iou``: what the image contributes to the mean IoU of the whole data set, in which T, P and I are those of
      all images together (`contributions.mean_overlap`), as benchmarks report it.

    Pixels that are ignored count nowhere, ``background`` not in ``dice``, ``iou`` and ``mean_iou``. Logits are resized to
    the mask's size (bilinear), as transformers does.
    """

    summary: ClassVar[str] = "How well a segmentation model finds the class of every pixel of an image."
    metrics: Mapping[str, Direction] = {
        "dice": "maximise",
        "iou": "maximise",
        "pixel_accuracy": "maximise",
        "loss": "minimise",
        "mean_iou": "maximise",
    }
    whole_only = frozenset({"mean_iou"})
    columns: ClassVar[dict[str, str]] = {
        "image": "The image: a file of the directory `images`, or the bytes of an image file.",
        "mask": "As large as the image, the class of each pixel as a number: a file of the directory `masks`, or bytes.",
    }
    auto_class: ClassVar[str] = "AutoModelForSemanticSegmentation"
    uses_head: ClassVar[bool] = True

    class Options(Evaluator.Options):
        """Options of segmentation."""

        ignore_index: int | None = Field(
            default=255, ge=0, le=65535, description="Value of the mask's pixels that count nowhere.", examples=[255]
        )
        background: int | None = Field(
            default=None,
            ge=0,
            le=65535,
            description="Class that does not count in `dice`, `iou` and `mean_iou`; all count by default.",
            examples=[0],
        )
        values: list[int] | None = Field(
            default=None,
            min_length=1,
            max_length=65536,
            description="Values in the masks that stand for class 0, 1, and so on; the numbers themselves by default.",
            examples=[[0, 255]],
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, field = inputs.rows, inputs.field
        self._classes = _class_count(self.config, field)
        _check_options(options, self._classes, field)
        self._masks = [
            torch.from_numpy(_classes_of(mask, row, rows, options, self._classes).astype(np.int32))
            for row, mask in enumerate(rows.masks("mask"))
        ]
        self._sizes = np.array([int((mask != _IGNORED).sum()) for mask in self._masks])
        processor = load_image_processor(inputs.model_dir, field)
        _check_processor(processor, field)
        fits = partial(_check_size, masks=self._masks, rows=rows)
        self._pixels = pixels.prepare(processor, rows, pixels.mode_of(self.config), fits)
        self._batches = self._pixels.batches(options.batch_size, torch.arange(len(rows)))

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a segmentation model."""
        found = run(model, self._batches, self._score, cancelled)
        right, nats = found[:2]
        shared, true, predicted = np.split(found[2:], 3)
        counted = [number for number in range(self._classes) if number != self.options.background]
        shared, sizes = shared[counted], (true + predicted)[counted]
        scores = {
            "dice": _mean_over_classes(2 * shared, sizes),
            "iou": _mean_over_classes(shared, sizes - shared),
            "pixel_accuracy": right / self._sizes,
            "loss": nats / self._sizes,
            "mean_iou": contributions.mean_overlap(shared, sizes - shared),
        }
        weights = self._sizes.astype(np.float32)
        return self.scored(
            {
                metric: ItemScores(values.astype(np.float32), weights if metric in ("pixel_accuracy", "loss") else None)
                for metric, values in scores.items()
            }
        )

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`; an image draws every pixel that is not ignored."""
        for batch in self._batches:
            for number, (logits, mask) in enumerate(self._outputs(model, batch), 1):
                kept = mask != _IGNORED
                yield Prediction(log_softmax(logits[:, kept].T), mask[kept], last=number == len(batch.items))

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        return torch.stack([_counts(*output) for output in self._outputs(model, batch)], dim=1)

    def _outputs(self, model: PreTrainedModel, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each image's logits, shape (classes, height, width) of its mask, in float32, and its mask."""
        found = model(**self._pixels.inputs(model, batch)).logits
        if found.shape[1] != self._classes:
            raise JobError(f"the model scores {found.shape[1]} classes, but its head's config names {self._classes}")
        for logits, item in zip(found, batch.targets.tolist(), strict=True):
            mask = self._masks[item].to(logits.device, torch.int64)
            yield interpolate(logits.float()[None], mask.shape, mode="bilinear", align_corners=False)[0], mask


def _counts(logits: Tensor, mask: Tensor) -> Tensor:
    """Return an image's right pixels, nats, and pixels of each class in both, in the mask, and predicted; float64.

    Shape (2 + 3 classes,). All NaN where a logit that counts is not finite: the largest of NaNs is an arbitrary class.
    """
    kept = mask != _IGNORED
    logits, true = logits[:, kept], mask[kept]
    classes = len(logits)
    predicted = logits.argmax(dim=0)
    right = predicted == true
    nats = cross_entropy(logits.T, true, reduction="none").double().sum()
    counted = [torch.bincount(found, minlength=classes) for found in (true[right], true, predicted)]
    out = torch.cat([right.sum()[None], nats[None], *counted]).double()
    return out.where(logits.isfinite().all(), torch.nan)


def _mean_over_classes(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of ``part / whole``, shapes (classes, items), over the classes of an item whose whole is not 0."""
    occurs = whole != 0
    ratios = np.divide(part, whole, out=np.zeros_like(part), where=occurs)
    number = occurs.sum(axis=0)
    out: NDArray[np.float64] = np.where(number > 0, ratios.sum(axis=0) / np.maximum(number, 1), 1.0)
    return out


def _class_count(config: Any, field: str) -> int:
    count = config.num_labels or 0
    if count < 2:
        raise InvalidCheckpoint(
            f"the model must give each pixel one of several classes; it has {count} outputs", field=f"{field}.evaluator"
        )
    return int(count)


def _check_options(options: Segmentation.Options, classes: int, field: str) -> None:
    if options.background is not None and options.background >= classes:
        raise InvalidInput(
            f"the model has no class {options.background}",
            field=f"{field}.options.background",
            remedy=f"use one from 0 to {classes - 1}",
        )
    if options.values is not None and len(options.values) != classes:
        raise InvalidInput(
            f"the model has {classes} classes, not {len(options.values)}",
            field=f"{field}.options.values",
            remedy="give one value for each class, in their order",
        )
    if options.values is not None and len({*options.values, options.ignore_index}) <= classes:
        raise InvalidInput(
            "a value stands for two classes, or for one that is ignored",
            field=f"{field}.options.values",
            remedy="give each class a value of its own, other than `ignore_index`",
        )


def _check_processor(processor: Any, field: str) -> None:
    """Refuse what changes which part of an image the model sees: its logits would not lie over the mask."""
    for step in ("do_center_crop", "do_pad"):
        if getattr(processor, step, None):
            raise InvalidCheckpoint(
                f"the image processor has `{step}`, so that masks would not fit what the model sees",
                field=f"{field}.evaluator",
                remedy="turn it off in preprocessor_config.json and let the processor resize",
            )
    if getattr(processor, "do_reduce_labels", None):
        raise InvalidCheckpoint(
            "the image processor has `do_reduce_labels`: class 0 of the model has the value 1 in the masks",
            field=f"{field}.evaluator",
            remedy="turn it off in preprocessor_config.json, and say so by `values: [1, 2, …]` and `ignore_index: 0`",
        )


def _classes_of(mask: Mask, row: int, rows: Rows, options: Segmentation.Options, classes: int) -> Mask:
    """Return the class of each pixel, `_IGNORED` where none counts."""
    table = np.full(65538, _IGNORED - 1)
    table[options.values if options.values is not None else np.arange(classes)] = np.arange(classes)
    if options.ignore_index is not None:
        table[options.ignore_index] = _IGNORED
    found: Mask = table[np.clip(mask, -1, 65536)]
    unknown = found == _IGNORED - 1
    if unknown.any():
        raise rows.error(
            "mask",
            row,
            f"the value {int(mask[unknown][0])} is none of the model's {classes} classes",
            remedy=f"use numbers from 0 to {classes - 1}, the value of `ignore_index`, or say by `values` what stands for "
            "which class",
        )
    if (found == _IGNORED).all():
        raise rows.error("mask", row, "every pixel is ignored", remedy="leave this image out")
    return found


def _check_size(row: int, image: Image.Image, masks: list[Tensor], rows: Rows) -> None:
    height, width = masks[row].shape
    if image.size != (width, height):
        raise rows.error(
            "mask",
            row,
            f"the mask has {width} × {height} pixels, the image {image.size[0]} × {image.size[1]}",
            remedy="give a mask for the image as it is",
        )
