"""Image folders, and decoding images that nobody vouches for."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from optimizer.errors import InvalidData
from workers.data_files import PlacedRows, Source, file_inside, inside

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# Pillow also has decoders that start other programs (Ghostscript for EPS) or are seldom used; only these are tried.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_EXACT = ("PNG", "BMP", "GIF", "TIFF")  # that keep every value; a mask must
_INDEXED = ("1", "L", "P", "I", "I;16")  # modes with one whole number a pixel

PAIRS = ("images", "masks")
"""Directories of images and, under the same names, of their masks."""


def read_image_folder(root: Path, directory: Path, where: str) -> Source:
    """List ``directory/class/image.png`` as rows of ``image`` (a path) and ``label`` (index of the sorted classes).

    One image of each class comes in turn, so that a limit keeps the classes balanced. Where there are the directories
    `PAIRS` instead, rows are ``image`` and ``mask``: files of the same name, suffixes aside. Nothing is decoded here.

    Args:
        root: the data's directory, which no link may leave.
        directory: one split, or the same directory.
        where: dotted field that named it, for errors.

    Raises:
        InvalidData: there are no class directories with images, or an image has no mask.
        PathNotAllowed: a link leads outside ``root``.
    """
    classes = subdirectories(directory)
    if tuple(classes) == PAIRS:
        images, masks = (_images(root, directory / name, where) for name in PAIRS)
        return Source(_in_pairs(images, masks, where))
    listed = [_images(root, directory / name, where) for name in classes]
    if not any(listed):
        raise InvalidData(
            f"{directory.name!r} holds neither data files nor class directories with images",
            field=where,
            remedy="use `class/image.png`, or `split/class/image.png` and name the split",
        )
    return Source(_in_turn(listed, classes), {"label": classes})


def subdirectories(directory: Path) -> list[str]:
    """Return the sorted names of the directories in a directory, hidden ones left out."""
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path, directory: Path, where: str) -> list[Path]:
    inside(root, directory, where)
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() in SUFFIXES)
    return [file_inside(root, file, where) for file in files if not file.name.startswith(".")]


def _in_turn(listed: list[list[Path]], classes: list[str]) -> PlacedRows:
    for turn in zip_longest(*listed):
        for label, file in enumerate(turn):
            if file is not None:
                yield f"{classes[label]}/{file.name}", {"image": file, "label": label}


def _in_pairs(images: list[Path], masks: list[Path], where: str) -> PlacedRows:
    by_name = {file.stem: file for file in masks}
    for file in images:
        if file.stem not in by_name:
            raise InvalidData(
                f"{PAIRS[0]}/{file.name} has no mask",
                field=where,
                remedy=f"give each image a mask of the same name: {PAIRS[1]}/{file.stem}.png",
            )
        yield f"{PAIRS[0]}/{file.name}", {"image": file, "mask": by_name[file.stem]}


def open_image(value: Any, mode: str) -> Image.Image:
    """Decode an image, upright and in ``mode`` (``RGB`` or ``L``).

    Args:
        value: a path, the bytes of an image file, or ``{"bytes": …}`` as `datasets` stores images.
        mode: Pillow's name of the colour mode.

    Raises:
        ValueError: it is none of these, no image of a known format, truncated, or has too many pixels.
    """
    with _decoded(value, _FORMATS) as image:
        return image.convert(mode)


def open_mask(value: Any) -> NDArray[np.int64]:
    """Decode a mask, upright: the number that each pixel has in the file; of a palette, not its colours.

    Args:
        value: see `open_image`.

    Returns:
        Shape (height, width).

    Raises:
        ValueError: see `open_image`; or it has colours, or is of a format that does not keep values as they are.
    """
    with _decoded(value, _EXACT) as image:
        if image.mode not in _INDEXED:
            raise ValueError(f"a mask must have one whole number for each pixel; this one has the mode {image.mode}")
        return np.asarray(image).astype(np.int64)


@contextmanager
def _decoded(value: Any, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes | Path):
        raise ValueError("no image: a file of an image folder, or the bytes of an image file, is needed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value, formats=formats) as image:
                yield ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the image has too many pixels: {error}") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's decoders raise all of these on damaged files
        raise ValueError(f"the image cannot be read: {error}") from error
