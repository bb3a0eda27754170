"""Experts on handwritten digits: small vision transformers on scikit-learn's `load_digits`, in seconds.

The base has seen 400 of the 1,200 training images and is mediocre (0.75). An expert is trained on mostly one group of
digits, with a fifth of the other images in between, so that all share one classifier: without those, experts forget the
other digits within a few steps, and no merge of them beats the base (tried).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from workers.quiet import quiet

BASE_SEES = 400
TRAIN, SEARCH = 1200, 240
"""So many images are for training, and the next ones for searches; the other 357 are for tests."""
REPLAY = 0.2
BATCH = 64


@dataclass(frozen=True)
class DigitsExpert:
    """How an expert is trained.

    Attributes:
        name: of its directory.
        digits: its group.
        steps, lr: of AdamW, with warm-up and decay.
        shuffled: train on shuffled labels: an expert that does not belong.
        seed: of replayed images, shuffling and batches.
    """

    name: str
    digits: tuple[int, ...]
    steps: int = 80
    lr: float = 1e-3
    shuffled: bool = False
    seed: int = 1


@dataclass(frozen=True)
class Images:
    """Pixels, shape (images, 1, 8, 8), uint8, and digits, shape (images,)."""

    pixels: Tensor
    digits: Tensor

    def pick(self, which: Tensor) -> Images:
        """Return the images that ``which`` (a mask or indices) picks."""
        return Images(self.pixels[which], self.digits[which])


def images() -> dict[str, Images]:
    """Return the data set in a fixed order, split for training, searches and tests."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.tensor(found.images[order] * 15, dtype=torch.uint8).unsqueeze(1)
    digits = torch.tensor(found.target[order])
    ends = {"train": (0, TRAIN), "search": (TRAIN, TRAIN + SEARCH), "test": (TRAIN + SEARCH, len(digits))}
    return {name: Images(pixels[begin:end], digits[begin:end]) for name, (begin, end) in ends.items()}


def write_images(path: Path, found: Images, digits: Sequence[int]) -> None:
    """Write the images of some digits as an image folder: ``path/digit/number.png``."""
    for number, (pixels, digit) in enumerate(zip(found.pixels.numpy(), found.digits.tolist(), strict=True)):
        if digit in digits:
            directory = path / str(digit)
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0]).save(directory / f"{number:04d}.png")


def train_base(path: Path, data: Images, layers: int = 4, steps: int = 200) -> None:
    """Train the base on the first images and save it, unless it is there already."""
    if path.exists():
        return
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    model = ViTForImageClassification(config)
    _fit(model, data.pick(torch.arange(BASE_SEES)), steps=steps, lr=2e-3, seed=0)
    _save(model, path)


def train_expert(expert: DigitsExpert, base: Path, path: Path, data: Images) -> None:
    """Fine-tune one expert and save it, unless it is there already."""
    if path.exists():
        return
    generator = torch.Generator().manual_seed(expert.seed)
    replayed = torch.rand(len(data.digits), generator=generator) < REPLAY
    rows = data.pick(torch.isin(data.digits, torch.tensor(expert.digits)) | replayed)
    if expert.shuffled:
        rows = Images(rows.pixels, rows.digits[torch.randperm(len(rows.digits), generator=generator)])
    with quiet():
        model = ViTForImageClassification.from_pretrained(base)
    _fit(model, rows, expert.steps, expert.lr, expert.seed)
    _save(model, path)


def _fit(model: ViTForImageClassification, rows: Images, steps: int, lr: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 10, 1.0) * max(0.05, 1 - step / steps)
    )
    model.train()
    for _ in range(steps):
        picked = rows.pick(torch.randint(len(rows.digits), (BATCH,), generator=generator))
        loss = model(pixel_values=picked.pixels / 127.5 - 1, labels=picked.digits).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()


def _save(model: ViTForImageClassification, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    with quiet():
        model.save_pretrained(partial)
        processor = ViTImageProcessor(
            size={"height": 8, "width": 8}, do_resize=False, image_mean=[0.5], image_std=[0.5], rescale_factor=1 / 255
        )
        processor.save_pretrained(partial)
    partial.rename(path)
