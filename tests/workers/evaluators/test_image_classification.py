"""Image classification against plain transformers, one image at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from optimizer.errors import InvalidCheckpoint, InvalidData
from optimizer.spec import DataSpec
from tests.workers.evaluators.cases import FIELD, Row, build, open_model, png
from tests.workers.models import tiny_vit
from workers.data import load_rows
from workers.evaluators.image_classification import ImageClassification
from workers.evaluators.loading import load_image_processor
from workers.evaluators.pixels import prepare

NAME = "image_classification"
ROWS: list[Row] = [{"image": png(n, (7 + 3 * n, 15 - n)), "label": n % 3} for n in range(5)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vit(tmp_path_factory.mktemp("vit"))


def assert_equals_plain_transformers(checkpoint: Path, rows: list[Row], mode: str = "RGB") -> ImageClassification:
    """Compare with the model's own processor and one forward pass an image."""
    evaluator = build(NAME, checkpoint, rows)
    model = open_model(NAME, checkpoint)
    scores = evaluator.evaluate(model)
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")  # type: ignore[no-untyped-call]
    for n, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["image"])).convert(mode)
        with torch.no_grad():
            logits = model(**processor(images=image, return_tensors="pt")).logits[0].double().numpy()
        logp = logits - np.log(np.exp(logits).sum())
        assert scores["loss"].values[n] == pytest.approx(-logp[row["label"]], abs=1e-5)
        assert scores["accuracy"].values[n] == float(logp.argmax() == row["label"])
    assert isinstance(evaluator, ImageClassification)
    return evaluator


def restored(evaluator: ImageClassification) -> torch.Tensor:
    return evaluator._pixels.restore(evaluator._pixels.stored)


def test_equals_a_hand_computation(vit: Path) -> None:
    evaluator = assert_equals_plain_transformers(vit, ROWS)
    assert evaluator._pixels.stored.dtype == torch.uint8


def test_compact_pixels_are_the_processors_bit_for_bit(vit: Path, tmp_path: Path) -> None:
    processors: list[Any] = [
        ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False),
        ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False),
        CLIPImageProcessor(size={"shortest_edge": 9}, crop_size={"height": 8, "width": 8}),
    ]
    for processor in processors:
        tiny = tiny_vit(tmp_path / "vit")
        processor.save_pretrained(tiny)
        evaluator = build(NAME, tiny, ROWS)
        assert isinstance(evaluator, ImageClassification)
        assert evaluator._pixels.stored.dtype == torch.uint8
        loaded = load_image_processor(tiny, FIELD)
        images = [Image.open(io.BytesIO(row["image"])) for row in ROWS]
        plain = loaded(images=images, return_tensors="pt")["pixel_values"].float()
        assert torch.equal(restored(evaluator), plain), type(processor)


def test_a_processor_that_is_no_table_keeps_its_floats(vit: Path) -> None:
    from tests.workers.evaluators.cases import as_rows

    class Centred:
        """Subtracts each image's own mean, which depends on more than a byte."""

        def __init__(self) -> None:
            self.inner = load_image_processor(vit, FIELD)

        def __call__(self, do_normalize: bool = True, **options: Any) -> Any:
            out = self.inner(do_normalize=do_normalize, **options)
            if do_normalize:
                out["pixel_values"] = out["pixel_values"] - out["pixel_values"].mean()
            return out

    pixels = prepare(Centred(), as_rows(ROWS), "RGB")
    assert pixels.table is None
    assert pixels.restore(pixels.stored).dtype == torch.float32
    torch.testing.assert_close(pixels.stored.mean(dim=(1, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)


def test_processors_that_pad_keep_their_floats(vit: Path, tmp_path: Path) -> None:
    tiny = tiny_vit(tmp_path / "vit")
    ViTImageProcessor(size={"height": 6, "width": 8}, do_pad=True, pad_size={"height": 8, "width": 8}).save_pretrained(
        tiny
    )
    evaluator = assert_equals_plain_transformers(tiny, ROWS)
    assert evaluator._pixels.stored.dtype == torch.float32


def test_grey_and_transparent_images(vit: Path) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (9, 8, 7, 100)).save(out, "PNG")
    rows = [{"image": png(1, mode="L"), "label": 0}, {"image": out.getvalue(), "label": 1}]
    assert_equals_plain_transformers(vit, rows)


def test_models_with_one_channel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label={0: "a", 1: "b", 2: "c"},
        initializer_range=0.5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    assert assert_equals_plain_transformers(tmp_path, ROWS, mode="L")._pixels.stored.shape == (5, 1, 8, 8)


def test_convolutional_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_channels=3,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
        id2label={0: "a", 1: "b", 2: "c"},
        initializer_range=0.5,
    )
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert_equals_plain_transformers(tmp_path, ROWS)


def test_image_folder_with_class_names_of_the_model(tmp_path: Path) -> None:
    tiny = tiny_vit(tmp_path / "vit")
    config = json.loads((tiny / "config.json").read_text())
    config |= {"id2label": {"0": "dog", "1": "ant", "2": "cat"}, "label2id": {"dog": 0, "ant": 1, "cat": 2}}
    (tiny / "config.json").write_text(json.dumps(config))
    for n, name in enumerate(("ant", "cat", "dog", "cat")):
        (tmp_path / "data/search" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/search" / name / f"{n}.png").write_bytes(png(n))
    rows = load_rows(DataSpec(path="-", split="search"), tmp_path / "data", f"{FIELD}.data")
    assert rows.places == ["ant/0.png", "cat/1.png", "dog/2.png", "cat/3.png"]
    model = open_model(NAME, tiny)
    losses = build(NAME, tiny, rows).evaluate(model)["loss"].values
    by_hand = [{"image": png(n), "label": label} for n, label in enumerate((1, 2, 0, 2))]
    np.testing.assert_array_equal(losses, build(NAME, tiny, by_hand).evaluate(model)["loss"].values)


def test_images_of_different_sizes_without_resizing(tmp_path: Path) -> None:
    tiny = tiny_vit(tmp_path / "vit")
    ViTImageProcessor(do_resize=False).save_pretrained(tiny)
    with pytest.raises(InvalidData, match="the processor makes it") as caught:
        build(NAME, tiny, [{"image": png(0, (8, 8)), "label": 0}, {"image": png(0, (9, 8)), "label": 0}])
    assert caught.value.field == f"{FIELD}.data.columns.image"


def test_a_malformed_processor_is_refused(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((vit / "config.json").read_bytes())
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3')
    with pytest.raises(InvalidCheckpoint, match="no usable image processor"):
        build(NAME, tmp_path, ROWS)
