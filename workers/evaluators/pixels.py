"""Images as an image processor makes them for a model, kept as compactly as that can be without changing a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from workers.data import Rows
from workers.evaluators.base import Batch, by_length


@dataclass(frozen=True)
class Pixels:
    """What a processor makes of images that all get one size.

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

    def batches(self, batch_size: int, targets: Tensor) -> list[Batch]:
        """Return the images in their order, each batch with its part of ``targets``."""
        return [
            Batch(
                items,
                {"pixel_values": self.stored[items[0] : items[-1] + 1]},
                targets[items[0] : items[-1] + 1],
            )
            for items in by_length([1] * len(self.stored), batch_size)  # in their order: all have one length
        ]

    def inputs(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Return what a model reads of a batch, in its type and on its device."""
        pixels = self.restore(batch.inputs["pixel_values"].to(model.device))
        return {"pixel_values": pixels.to(model.dtype)}


def mode_of(config: PreTrainedConfig) -> str:
    """Return the colour mode, by Pillow's name, of the images that a model reads."""
    return "L" if getattr(config, "num_channels", 3) == 1 else "RGB"


def prepare(processor: Any, rows: Rows, mode: str, check: Callable[[int, Image.Image], None] | None = None) -> Pixels:
    """Decode the column ``image`` and process it.

    Args:
        processor: the model's image processor.
        rows: the items.
        mode: the colour mode that the images are brought to.
        check: called with each row's number and image, to refuse it.

    Raises:
        InvalidData: names the first row that cannot be decoded or gets another size than the one before.
    """
    pixels: list[Tensor] = []
    table, steps = None, {}
    for row, image in enumerate(rows.images("image", mode)):
        if check is not None:
            check(row, image)
        if not pixels:
            table = _table(processor, image, mode)
            steps = {} if table is None else {"do_rescale": False, "do_normalize": False}
        pixels.append(_process(processor, image, **steps))
        if pixels[row].shape != pixels[0].shape:
            raise rows.error(
                "image",
                row,
                f"the processor makes it {tuple(pixels[row].shape)}, but the first image {tuple(pixels[0].shape)}",
                remedy="use images of one size, or a processor that resizes",
            )
    return Pixels(torch.stack(pixels), table)


def _table(processor: Any, example: Image.Image, mode: str) -> Tensor | None:
    """Return the float that each byte of each channel becomes, or None if that is not all the processor does."""
    raw = _process(processor, example, do_rescale=False, do_normalize=False)
    if raw.dtype != torch.uint8 or getattr(processor, "do_pad", None):
        return None
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    levels = Image.fromarray(np.stack([ramp] * 3, axis=-1) if mode == "RGB" else ramp)
    table = _process(processor, levels, do_resize=False, do_center_crop=False).flatten(1)
    same = torch.equal(Pixels(raw, table).restore(raw), _process(processor, example))
    return table if same else None


def _process(processor: Any, image: Image.Image, **options: Any) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels
